"""Chroma Inspect LoRA and Chroma Convert LoRA in the real host, and the warning about another base."""

import json

import pytest
from PIL import Image

from _host import Host
from chroma_core.loading.load import transformer_outline
from chroma_core.loading.spec import ModelSpec
from chroma_core.lora.files import read_lora, write_lora
from chroma_core.lora.modules import LoraFile
from chroma_core.model.images import png_bytes
from lora_cases import equal, random_lora
from prompts import load, node

OTHER_BASE = {"chromakit.base_sha256": "0" * 64, "chromakit.flavour": "hd", "chromakit.trigger": "sks"}


@pytest.fixture(scope="module")
def lora(server: Host) -> str:
    """A LoRA for tiny that says it was trained on another base, by the host's name for it."""
    outline = transformer_outline(ModelSpec("tiny", precision="fp32"))
    made = random_lora(outline, "all", rank=2, alpha=3.0, size=0.1)
    path = server.base / "output" / "loras" / "from elsewhere.safetensors"
    write_lora(path, LoraFile(made.modules, OTHER_BASE))
    return path.name


def test_the_host_reads_an_image_that_carries_our_record(server: Host):
    """A training preview: its text chunk is of our name, so neither the host nor its page takes it for a workflow."""
    record = {"prompt": "ä sks emblem", "recipe": {"name": "canonical"}}
    (server.base / "input" / "preview.png").write_bytes(png_bytes(Image.new("RGB", (64, 32), (9, 8, 7)), record))
    prompt = {
        "read": node("LoadImage", image="preview.png"),
        "save": node("SaveImage", images=["read", 0], filename_prefix="t"),
    }
    (image,) = server.images(server.run(prompt))
    assert image.size == (64, 32) and image.getpixel((0, 0)) == (9, 8, 7)
    with Image.open(server.base / "input" / "preview.png") as ours:
        assert set(ours.info) == {"chromakit"} and json.loads(ours.info["chromakit"]) == record


def shown(history: dict, key: str) -> str:
    return history["outputs"][key]["text"][0]


def test_inspect_shows_report_and_heat_map(server: Host, lora: str):
    prompt = {**load(), "look": node("ChromaInspectLora", lora=lora, model=["load", 0])}
    history = server.run(prompt)
    text = shown(history, "look")
    assert "target: all" in text and "rank 2, alpha 3" in text and "trigger: sks" in text
    assert (
        "WARNING: The LoRA was trained on another base: on hd (sha256 000000000000…), while this model is tiny" in text
    )
    (image,) = server.images(history, kind="temp")
    assert image.width >= 360 and len(image.getcolors(1 << 24)) > 20


def test_convert_then_inspect_and_apply(server: Host, lora: str):
    prompt = {
        **load(),
        "convert": node("ChromaConvertLora", lora=lora, dialect="ai-toolkit", dtype="fp32", filename=""),
        "look": node("ChromaInspectLora", lora="none", lora_model=["convert", 0]),
        "apply": node("ChromaApplyLora", model=["load", 0], lora="none", strength=0.5, lora_name=["convert", 1]),
        "said": node("PreviewAny", source=["apply", 1]),
    }
    history = server.run(prompt)
    folder = server.base / "output" / "loras"
    path = folder / "from elsewhere-ai-toolkit.safetensors"
    read = read_lora(path)
    assert json.loads(read.metadata["chromakit.converted_from"])["file"] == lora
    assert "native key format" in shown(history, "look") and "base: not stated" in shown(history, "look")
    report = shown(history, "said")
    assert "WARNING: The LoRA was trained on another base" in report and f"{len(read.modules)} layers matched" in report
    assert "trained on another base" in server.log_tail(200)
    assert (
        lora in server.get("/object_info/ChromaApplyLora")["ChromaApplyLora"]["input"]["required"]["lora"][1]["options"]
    )
    before = path.stat().st_mtime_ns
    server.forget_cached_outputs()
    server.run(prompt)
    assert path.stat().st_mtime_ns == before and len(list(folder.glob("from elsewhere-ai-toolkit*"))) == 1
    back = node("ChromaConvertLora", lora=path.name, dialect="universal", dtype="keep", filename="back")
    server.run({"convert": back})
    assert equal(read_lora(folder / "back.safetensors"), read)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"lora": "none"}, "No LoRA is chosen"),
        ({"lora": "absent.safetensors"}, "no LoRA file 'absent.safetensors'"),
        ({"filename": "from elsewhere"}, "exists already"),
        ({"filename": "../../escape", "dialect": "webui"}, "Value not in list"),
    ],
)
def test_bad_input_is_explained(server: Host, lora: str, inputs: dict, says: str):
    values = {"lora": lora, "dialect": "kohya", "dtype": "keep", "filename": ""} | inputs
    if values["filename"] == "from elsewhere":
        (server.base / "output" / "loras" / "from-elsewhere.safetensors").write_bytes(b"someone's")
    with pytest.raises(Exception, match=says) as error:
        server.run({"convert": node("ChromaConvertLora", **values)})
    assert "Traceback" not in str(error.value)
