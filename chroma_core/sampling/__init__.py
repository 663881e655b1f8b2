"""The one sampler: recipe, text, schedule, solvers."""
