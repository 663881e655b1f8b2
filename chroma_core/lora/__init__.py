"""LoRA: which layers (targets), which file (formats, dialects), and how it joins the model (branches, adapters)."""
