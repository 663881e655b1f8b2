"""A job leaves the device while a prompt runs, comes back after, and trains on as if nothing had happened."""

import threading

import pytest
import torch

from chroma_core.streaming import stream_blocks, streamed
from chroma_core.training.control import Control, DeviceSlot, Stopped
from miniature import transformer
from waiting import stays, until


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
                control.stop.wait(0.005)
        except Stopped:
            pass

    worker = threading.Thread(target=work)
    worker.start()
    yield control, busy, passed
    control.stop.set()
    worker.join(10)


def test_the_job_steps_aside_for_a_prompt_and_returns(gate):
    control, busy, passed = gate
    assert passed.acquire(timeout=10) and not control.slot.away
    busy.set()
    until(lambda: control.slot.away)
    busy.clear()
    until(lambda: not control.slot.away)
    while passed.acquire(blocking=False):
        pass
    assert passed.acquire(timeout=10), "it goes on"


def test_a_paused_job_that_left_comes_back_only_when_it_is_needed(gate):
    control, busy, passed = gate
    busy.set()
    until(lambda: control.slot.away)
    control.pause.set()
    busy.clear()
    stays(lambda: control.slot.away, "away")
    control.pause.clear()
    until(lambda: not control.slot.away)
