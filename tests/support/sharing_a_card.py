"""A job's slot on the simulated card, beside another thread that wants it: what is where, and what was copied.

Run by tests/core/test_simulated_card.py; prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading

import torch

from chroma_core.lora.adapters import without_adapters
from chroma_core.lora.settings import LoraSettings
from chroma_core.lora.trainable import add_trainable
from chroma_core.model.device import OwnMemory
from chroma_core.model.precision import precision, quantise
from chroma_core.streaming import module_bytes
from chroma_core.training.control import Control, DeviceSlot, Loan
from chroma_core.training.run.stepper import Stepper
from chroma_core.training.step.ema import Ema
from chroma_core.training.step.optimizers import OptimizerSettings
from miniature import transformer
from training_cases import at_the_gate
from waiting import PATIENCE, stays, until

CARD = torch.device("cuda")


def counted() -> dict[str, int]:
    torch.cuda.synchronize()
    library = ctypes.CDLL(os.environ["NULL_GPU_LIBRARY"])
    names = {"up": "null_h2d", "down": "null_d2h"}
    for name in names.values():
        getattr(library, name).restype = ctypes.c_size_t
    return {key: getattr(library, name)() for key, name in names.items()}


def copied(work) -> dict[str, int]:
    before = counted()
    work()
    return {key: now - before[key] for key, now in counted().items()}


def main() -> None:
    model = transformer()
    quantise(model, precision("int8"))
    model.requires_grad_(False)
    parameters = add_trainable(model, LoraSettings(rank=2), seed=1)
    model.to(CARD)
    stepper, average = Stepper(parameters, OptimizerSettings()), Ema(parameters, 0.9)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    stepper.apply(1e-4, 0.0)
    beside = [*stepper.tensors(), *average.tensors()]
    more = sum(each.numel() * each.element_size() for each in beside if each.is_cuda)
    trained = more + sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def follow() -> None:
        stepper.follow()
        average.follow()

    busy, there_is_room = threading.Event(), threading.Event()
    asked: list[int] = []

    def ask_room(needed: int):
        asked.append(needed)
        return there_is_room.is_set

    def plain():
        return without_adapters(model)

    control = Control(busy.is_set)
    slot = control.slot = DeviceSlot(CARD, ask_room)
    slot.take(model, Loan("base", plain), follow)
    weights = slot.device_bytes()
    own = own_memory(weights)
    steps = threading.Semaphore(0)

    def look() -> None:
        for parameter in model.parameters():
            assert parameter.device.type == "cuda"

    worker = at_the_gate(control, steps, look)
    assert steps.acquire(timeout=PATIENCE)
    found = {"weights": weights, "trained": trained, "beside": more, "own": own, "rounds": []}
    for _ in range(3):
        busy.set()
        lent = {}

        def borrow(lent=lent) -> None:
            with slot.lend("base"):
                lent["bytes"] = slot.device_bytes()

        borrowed = copied(borrow)
        left = copied(lambda: slot.make_leave())
        gone = slot.device_bytes() + module_bytes(model).get("cuda:0", 0)
        gone += sum(each.numel() for each in (*stepper.tensors(), *average.tensors()) if each.is_cuda)
        there_is_room.clear()
        busy.clear()
        until(lambda: asked, "the question for room")

        def come_back() -> None:
            there_is_room.set()
            until(lambda: not slot.away, "the job on the card again")

        back = copied(come_back)
        while steps.acquire(blocking=False):
            pass
        assert steps.acquire(timeout=PATIENCE)
        round_ = {"borrowed": borrowed, "lent": lent["bytes"], "left": left, "gone": gone, "back": back}
        found["rounds"].append({**round_, "asked": asked.pop()})
    control.stop.set()
    worker.join(PATIENCE)
    found["came_back"] = wait_for_others(slot)
    print(json.dumps(found))


def own_memory(held: int) -> list[tuple[int, int]]:
    """What a job that has `held` bytes, and takes 32 MiB more, is said to have, beside 256 MiB of somebody else's."""
    memory = OwnMemory(CARD, lambda: held)
    theirs = torch.empty(256 << 20, dtype=torch.uint8, device=CARD)
    memory.begin(0)
    ours = torch.empty(32 << 20, dtype=torch.uint8, device=CARD)
    del ours
    found = [memory.read(0)]
    more = theirs.clone()
    found.append(memory.read(1))  # it came while the job waited
    del theirs, more
    memory.begin(1)
    found.append(memory.read(1))
    return [(each.get("device", held) - held, each["device_peak"] - held) for each in found]


def wait_for_others(slot: DeviceSlot) -> bool:
    """A job that ran out of memory stays away while another program has it; whether it comes back after."""
    slot.step_aside()
    free, _ = torch.cuda.mem_get_info()
    theirs = torch.empty(free - free % 2**21, dtype=torch.uint8, device=CARD)
    slot.rest_seconds = 0.5
    stays(lambda: not slot.ready(1), "the job away from a full card", 1.0)
    del theirs
    torch.cuda.empty_cache()
    until(lambda: slot.ready(1), "the job on the card again")
    return not slot.away


if __name__ == "__main__":
    main()
