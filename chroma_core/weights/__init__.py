"""Weights as they lie in files: safetensors, GGUF, scaled fp8; and what a file holds."""
