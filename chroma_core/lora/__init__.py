"""LoRA: what is trained (settings), which file (files, key formats), and how it joins the model (layer, adapters)."""
