"""A ComfyUI workflow of the host's own nodes that repeats a LoRA's preview; none of this pack's nodes is in it."""
