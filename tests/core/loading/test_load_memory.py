"""Memory, in a fresh process: loading takes one copy of a file of Chroma's real widths; what is freed is returned."""

import json
import platform
import sys
from pathlib import Path

import pytest

import forked
from chroma_core.weights.safetensors_files import write_safetensors
from real_widths import random_original

MEASURE = """
import json, resource, sys
import torch
from chroma_core.loading.load import load_transformer
from chroma_core.loading.spec import ModelSpec

def peak():
    # Not getrusage: its mark is inherited from the process that started this one.
    (line,) = (line for line in open('/proc/self/status') if line.startswith('VmHWM'))
    return int(line.split()[1]) * 1024

def now():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()

path, precision = sys.argv[1:]
# Whatever the first use of the libraries takes is not the load's.
load_transformer(ModelSpec('tiny', precision=precision), 'cpu')
before = now()
model = load_transformer(ModelSpec('base', transformer=path, precision=precision), 'cpu')
sizes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
print(json.dumps({'extra': peak() - before, 'model': sizes}))
"""


@pytest.fixture(scope="module")
def real_file(tmp_path_factory) -> Path:
    outline, layout, tensors = random_original(1, 1)
    path = tmp_path_factory.mktemp("real") / "chroma-1+1.safetensors"
    write_safetensors(path, layout.items(), tensors())
    parameters = sum(p.numel() for p in outline.parameters())
    assert 0.61e9 < parameters < 0.64e9 and path.stat().st_size > 2 * parameters
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 1.15), ("nf4", 1.15)])
def test_loading_takes_one_copy(real_file, precision, limit):
    """Extra peak memory ≤ 1.15 × a bf16 file; so does a quantised model (.73 and .60 of it)."""
    done = forked.run(forked.FULL, "-c", MEASURE, real_file, precision)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratio = found["extra"] / real_file.stat().st_size
    print(f"{precision}: {ratio:.3f} × the file, model {found['model'] / 2**20:.0f} MiB")
    assert ratio <= limit


FREED = """
import resource
import torch
from chroma_core.model.device import release_memory

def now():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20

made = [torch.ones(16 << 10) for _ in range(3200)]  # 64 KiB each, which the C library takes from its heap
full = now()
made[:-1] = []  # the last one lies above the others
release_memory()
print(full - now())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_was_freed_in_pieces_goes_back_to_the_system():
    done = forked.run(forked.LIGHT, "-c", FREED)
    assert int(done.stdout or 0) > 190, done.stderr
