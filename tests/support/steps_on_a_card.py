"""Training steps of the embedded model on the simulated card: dtypes, attention, and what waits for the card.

Run by tests/core/test_simulated_card.py; prints one JSON object.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chroma_core.loading import load
from chroma_core.loading.spec import ModelSpec
from chroma_core.model import device
from chroma_core.model.latents import image_ids
from chroma_core.training.config import TrainingConfig
from chroma_core.training.run.checkpoint import restore_latest, save_checkpoint
from chroma_core.training.run.metrics import JobPaths, Progress
from chroma_core.training.run.stepper import Stepper
from chroma_core.training.run.trained import make_trained

CARD = torch.device("cuda")


class Watch(TorchDispatchMode):
    """Which attention runs, and how often an answer of the card is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: set[str] = set()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name and "backward" not in name:
            self.attention.add(name.removeprefix("_scaled_dot_product_"))
        on_card = any(isinstance(each, torch.Tensor) and each.is_cuda for each in args)
        result = func(*args, **kwargs or {})
        to_computer = name == "_to_copy" and not result.is_cuda
        self.waits += on_card and (name == "_local_scalar_dense" or to_computer)
        return result


class Said(logging.Handler):
    """What the loader warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    load.require = lambda *_: None  # the trial asks for numbers, and there are none
    device.broken = lambda _: False
    said = Said()
    load.log.addHandler(said)
    model = ModelSpec(flavour="tiny", precision="int8", offload_during_startup=True)
    transformer = load.load_transformer(model, CARD)
    load.load_transformer(ModelSpec(flavour="tiny"), CARD)
    config = TrainingConfig.parse(
        {"name": "card", "model": model.to_dict(), "dataset": {"folder": "none"}, "lora": {"rank": 2}, "steps": 4}
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = JobPaths(folder / "job", folder / "loras", folder, folder)
        trained = make_trained(config, transformer, paths, "")
        settings = config.optimizer_settings(CARD)
        stepper = Stepper(trained.parameters, settings)

        def step() -> Watch:
            rows, text = torch.zeros(1, 16, 64, device=CARD), torch.zeros(1, 4, 128, device=CARD)
            dtype = transformer.x_embedder.weight.dtype
            with Watch() as watch:
                noise = torch.full((1,), 0.5, device=CARD)
                velocity = transformer(rows.to(dtype), text.to(dtype), noise, image_ids(8, 8, CARD))
                stepper.backward(velocity.float().square().mean())
                stepper.apply(1e-4, 1.0)
            return watch

        step()
        before = step()
        save_checkpoint(folder / "checkpoints", Progress(step=2), trained, stepper, None, keep=1)
        stepper = Stepper(trained.parameters, settings)
        progress, damaged = restore_latest(folder / "checkpoints", trained, stepper)
        after = step()
    codes = transformer.transformer_blocks[0].attn.to_q.base_layer.weight.cpu()  # pyright: ignore
    print(
        json.dumps(
            {
                "dtype": str(transformer.x_embedder.weight.dtype),
                "scaled": stepper.loss_scale is not None,
                "attention": sorted(before.attention),
                "restored": progress is not None and progress.step == 2 and not damaged,
                "waits": [before.waits, after.waits],
                "codes": int(codes.long().sum()),
                "said": said.lines,
            }
        )
    )


if __name__ == "__main__":
    main()
