"""The example workflows that generate images, and the tools around models and LoRAs."""

from __future__ import annotations

from dataclasses import replace

from .parts import (
    CONCEPT_PROMPT,
    LOAD,
    LORA,
    PROMPTS,
    REAL_MODEL,
    REAL_SAMPLING,
    REAL_SIZE,
    SIZE_AND_SEED,
    TRAIN_FIRST,
    Link,
    Node,
    Workflow,
    decode,
    sampler,
    with_text,
)

FIRST_IMAGE = Workflow(
    "chroma_1_first_picture",
    "Chroma basics 1, first image",
    "One prompt, one image, in seconds.",
    "## Your first image\n\n**Press *Run*.** One prompt, one image. Then change the prompt: `tiny` knows a circle, "
    "square, triangle, star, cross or ring in red, green, blue, yellow, orange, purple, pink, cyan, white or black, on "
    "a background of another of these colours. Next: *Chroma basics 2, first LoRA*.\n\n" + REAL_SAMPLING,
    LOAD | PROMPTS | {"sample": sampler("load", 2)} | decode("sample", "chroma/text_to_image", 3),
    ("positive.text", *SIZE_AND_SEED),
    ("save",),
)

USE_LORA = Workflow(
    "chroma_3_use_lora",
    "Chroma basics 3, use a LoRA",
    "Generate images with a trained LoRA.",
    "## Use a trained LoRA\n\nChoose the file in **Chroma Apply LoRA**; chain the node for several LoRAs. *strength* 1 "
    "is as trained, less is weaker.\n\n" + TRAIN_FIRST + REAL_SAMPLING,
    LOAD
    | {"lora": Node("ChromaApplyLora", 1, {"model": Link("load", 0), "lora": LORA, "strength": 1.0})}
    | with_text(CONCEPT_PROMPT)
    | {"sample": sampler("lora", 2)}
    | decode("sample", "chroma/with_lora", 3),
    ("lora.lora", "lora.strength", "positive.text", *SIZE_AND_SEED),
    ("save",),
)

INPAINT_SIDE = 64  # pixels; the mask is the middle 40 × 40
HOLE_SIDE = 40
HOLE_EDGE = (INPAINT_SIDE - HOLE_SIDE) // 2

