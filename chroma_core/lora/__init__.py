"""LoRA: which modules (targets), which file (formats, dialects), and how it joins the model (layer, adapters)."""
