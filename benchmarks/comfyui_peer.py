"""ComfyUI's own training and sampling on its own Chroma, as a contestant: in a process of its own, a turn at a time.

The process holds ComfyUI's modules alone (none of ours), and works only when it is asked, so that contestants in
several processes take turns. Attention is PyTorch's, as on a GPU; on a CPU ComfyUI would take a slower one by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHROMA_1_ROWS = 344
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or those of one's own process on all cores together: with one thread the same, but for what others
on the machine take."""


class ComfyUI(AbstractContextManager["ComfyUI"]):
    """The process. `kind`: `train` (a turn is one step of the *Train LoRA* node) or `sample` (a turn is one run of
    SamplerCustomAdvanced with CFGGuider)."""

    def __init__(self, kind: str, config: dict[str, Any], threads: int, clock: str, **settings: Any):
        job = {"kind": kind, "config": config, "threads": threads, "clock": clock, **settings}
        command = [sys.executable, __file__, json.dumps(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._answer()

    def turn(self) -> float:
        """Seconds of the next turn, by the clock."""
        assert self.process.stdin is not None
        print("turn", file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("ComfyUI's process ended; its error is above.")
        return answer

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes its pipes and waits for it
            self.process.kill()


class _Turns:
    """The other side: waits to be asked, says how long it took."""

    def __init__(self, clock: str) -> None:
        self.now = CLOCKS[clock]
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what ComfyUI prints is no answer
        self.started: float | None = None

    def next(self) -> None:
        """End the turn that is on, and wait for another."""
        took = 0.0 if self.started is None else self.now() - self.started
        print(took, file=self.answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self.started = self.now()


def _model(config: dict[str, Any]) -> Any:
    """ComfyUI's Chroma in bf16 with random weights."""
    import torch
    from comfy.ldm.chroma.model import Chroma

    import native_lora_check

    # The number of modulation vectors is written down there as Chroma 1's; another depth must not pay for those.
    rows = 3 * config["num_single_layers"] + 12 * config["num_layers"] + 2
    code = Chroma.forward_orig.__code__
    constants = tuple(rows if value == CHROMA_1_ROWS else value for value in code.co_consts)
    Chroma.forward_orig.__code__ = code.replace(co_consts=constants)

    def build(**_: object) -> Any:
        patcher = native_lora_check.build_native(config, dtype="bfloat16")
        draws = torch.Generator().manual_seed(0)
        for parameter in patcher.model.parameters():
            parameter.requires_grad_(False)
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=draws)
        patcher.cached_patcher_init = (build, ())  # the node loads its model anew
        return patcher

    return build()


def _train(job: dict[str, Any], turns: _Turns) -> None:
    """The node with its defaults, but for the rank; every step waits for its turn."""
    import comfy_extras.nodes_train as nodes
    import torch

    step = nodes.TrainSampler._train_step_standard_mode

    def in_turn(*arguments: Any) -> None:
        turns.next()
        step(*arguments)

    sampler: Any = nodes.TrainSampler
    sampler._train_step_standard_mode = in_turn
    inputs: list[Any] = nodes.TrainLoraNode.define_schema().inputs
    defaults = {item.id: [item.default] for item in inputs if hasattr(item, "default")}
    side = job["size"] // 8
    given = {
        "model": _model(job["config"]),
        "latents": {"samples": torch.randn(1, 16, side, side)},
        "positive": [[torch.randn(1, job["text"], 4096), {}]],
        "rank": job["rank"],
        "gradient_checkpointing": job["checkpointing"],
        "existing_lora": "[None]",
        "steps": 10**5,
    }
    with torch.inference_mode():
        nodes.TrainLoraNode.execute(**defaults | {name: [value] for name, value in given.items()})


def _sample(job: dict[str, Any], turns: _Turns) -> None:
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    side = job["size"] // 8
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(_model(job["config"]))
        positive, negative = (torch.randn(1, tokens, 4096) for tokens in job["texts"])
        guider.set_conds([[positive, {}]], [[negative, {}]])
        guider.set_cfg(job["guidance"])
        solver, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(job["sigmas"])
        while True:
            turns.next()
            latent = {"samples": torch.zeros(1, 16, side, side)}
            SamplerCustomAdvanced.execute(Noise_RandomNoise(0), guider, solver, sigmas, latent)


def _main() -> None:
    job = json.loads(sys.argv[1])
    turns = _Turns(job["clock"])
    sys.path.insert(0, str(ROOT / "scripts"))
    sys.path = [path for path in sys.path if Path(path) != Path(__file__).parent]  # its `gpu` and others are not ours
    import native_lora_check

    native_lora_check.import_host("--use-pytorch-cross-attention")
    import torch

    torch.set_num_threads(job["threads"])
    {"train": _train, "sample": _sample}[job["kind"]](job, turns)


if __name__ == "__main__":
    _main()
