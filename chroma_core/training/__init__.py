"""LoRA training: configuration, objective, loop, checkpoints, previews and background jobs."""
