"""Inference requests: one JSON value that says what to generate, for the command line and for ComfyUI."""
