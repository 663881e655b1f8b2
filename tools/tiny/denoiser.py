"""Trains the T5 encoder and the transformer of the embedded `tiny` Chroma together, by flow matching.

x_t = (1 − σ)·x₀ + σ·ε, target ε − x₀, mean squared error. A tenth of the captions is empty, for guidance. The latents
of all images are computed once, so a step touches only 16 image tokens and some twelve text tokens an image.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from chroma_core.model.latents import image_ids, pack
from chroma_core.model.transformer import ChromaTransformer
from chroma_core.model.vae import Autoencoder

from .text import new_text_encoder, new_tokenizer, tokens_with_one_pad
from .vae import encode, save_state
from .world import Scene, caption, draw, sample_scene

LATENT_ROWS = 8  # 64 pixels / 8
SIGMAS_A_BATCH = 16  # distinct noise levels in a batch: the approximator runs once for each


@dataclass(frozen=True)
class Stage:
    """A stretch of training: steps `first` to `last`, the peak learning rate, the share of it that is flat.

    `standard` stages train on standard sizes and places with complete captions (see `world`).
    """

    first: int
    last: int
    peak: float
    flat: float
    warmup: int
    images: int
    standard: bool = False

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, flat, then a cosine down to one hundredth."""
        progress = (step - self.first) / (self.last - self.first)
        falling = max(0.0, progress - self.flat) / (1 - self.flat)
        warm = min(1.0, (step - self.first + 1) / self.warmup)
        return self.peak * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * falling)))


# The first stage learns to draw: anything anywhere, captions that leave much open. The second learns to obey: what a
# caption leaves open, the model had to average over, and one shape in seven came out between two shapes.
STAGES = (
    Stage(0, 6000, peak=1.5e-3, flat=0.5, warmup=200, images=12_000),
    Stage(6000, 8000, peak=1e-3, flat=0.0, warmup=50, images=8_000, standard=True),
)


class TinyModel(nn.Module):
    """What is trained: text encoder and transformer."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary)
        self.transformer = ChromaTransformer(
            in_channels=64,
            num_layers=3,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=128,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=64,
            approximator_hidden_dim=256,
            approximator_layers=3,
        )

    def forward(self, latents_BLD: Tensor, ids_BT: Tensor, lengths_B: Tensor, sigma_S: Tensor) -> Tensor:
        """Velocity [B, L, D]; the batch is S groups of equal size, each at one noise level."""
        positions = torch.arange(ids_BT.shape[1])
        real = positions < lengths_B[:, None]
        visible = positions <= lengths_B[:, None]  # the real tokens and one pad
        text = self.text_encoder(ids_BT, real)
        group = len(latents_BLD) // len(sigma_S)
        return self.transformer(
            latents_BLD,
            text,
            sigma_S.repeat_interleave(group),
            image_ids(LATENT_ROWS, LATENT_ROWS),
            None if bool(visible.all()) else visible,
            self.transformer.modulation(sigma_S).repeat_interleave(group, dim=0),
        )


@dataclass
class Shelf:
    """The training images: packed latents [N, L, D] beside the scenes that they show."""

    latents: Tensor
    scenes: list[Scene]


def fill_shelf(vae: Autoencoder, stage: Stage, seed: int) -> Shelf:
    """Draws and encodes the images of a stage."""
    rng = np.random.default_rng([seed, 2, stage.first])
    scenes = [sample_scene(rng, stage.standard) for _ in range(stage.images)]
    parts = []
    for i in tqdm(range(0, stage.images, 500), desc="encoding", mininterval=5):
        parts.append(pack(encode(vae, np.stack([draw(scene) for scene in scenes[i : i + 500]]))))
    return Shelf(torch.cat(parts), scenes)


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in (0, 1): one of four uniform, the rest logit-normal(0, 1); each share evenly spread."""
    uniform = count // 4
    spread = (torch.arange(uniform) + torch.rand(uniform, generator=generator)) / uniform
    normal = (torch.arange(count - uniform) + torch.rand(count - uniform, generator=generator)) / (count - uniform)
    normal = torch.special.ndtri(normal.clamp(1e-4, 1 - 1e-4)).sigmoid()
    return torch.cat([spread, normal])[torch.randperm(count, generator=generator)]