USING_WORKFLOWS = (
    Workflow(
        "chroma_inpaint",
        "Chroma inpainting",
        "Inpaint a part of an image; the rest stays.",
        "## Inpainting\n\nAn image is generated, a mask marks the part that may change (white), and the second prompt "
        "is generated there. **Set Latent Noise Mask** adds the mask to the encoded image; **Chroma Sampler** keeps "
        "the "
        "rest of the latent bit for bit. Decoding may shift other pixels slightly, so *Image Composite Masked* "
        "restores them.\n\n**For your own image** replace the first sampler's *VAE Decode* with *Load Image*: "
        "right-click it, *Open in MaskEditor*, draw the mask, and link its MASK in place of *The part to change*. Soft "
        "edges blend old and new.\n\n*denoise* 1 replaces the part completely; 0.6 to 0.9 keeps some of it.\n\n"
        + REAL_SAMPLING
        + "- the sizes and positions of the masks accordingly",
        LOAD
        | {
            "positive": Node(
                "ChromaTextEncode",
                1,
                {"text_encoder": Link("load", 1), "text": "a red star on a blue background"},
                "Prompt of the image",
            ),
            "negative": PROMPTS["negative"],
            "latent": PROMPTS["latent"],
            "second_prompt": Node(
                "ChromaTextEncode",
                1,
                {"text_encoder": Link("load", 1), "text": "a yellow ring on a blue background"},
                "Prompt of the part",
            ),
            "first": sampler("load", 2, collapsed=True, seed=42),
            "picture": Node(
                "VAEDecode",
                2,
                {"samples": Link("first"), "vae": Link("load", 2)},
                "The image to change",
                collapsed=True,
            ),
            "before": Node("PreviewImage", 2, {"images": Link("picture")}, "Before", extra_height=200),
            "canvas": Node(
                "SolidMask", 3, {"value": 0.0, "width": INPAINT_SIDE, "height": INPAINT_SIDE}, "Nothing changes…"
            ),
            "hole": Node("SolidMask", 3, {"value": 1.0, "width": HOLE_SIDE, "height": HOLE_SIDE}, "…but this does"),
            "mask": Node(
                "MaskComposite",
                3,
                {
                    "destination": Link("canvas"),
                    "source": Link("hole"),
                    "x": HOLE_EDGE,
                    "y": HOLE_EDGE,
                    "operation": "add",
                },
                "The part to change",
            ),
            "encode": Node("VAEEncode", 3, {"pixels": Link("picture"), "vae": Link("load", 2)}, collapsed=True),
            "masked": Node("SetLatentNoiseMask", 3, {"samples": Link("encode"), "mask": Link("mask")}, collapsed=True),
            "sample": Node(
                "ChromaSampler",
                4,
                {
                    "model": Link("load"),
                    "positive": Link("second_prompt"),
                    "negative": Link("negative"),
                    "latent": Link("masked"),
                },
            ),
            "decode": Node("VAEDecode", 4, {"samples": Link("sample"), "vae": Link("load", 2)}, collapsed=True),
            "composite": Node(
                "ImageCompositeMasked",
                4,
                {"destination": Link("picture"), "source": Link("decode"), "mask": Link("mask")},
                collapsed=True,
            ),
            "save": Node(
                "SaveImage",
                2,
                {"images": Link("composite"), "filename_prefix": "chroma/inpainted"},
                "After",
                extra_height=200,
            ),
        },
    ),
    Workflow(
        "chroma_lora_in_host_nodes",
        "Chroma LoRA with KSampler",
        "A trained LoRA with ComfyUI's own KSampler, and how to use it in ComfyUI's Load LoRA.",
        "## Your LoRA in ComfyUI's own nodes\n\n**Chroma Apply LoRA**, then **Chroma Host Model**: the output is "
        "ComfyUI's MODEL, for *KSampler*, guiders and other nodes that take one. Prompts may come from **Chroma Text "
        "Encode** or from ComfyUI's T5 encoder.\n\n"
        + TRAIN_FIRST
        + "**Without this pack's nodes**, for the real model: *Load Diffusion Model* (your Chroma file), *Load "
        "CLIP* (the T5 file, type `chroma`), *Load VAE*, then *Load LoRA* with the same file from "
        "`output/loras` and the same strength, *CLIP Text Encode*, *KSampler*. A plain LoRA works there in full, "
        "a DoRA slightly differently. Those nodes cannot load `tiny`, so this workflow shows the "
        "first way.\n\nComfyUI's *scheduler* shifts the noise for 1024 × 1024 pixels; for other sizes use **Chroma "
        "Tail Sigmas** (*Chroma tail sigmas*).\n\n" + REAL_SAMPLING,
        LOAD
        | {
            "lora": Node("ChromaApplyLora", 1, {"model": Link("load", 0), "lora": LORA, "strength": 1.0}),
            "bridge": Node("ChromaHostModel", 1, {"model": Link("lora")}),
        }
        | with_text(CONCEPT_PROMPT)
        | {
            "sample": Node(
                "KSampler",
                2,
                {
                    "model": Link("bridge"),
                    "positive": Link("positive"),
                    "negative": Link("negative"),
                    "latent_image": Link("latent"),
                    "seed": 42,
                    "steps": 25,
                    "cfg": 4.0,
                    "sampler_name": "euler",
                    "scheduler": "simple",
                },
            )
        }
        | decode("sample", "chroma/host_nodes", 3),
    ),
    Workflow(
        "chroma_tail_sigmas",
        "Chroma tail sigmas",
        "ComfyUI's own sampler with Chroma's schedule.",
        "## Tail sigmas in ComfyUI's own sampler\n\n**Chroma Tail Sigmas** puts more steps near both ends of the noise "
        "range; *tail_bias* 0 is the plain schedule. **Chroma Host Model** converts the model for ComfyUI's guiders "
        "and samplers. Put **Chroma Apply LoRA** before it for LoRAs.\n\n" + REAL_SAMPLING,
        LOAD
        | with_text("a yellow ring on a green background")
        | {
            "bridge": Node("ChromaHostModel", 1, {"model": Link("load", 0)}),
            "guider": Node(
                "CFGGuider",
                2,
                {
                    "model": Link("bridge"),
                    "positive": Link("positive"),
                    "negative": Link("negative"),
                    "cfg": 4.0,
                },
            ),
            "noise": Node("RandomNoise", 2, {"noise_seed": 42}),
            "method": Node("KSamplerSelect", 2, {"sampler_name": "euler"}),
            "sigmas": Node(
                "ChromaTailSigmas",
                2,
                {"steps": 25, "tail_bias": 0.3, "width": Link("latent", 1), "height": Link("latent", 2)},
            ),
            "sample": Node(
                "SamplerCustomAdvanced",
                3,
                {
                    "noise": Link("noise"),
                    "guider": Link("guider"),
                    "sampler": Link("method"),
                    "sigmas": Link("sigmas"),
                    "latent_image": Link("latent"),
                },
            ),
        }
        | decode("sample", "chroma/tail_sigmas", 3),
    ),
    Workflow(
        "chroma_your_files",
        "Chroma with your own model files",
        "Model files of your own, and what fits this machine.",
        "## Your own files, and what fits this machine\n\n*transformer*, *text_encoder* and *vae* list the files in "
        "ComfyUI's folders: the released single files, fp8, scaled fp8, GGUF, diffusers folders. A part left at *as "
        "published* comes from the flavour. A file of another kind is refused, and the error says what it is.\n\n"
        "The text on the right shows what each *precision* and *offload* needs, and the recommendation. *offload* "
        "`model` lets the parts take turns on the GPU, `block` keeps only a few of the transformer's blocks there; "
        "the image is the same. *keep_quantised* makes the next start of `int8`, `int4` or `nf4` fast.\n\n"
        + REAL_SAMPLING,
        {
            "load": Node(
                "ChromaLoadModel",
                0,
                {"precision": "int8", "text_precision": "fp32", "offload": "model"},
            ),
            "plan": Node(
                "PreviewAny",
                3,
                {"source": Link("load", 3)},
                "What fits this machine",
                extra_height=300,
                extra_width=120,
            ),
        }
        | with_text("a blue ring on a yellow background")
        | {"sample": sampler("load", 2)}
        | decode("sample", "chroma/your_files", 3),
    ),
    Workflow(
        "chroma_convert_lora",
        "Chroma inspect and convert a LoRA",
        "Inspect a LoRA file, and convert it for another program.",
        "## Inspect and convert a LoRA\n\n**Chroma Inspect LoRA** shows what a file contains, which layers it changes, "
        "and "
        "whether it was trained on this model. **Chroma Convert LoRA** writes it in another program's key format to "
        "`output/loras`; the result is applied here to show that it is the same LoRA. Any file in your LoRA folders "
        "works.\n\n" + TRAIN_FIRST + REAL_SAMPLING,
        LOAD
        | {
            "inspect": Node("ChromaInspectLora", 1, {"lora": LORA, "model": Link("load", 0)}),
            "report": Node("PreviewAny", 1, {"source": Link("inspect", 0)}, "Report", extra_height=150),
            "map": Node(
                "SaveImage",
                1,
                {"images": Link("inspect", 1), "filename_prefix": "chroma/lora_heat_map"},
                "Changed layers",
                collapsed=True,
            ),
            "convert": Node("ChromaConvertLora", 2, {"lora": LORA, "dialect": "kohya"}),
            "written": Node("PreviewAny", 2, {"source": Link("convert", 2)}, "What was written", extra_height=80),
            "lora": Node("ChromaApplyLora", 2, {"model": Link("load", 0), "lora_name": Link("convert", 1)}),
        }
        | with_text(CONCEPT_PROMPT, 3)
        | {"latent": replace(PROMPTS["latent"], column=3, collapsed=True)}
        | {"sample": sampler("lora", 3, collapsed=True)}
        | decode("sample", "chroma/converted_lora", 3),
    ),
    Workflow(
        "chroma_parity",
        "Chroma compare settings",
        "Which setting changes the image, and by how much.",
        "## Which setting changes the image?\n\n**Chroma Parity** generates one image, then again with one setting "
        "changed at a time, and lists the changes by their effect. Choose in *factors* what to change; link a "
        "**job** to reproduce a training preview.\n\n" + REAL_MODEL + REAL_SIZE.replace("Empty Latent", "Parity"),
        LOAD
        | {
            "parity": Node(
                "ChromaParity",
                1,
                {
                    "model": Link("load", 0),
                    "text_encoder": Link("load", 1),
                    "prompt": "a red star on a blue background",
                    "width": 64,
                    "height": 64,
                    "factors": "recipe",
                },
                extra_height=300,
                extra_width=200,
            ),
            "save": Node("SaveImage", 3, {"images": Link("parity"), "filename_prefix": "chroma/parity"}),
        },
    ),
)
