"""A job leaves the device while a prompt runs, comes back after, and trains on as if nothing had happened."""

import threading
from contextlib import nullcontext

import pytest
import torch

from chroma_core.streaming import module_bytes, stream_blocks, streamed
from chroma_core.training.control import Control, DeviceSlot, Loan
from miniature import transformer
from training_cases import at_the_gate
from waiting import PATIENCE, stays, until


def test_a_slot_moves_its_module_once_each_way():
    asked, there_is_room = [], threading.Event()

    def ask_room(needed):
        asked.append(needed)
        return there_is_room.is_set

    slot = DeviceSlot("cpu", ask_room)
    slot.step_aside()
    assert not slot.away, "there is nothing to move yet"
    model = transformer()
    stream_blocks(model, torch.device("cpu"))
    streamer = streamed(model)
    slot.take(model)
    assert streamer.device_bytes() > 0 and slot.ready() and asked == []
    slot.step_aside()
    slot.step_aside()
    assert slot.away and streamer.device_bytes() == 0
    size = sum(module_bytes(model).values())
    assert not slot.ready(100) and not slot.ready(100) and slot.away, "it waits for room, and asks once"
    there_is_room.set()
    assert slot.ready(100) and slot.ready() and not slot.away and streamer.device_bytes() > 0
    assert asked == [100 + size]
    slot.leave()
    slot.step_aside()
    assert not slot.away


@pytest.fixture
def gate():
    """A control whose worker passes its gate in a thread, with the switches in the test's hands."""
    busy = threading.Event()
    control = Control(busy.is_set)
    control.slot = DeviceSlot("cpu")
    control.slot.take(transformer())
    passed = threading.Semaphore(0)

    worker = at_the_gate(control, passed)
    yield control, busy, passed
    control.stop.set()
    worker.join(PATIENCE)


def test_the_job_rests_for_a_prompt_leaves_when_it_is_asked_to_and_returns(gate):
    control, busy, passed = gate
    assert passed.acquire(timeout=PATIENCE)
    busy.set()
    until(lambda: drained(passed))
    assert not control.slot.away, "nobody wants its place"
    assert control.slot.make_leave() and control.slot.away
    stays(lambda: control.slot.away, "away")
    busy.clear()
    until(lambda: not control.slot.away)
    assert passed.acquire(timeout=PATIENCE), "it goes on"


def drained(passed: threading.Semaphore) -> bool:
    """Whether the worker stands at its gate: it has not passed for a while."""
    while passed.acquire(blocking=False):
        pass
    return not passed.acquire(timeout=0.2)


def test_a_paused_job_that_left_comes_back_only_when_it_is_needed(gate):
    control, busy, _ = gate
    busy.set()
    assert control.slot.make_leave()
    control.pause.set()
    busy.clear()
    stays(lambda: control.slot.away, "away")
    control.pause.clear()
    until(lambda: not control.slot.away)


def test_a_job_that_computes_can_be_waited_for_in_vain_and_the_wait_be_cancelled(gate):
    control, busy, passed = gate
    held = threading.Event()
    control.busy = lambda: held.wait(PATIENCE) and busy.is_set()  # a step that takes its time
    until(lambda: drained(passed))
    assert not control.slot.make_leave(seconds=0)

    def cancelled():
        raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        control.slot.make_leave(cancelled)
    held.set()


def test_the_base_is_lent_while_the_job_rests(gate):
    control, busy, passed = gate
    slot, model = control.slot, transformer()
    slot.take(model, Loan("key", lambda: nullcontext(model)))
    with slot.lend("another key") as nothing:
        assert nothing is None
    busy.set()
    with slot.lend("key") as lent:
        assert lent is model and not slot.make_leave(), "whoever borrows it cannot want it to leave"
        busy.clear()
        assert drained(passed), "the job waits for what it lent"
    assert passed.acquire(timeout=PATIENCE)
    busy.set()
    assert slot.make_leave()
    with slot.lend("key") as lent:
        assert lent is model and not slot.away, "it comes back to be lent"
    slot.leave()
    with slot.lend("key") as nothing:
        assert nothing is None