def megabatch(
    shelf: Shelf, tokenizer: PreTrainedTokenizerFast, batch: int, parts: int, rng: np.random.Generator, complete: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`parts` batches (latents, ids, lengths), captions of like length together, in random order."""
    index = rng.integers(len(shelf.scenes), size=batch * parts)
    texts = ["" if rng.random() < 0.1 else caption(shelf.scenes[i], rng, complete) for i in index]
    ids, lengths = tokens_with_one_pad(tokenizer, texts)
    chunks = []
    for rows in lengths.argsort(stable=True).split(batch):
        rows = rows[torch.from_numpy(rng.permutation(batch))]
        width = int(lengths[rows].max()) + 1
        chunks.append((shelf.latents[torch.from_numpy(index)[rows]], ids[rows, :width], lengths[rows]))
    return [chunks[i] for i in rng.permutation(parts)]


def parameter_groups(model: TinyModel, weight_decay: float) -> list[dict]:
    """Groups with a `share` of the learning rate and their weight decay.

    The text encoder learns at a quarter of the rate: T5 does not scale its attention scores, and at the full rate they
    run away until every token attends to `</s>` alone. Token embeddings and vectors do not decay, or the words that no
    caption uses would fade to zero.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        share = 0.25 if name.startswith("text_encoder") else 1.0
        kept = parameter.ndim < 2 or "shared" in name or "relative_attention_bias" in name
        groups.setdefault((share, 0.0 if kept else weight_decay), []).append(parameter)
    return [{"params": group, "share": share, "weight_decay": decay} for (share, decay), group in groups.items()]


def train_denoiser(
    work: Path,
    shelf: Shelf | None,
    seed: int,
    stage: Stage,
    batch: int = 64,
    stop_at: int | None = None,
) -> tuple[PreTrainedTokenizerFast, TinyModel]:
    """Trains one stage (or pauses at `stop_at`) and returns the tokenizer and the averaged (EMA) model.

    Without a shelf it only returns what `work` holds.

    Resumes from `work`; what is drawn depends on (seed, step) alone, so a resumed run equals an uninterrupted one.
    """
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = TinyModel(len(tokenizer)).train()
    nn.init.zeros_(model.transformer.proj_out.weight)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=stage.peak, betas=(0.9, 0.98), fused=True)
    state_file, start, parts = work / "denoiser.pt", 0, 4
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    end = start if shelf is None else min(stage.last, stop_at or stage.last)
    bar = tqdm(range(start, end), initial=start, total=stage.last, desc="denoiser", mininterval=5)
    losses, chunks = [], []
    for step in bar:
        if shelf and (not chunks or step % parts == 0):
            rng = np.random.default_rng([seed, 3, step // parts])
            chunks = megabatch(shelf, tokenizer, batch, parts, rng, stage.standard)
        clean, ids, lengths = chunks[step % parts]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        sigma = draw_sigmas(SIGMAS_A_BATCH, generator)
        noise = torch.randn(clean.shape, generator=generator)
        mix = sigma.repeat_interleave(batch // SIGMAS_A_BATCH)[:, None, None]
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * stage.learning_rate(step)
        # At some twenty-eight tokens the fused CPU attention's backward pass is slower than plain products.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model((1 - mix) * clean + mix * noise, ids, lengths, sigma)
        loss = (velocity.float() - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if (step + 1) % 250 == 0 or step + 1 == end:
            state = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
            save_state(state_file, {**state, "optimizer": optimizer.state_dict()})
    return tokenizer, average
