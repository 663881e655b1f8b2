"""Held prompts, on the host's own queue class: nothing is lost or woken for nothing, nothing else is changed."""

from __future__ import annotations

import ast
import random
import threading
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from _environment import host_folder
from waiting import stays

NEEDS = """
import copy, heapq, threading
from typing import List, Literal, NamedTuple, Optional
MAXIMUM_HISTORY_SIZE = 10000
"""
LONG = 1000.0
"""Seconds for which the host's worker waits when it has nothing to do."""
AT_ONCE = 5.0
"""Seconds within which a busy machine does what another does at once."""


def module(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def holding(root: Path) -> ModuleType:
    """nodes/host/holding.py alone: its package is for the host's process."""
    return module(root / "nodes" / "host" / "holding.py")


@pytest.fixture(scope="module")
def queue_class(tmp_path_factory: pytest.TempPathFactory) -> type:
    """The host's PromptQueue, cut out of its file: importing all of that takes twenty seconds."""
    text = (host_folder() / "execution.py").read_text(encoding="utf-8")
    (found,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "PromptQueue")
    path = tmp_path_factory.mktemp("queue") / "prompt_queue.py"
    path.write_text(NEEDS + ast.get_source_segment(text, found), encoding="utf-8")
    return module(path).PromptQueue


class Held:
    """A queue with a switch. Prompts whose id begins with "light" pass."""

    def __init__(self, holding: ModuleType, queue_class: type):
        self.on = False
        self.queue = queue_class(SimpleNamespace(queue_updated=lambda: None))
        assert holding.can_hold(self.queue)
        self.holding = holding.Holding(self.queue, lambda: self.on, lambda item: item[1].startswith("light"))
        assert not holding.can_hold(SimpleNamespace(get=lambda *args: None)), "whatever stands in already is left alone"

    def put(self, number: float, name: str) -> None:
        self.queue.put((number, name, {}, {}, [], {}))

    def take(self, timeout: float | None = 0.0) -> str | None:
        """What `get` gives. In a thread of its own: a lost wake-up fails the test and does not hang it."""
        found: list[Any] = []
        worker = threading.Thread(target=lambda: found.append(self.queue.get(timeout=timeout)), daemon=True)
        worker.start()
        worker.join(60)
        assert found, "get has not come back"
        return found[0] and found[0][0][1]

    def soon(self, then: Callable[[], Any], timeout: float | None = LONG) -> tuple[str | None, float]:
        """What a waiting worker gets out of something that happens, and how many seconds later."""
        happened: list[float] = []
        timer = threading.Timer(0.2, lambda: (happened.append(time.monotonic()), then()))
        timer.start()
        found = self.take(timeout)
        timer.join()
        return found, time.monotonic() - happened[0]

    def hold(self, on: bool) -> None:
        self.on = on
        self.holding.wake()


@pytest.fixture
def held(holding: ModuleType, queue_class: type) -> Held:
    return Held(holding, queue_class)


def test_with_nothing_held_it_is_the_hosts_own(held: Held):
    for number, name in ((2, "b"), (1, "a"), (-3, "front")):
        held.put(number, name)
    assert [held.take() for _ in range(4)] == ["front", "a", "b", None]
    started = time.monotonic()
    assert held.take(0.3) is None and 0.3 <= time.monotonic() - started < AT_ONCE
    assert held.soon(lambda: held.put(1, "late")) == ("late", pytest.approx(0, abs=AT_ONCE))
    assert held.soon(lambda: held.put(1, "late"), None)[0] == "late"
    assert held.soon(lambda: held.queue.set_flag("unload_models", True)) == (None, pytest.approx(0, abs=AT_ONCE))
    assert len(held.queue.currently_running) == 5


def test_errands_run_in_the_worker_before_the_next_prompt(held: Held):
    seen: list[str] = []
    names: list[str] = []
    asked = [held.holding.ask(lambda: names.append(threading.current_thread().name))]
    asked.append(held.holding.ask(lambda: 1 / 0))
    held.put(1, "a")
    assert not names and held.take() == "a" and len(names) == 1 and names[0] != threading.current_thread().name
    assert asked[0].done() and isinstance(asked[1].exception(), ZeroDivisionError)

    def late() -> None:
        held.holding.ask(lambda: seen.append("late")).result(AT_ONCE)
        held.put(1, "b")

    assert held.soon(late)[0] == "b" and seen == ["late"], "a worker that waits runs it at once"


def test_a_prompt_deleted_during_what_comes_before_it_does_not_run(holding: ModuleType, held: Held):
    told: list[str] = []

    def before(item: tuple, check: Callable[[], None]) -> None:
        told.append(item[1])
        check()
        if item[1] == "a":
            assert held.queue.delete_queue_item(lambda other: other[1] == "a")
        if item[1] == "b" and "front" not in told:
            held.put(0, "front")  # runs first, and has to be asked for, too
        check()

    held.queue.get = held.holding._take
    held.holding = holding.Holding(held.queue, lambda: False, lambda item: True, before)
    held.put(1, "a")
    held.put(2, "b")
    assert held.take() == "front" and told == ["a", "b", "front"]
    assert held.take() == "b" and held.take() is None


def test_what_fails_before_a_prompt_does_not_end_the_worker(holding: ModuleType, held: Held):
    told: list[str] = []

    def before(item: tuple, check: Callable[[], None]) -> None:
        told.append(item[1])
        raise RuntimeError("cancelled")

    held.queue.get = held.holding._take
    held.holding = holding.Holding(held.queue, lambda: False, lambda item: True, before)
    held.put(1, "a")
    assert held.take() == "a" and told == ["a"]


def test_held_prompts_wait_and_the_worker_still_wakes(held: Held):
    held.on = True
    held.put(1, "a")
    started = time.monotonic()
    assert held.take(0.3) is None and 0.3 <= time.monotonic() - started < AT_ONCE
    assert held.take(0.0) is None
    assert held.soon(lambda: held.queue.set_flag("unload_models", True)) == (None, pytest.approx(0, abs=AT_ONCE))
    assert (held.holding.count(), held.queue.get_tasks_remaining()) == (1, 1)
    assert held.soon(lambda: held.hold(False)) == ("a", pytest.approx(0, abs=AT_ONCE))
    held.on = True
    held.put(1, "b")
    assert held.soon(lambda: held.hold(False), None) == ("b", pytest.approx(0, abs=AT_ONCE)), "no timeout at all"


def test_a_wait_that_began_on_an_empty_queue_is_held_too(held: Held):
    def both() -> None:
        held.hold(True)
        held.put(1, "a")

    assert held.soon(both)[0] is None, "the host's own get would have handed it out"
    assert held.holding.count() == 1


def test_deleted_while_held(held: Held):
    held.on = True
    held.put(1, "a")
    held.put(2, "b")
    assert held.queue.delete_queue_item(lambda item: item[1] == "a")
    held.hold(False)
    assert [held.take(), held.take()] == ["b", None]


def test_what_passes_overtakes_and_the_order_of_the_others_stays(held: Held):
    draw = random.Random(5)
    numbers = draw.sample(range(1000), 200)
    names = {number: f"{'light' if number % 3 == 0 else 'heavy'}-{number}" for number in numbers}
    for number in numbers:
        held.put(number, names[number])
    held.on = True
    light = [names[number] for number in sorted(numbers) if number % 3 == 0]
    heavy = [names[number] for number in sorted(numbers) if number % 3]
    assert held.holding.count() == len(heavy)
    assert [held.take() for _ in light] == light and held.take() is None
    held.put(-1, "heavy-front")
    held.hold(False)
    assert [held.take() for _ in range(len(heavy) + 1)] == ["heavy-front", *heavy]


def test_equal_numbers_and_ids_do_not_end_the_worker(held: Held):
    held.on = True
    held.queue.queue = [(1, "a", {}, {}, [], {}), (1, "a", {}, {}, [], {}), (2, "light", {}, {}, [], {})]
    assert held.take() == "light" and held.take() is None


def test_nothing_is_lost_while_the_switch_flips(held: Held):
    """A worker as the host's, which waits for a long time: a wake-up that got lost would leave it stuck."""
    count, taken = 2000, []
    draw = random.Random(7)

    def produce() -> None:
        for number in range(count):
            held.put(number, f"heavy-{number}")
            if draw.random() < 0.05:
                time.sleep(0.001)

    def flip() -> None:
        while len(taken) < count:
            held.hold(True)
            time.sleep(0.0005)
            held.hold(False)
            time.sleep(0.0005)

    def work() -> None:
        while len(taken) < count:
            if name := held.take(LONG):
                taken.append(name)

    threads = [threading.Thread(target=each, daemon=True) for each in (work, produce, flip)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), f"stuck after {len(taken)} of {count}"
    assert sorted(taken) == sorted(f"heavy-{number}" for number in range(count))


def test_holding_costs_no_turns(held: Held):
    turns: list[str | None] = []
    held.on = True
    held.put(1, "a")
    worker = threading.Thread(target=lambda: turns.append(held.take(LONG)), daemon=True)
    worker.start()
    stays(lambda: turns == [] and worker.is_alive(), "held", 0.5)
    held.hold(False)
    worker.join(60)
    assert turns == ["a"]
