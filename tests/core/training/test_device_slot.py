"""A job leaves the device while a prompt runs, comes back after, and trains on as if nothing had happened."""

import threading
import time

import pytest
import torch

from chroma_core.streaming import stream_blocks, streamed
from chroma_core.training.control import Control, DeviceSlot, Stopped
from miniature import transformer


def test_a_slot_moves_its_module_once_each_way():
    made_room = []
    slot = DeviceSlot("cpu", make_room=lambda: made_room.append(1))
    slot.step_aside()
    assert not slot.away, "there is nothing to move yet"
    model = transformer()
    stream_blocks(model, torch.device("cpu"))
    streamer = streamed(model)
    with slot.taken_by(model):
        assert streamer.device_bytes() > 0
        slot.step_aside()
        slot.step_aside()
        assert slot.away and streamer.device_bytes() == 0 and made_room == []
        slot.come_back()
        slot.come_back()
        assert not slot.away and streamer.device_bytes() > 0 and made_room == [1]
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

    def work():
        try:
            while True:
                control.gate()
                passed.release()
                time.sleep(0.005)
        except Stopped:
            pass

    worker = threading.Thread(target=work)
    worker.start()
    yield control, busy, passed
    control.stop.set()
    worker.join(10)


def until(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_the_job_steps_aside_for_a_prompt_and_returns(gate):
    control, busy, passed = gate
    assert passed.acquire(timeout=10) and not control.slot.away
    busy.set()
    assert until(lambda: control.slot.away)
    busy.clear()
    assert until(lambda: not control.slot.away)
    while passed.acquire(blocking=False):
        pass
    assert passed.acquire(timeout=10), "it goes on"


def test_a_paused_job_that_left_comes_back_only_when_it_is_needed(gate):
    control, busy, passed = gate
    busy.set()
    assert until(lambda: control.slot.away)
    control.pause.set()
    busy.clear()
    time.sleep(0.1)
    assert control.slot.away
    control.pause.clear()
    assert until(lambda: not control.slot.away)
