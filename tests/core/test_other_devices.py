"""Rules for devices and systems that the tests do not run on: Apple's GPUs, AMD's, NVIDIA's before Ampere, Windows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("chroma_core", "nodes") for path in (ROOT / folder).rglob("*.py"))

NOT_ON_APPLE = {"float64", "double", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}
"""Metal has neither fp64 nor fp8."""

ON_THE_CPU = {
    ("data/order.py", "uniform"): "a random number",
    ("checkpoints/merge.py", "norms_on"): "weights from a file",
    ("lora/files.py", "_oft"): "a LoRA file",
    ("lora/lowrank.py", "*"): "a LoRA file, or weights where `extract_lora` asks first",
    ("lora/report.py", "update_norm"): "a LoRA file",
    ("model/quantised.py", "_e4m3"): "made on the CPU, moved as fp32",
    ("parity/case.py", "compare"): "results",
    ("parity/case.py", "psnr"): "results",
    ("sampling/schedule.py", "*"): "levels of noise",
    ("training/distributed/world.py", "*"): "sums over gloo, and a carrier that NCCL alone uses",
    ("training/step/objective.py", "heldout_loss"): "sums, moved before",
    ("training/step/objective.py", "pair_noise"): "a batch before it is moved",
    ("weights/gguf_files.py", "*"): "names of dtypes in files",
    ("weights/safetensors_files.py", "*"): "names of dtypes in files",
    ("weights/quant_formats.py", "*"): "names of dtypes in files",
    ("weights/stored_tensors.py", "scheme"): "the name of a dtype in files",
    ("model/backends/torchao.py", "*"): "an operation that refuses other devices",
    ("model/backends/quanto.py", "*"): "an operation that refuses other devices",
}
ASKS_FIRST = {
    ("model/eight_bits.py", "_dtype"),
    ("lora/modules.py", "turn"),
    ("model/quantised.py", "_dequantise_rows"),
    ("model/quantised.py", "dequantise_into"),
    ("model/quantised.py", "_e4m3_codes"),
    ("model/transformer.py", "rotary_table"),
}
"""These look at the device before they use such a dtype."""

CUDA_ROOMS = {
    *("model/device.py", "model/four_bits.py", "memory/machine.py"),
    *("streaming/movers.py", "training/distributed/world.py"),
}
"""Files that may speak to torch.cuda, which on ROCm is AMD's, and nowhere else there is."""

POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_CALLS = {"fork", "getuid", "geteuid", "getgid", "killpg", "setsid", "statvfs", "sched_getaffinity", "mkfifo"}


def uses(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, ast.Attribute]]:
    """Attributes of these names with the function that they stand in."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Attribute]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield function, node
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return walk(tree, "")


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    found = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    return {name.removeprefix("chroma_core/"): tree for name, tree in found.items()}


def test_dtypes_that_apple_lacks_stay_off_the_device(trees):
    found = {(name, function) for name, tree in trees.items() for function, _ in uses(tree, NOT_ON_APPLE)}
    known = {*ON_THE_CPU, *ASKS_FIRST}
    unknown = {place for place in found if place not in known and (place[0], "*") not in known}
    assert not unknown, "move it to the CPU before, or ask for the device's type; then list it here"
    assert all(place in found for place in known if place[1] != "*"), "a place that is gone stays listed"


def test_only_a_few_files_speak_to_cuda(trees):
    def asks(tree: ast.Module) -> bool:
        return any(getattr(node.value, "id", "") == "torch" for _, node in uses(tree, {"cuda"}))

    assert {name for name, tree in trees.items() if asks(tree)} == CUDA_ROOMS


def test_bf16_is_asked_for_without_emulation(trees):
    """torch says yes for every card of the last ten years unless it is asked so."""
    calls = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "is_bf16_supported"
    ]
    assert calls
    for call in calls:
        assert [(key.arg, key.value.value) for key in call.keywords] == [("including_emulation", False)]


def test_nothing_that_only_posix_has_is_on_a_users_path(trees):
    for name, tree in trees.items():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_MODULES & set(modules), name
        calls = {function for function, node in uses(tree, POSIX_CALLS) if getattr(node.value, "id", "") == "os"}
        # `_own_signals` is asked for on POSIX only.
        assert calls <= ({"_own_signals"} if name == "comfy/server.py" else set()), name
