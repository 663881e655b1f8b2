"""Names of the same weights in the original layout and in diffusers', both ways, for each component."""
