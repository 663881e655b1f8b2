"""A training job as one frozen value, and what may change in it on the way."""
