"""Work on whole checkpoints: LoRAs merged into one, a LoRA taken out of two."""
