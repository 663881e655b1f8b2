"""ComfyUI from outside: a server, prompts in API format, and a workflow of its own nodes for a LoRA."""
