"""Builds the embedded `tiny` Chroma: VAE, tokenizer, T5 encoder and transformer, from nothing but this repository.

    python -m tools.tiny.build                     # train everything, write chroma_core/assets/tiny
    python -m tools.tiny.build --export-only       # write what the work folder's checkpoints hold so far
    python -m tools.tiny.build --check-only        # image test on the weights that are shipped

About two hours on one CPU thread. Interrupt it at will: it resumes from the work folder. How it was tuned and what the
result can do is told in docs/tiny.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast

from chroma_core.loading.load import load_text_encoder, load_transformer, load_vae
from chroma_core.loading.spec import ModelSpec
from chroma_core.model.text_encoder import T5Encoder
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.model.vae import Autoencoder
from chroma_core.parity.with_diffusers import text_encoder_of, theirs
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.sampling.text import TextEncoder

from .denoiser import STAGES, fill_shelf, train_denoiser
from .text import share_spellings
from .vae import calibrate, decode, encode, polish_decoder, train_vae
from .world import COLOURS, SHAPES, draw, plain_caption, read_image, sample_scene

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "chroma_core" / "assets" / "tiny"
VAE_STEPS, DECODER_STEPS = 3400, 1200


def export(
    folder: Path,
    vae: Autoencoder,
    tokenizer: PreTrainedTokenizerFast,
    encoder: T5Encoder,
    transformer: ChromaTransformer,
) -> None:
    """Writes the standard diffusers folder with bf16 weights."""
    share_spellings(tokenizer, encoder)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    pipeline = ChromaPipeline(
        scheduler=scheduler,
        vae=theirs(AutoencoderKL, vae),
        text_encoder=theirs(text_encoder_of, encoder),
        tokenizer=tokenizer,
        transformer=theirs(ChromaTransformer2DModel, transformer),
    ).to(torch.bfloat16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers 5 calls the class T5Tokenizer, which in version 4 is another class that cannot read this folder.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def load(folder: Path = ASSETS, precision: str = "fp32") -> tuple[Autoencoder, TextEncoder, ChromaTransformer]:
    """VAE, text encoder and transformer, through the pack's own loader."""
    spec = ModelSpec(flavour="tiny", folder=str(folder), precision=precision, text_precision=precision)
    return load_vae(spec, "cpu"), load_text_encoder(spec, "cpu"), load_transformer(spec, "cpu")


def check_prompts(count: int = 64, seed: int = 2024) -> list[tuple[str, str, str]]:
    """`count` triples (shape, colour, background), colours and shapes evenly spread."""
    rng = np.random.default_rng(seed)
    shapes = [list(SHAPES)[i % len(SHAPES)] for i in range(count)]
    colours = [COLOURS[i % len(COLOURS)] for i in rng.permutation(count)]
    backgrounds = [str(rng.choice([name for name in COLOURS if name != colour])) for colour in colours]
    return list(zip(shapes, colours, backgrounds, strict=True))


def image_test(
    folder: Path = ASSETS, settings: SamplingSettings | None = None, count: int = 64, precision: str = "fp32"
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """Shares of right shapes, colours and backgrounds; the images uint8 [count, 64, 64, 3]; the prompts."""
    vae, text, transformer = load(folder, precision)
    triples = check_prompts(count)
    prompts = [plain_caption(*triple) for triple in triples]
    latents = sample(
        transformer,
        [text.encode(prompt) for prompt in prompts],
        text.encode(""),
        width=64,
        height=64,
        settings=settings or SamplingSettings(steps=24, guidance=3.0, seed=42),
    )
    images = decode(vae, latents)
    readings = [read_image(image) for image in images]
    right = np.array(
        [(r.shape == s, r.colour == c, r.background == b) for r, (s, c, b) in zip(readings, triples, strict=True)]
    )
    shares = dict(zip(("shape", "colour", "background"), right.mean(axis=0).tolist(), strict=True))
    return {**shares, "all three": float(right.all(axis=1).mean())}, images, prompts


def latent_statistics(vae: Autoencoder, count: int = 256, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel ([16], [16]) over captioned images."""
    rng = np.random.default_rng(seed)
    latents = encode(vae, np.stack([draw(sample_scene(rng)) for _ in range(count)]))
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


def report(folder: Path) -> None:
    """Prints sizes, latent statistics and the image test at three guidance scales."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    mean, std = latent_statistics(load(folder)[0])
    print(f"{size / 1e6:.1f} MB in all")
    print(f"latents: mean {mean.min():+.2f}..{mean.max():+.2f}, std {std.min():.2f}..{std.max():.2f}")
    for guidance in (2.0, 3.0, 4.0):
        shares, _, _ = image_test(folder, SamplingSettings(steps=24, guidance=guidance, seed=42))
        print(f"guidance {guidance}:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="the diffusers folder to write")
    parser.add_argument("--work", type=Path, default=ROOT / ".tiny_build", help="checkpoints, for resuming")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help="training steps of the VAE")
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS, help="then, of its decoder alone")
    parser.add_argument("--stop-at", type=int, help="pause the transformer's training at this step and export")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more is slower for models this small")
    parser.add_argument("--export-only", action="store_true", help="write the work folder's state and stop")
    parser.add_argument("--check-only", action="store_true", help="only run the image test on --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.check_only:
        options.work.mkdir(parents=True, exist_ok=True)
        (options.work / ".gitignore").write_text("*\n")
        vae = train_vae(options.work, options.seed, 0 if options.export_only else options.vae_steps)
        calibrate(vae, options.seed)
        polish_decoder(vae, options.work, options.seed, 0 if options.export_only else options.decoder_steps)
        tokenizer, model = train_denoiser(options.work, None, options.seed, STAGES[0])
        for stage in () if options.export_only else STAGES:
            shelf = fill_shelf(vae, stage, options.seed)
            tokenizer, model = train_denoiser(options.work, shelf, options.seed, stage, stop_at=options.stop_at)
        export(options.out, vae, tokenizer, model.text_encoder, model.transformer)
    report(options.out)


if __name__ == "__main__":
    main()
