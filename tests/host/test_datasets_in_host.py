"""Data sets from nodes: images that other nodes give, several sets in one job, every option of a set as a widget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from _host import Host
from _workflows import change, load_api
from chroma_core.data.dataset import DatasetConfig
from chroma_core.data.scan import scan
from prompts import dataset, job_of, message_of, node, train
from waiting import until

ENDED = ("completed", "failed", "stopped")


def ended(server: Host, job: str) -> dict:
    """The job's status when it has ended well."""
    status = until(lambda: (now := server.get(f"/chromakit/jobs/{job}"))["state"] in ENDED and now, f"{job}'s end")
    assert status["state"] == "completed", status["message"]
    return status


@pytest.fixture(scope="module")
def photos(server: Host) -> Iterator[list[np.ndarray]]:
    """Two images of different sizes, one with transparency, as files that the host's Load Image reads."""
    random = np.random.default_rng(5)
    first = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    second = random.integers(0, 256, (64, 128, 4), dtype=np.uint8)
    second[..., 3] = 255
    second[:, :64, 3] = 0
    for name, pixels in (("first", first), ("second", second)):
        Image.fromarray(pixels).save(server.base / "input" / f"{name}.png")
    yield [first, second[..., :3]]


def loaded() -> dict:
    """The two images, a batch of twice the first, masks for that, and a batch of three."""
    return {
        "first": node("LoadImage", image="first.png"),
        "second": node("LoadImage", image="second.png"),
        "twice": node("ImageBatch", image1=["first", 0], image2=["first", 0]),
        "two masks": node("ImageToMask", image=["twice", 0], channel="red"),
        "solid": node("EmptyImage", width=64, height=64, batch_size=3, color=0xFF0000),
    }


def from_images(captions: object = "a sks", images: object = ("first", 0), **inputs: object) -> dict:
    """A prompt with a data set from images; only the nodes that it uses."""
    settings = {"trigger": "sks", "resolution": 0, "repeats": 1, "caption_dropout": 0.1}
    made = node(
        "ChromaDatasetFromImages",
        images=list(images) if isinstance(images, tuple) else images,
        captions=list(captions) if isinstance(captions, tuple) else captions,
        **{**settings, **{key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()}},
    )
    return {**loaded(), "dataset": made}


def stored(server: Host) -> set[Path]:
    return set((server.base / "output" / "chromakit" / "datasets").glob("*"))


def summary_of(server: Host, prompt: dict) -> str:
    return server.run(prompt)["outputs"]["dataset"]["text"][0]


def folder_in(server: Host, text: str) -> Path:
    """The folder that a summary names."""
    (line,) = [line for line in text.splitlines() if line.startswith("kept in ")]
    return server.base / (line.removeprefix("kept in ").rsplit(" (", 1)[0])


def images_in(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("?????.png"))]


def test_an_image_is_kept_bit_for_bit_with_its_caption(server: Host, photos: list[np.ndarray]):
    history = server.run(from_images("a sks on a table"))
    (text,) = history["outputs"]["dataset"]["text"]
    folder = folder_in(server, text)
    (kept,) = images_in(folder)
    assert np.array_equal(kept, photos[0]) and (folder / "00000.txt").read_text() == "a sks on a table"
    assert folder.is_relative_to(server.base / "output" / "chromakit" / "datasets")
    assert "1 images" in text and "such folder" in text and " kB" in text
    (sheet,) = server.images(history, "temp")
    assert sheet.width == 256 and np.asarray(sheet).std() > 10


def test_a_batch_takes_one_line_of_caption_an_image(server: Host, photos: list[np.ndarray]):
    folder = folder_in(server, summary_of(server, from_images("one\n\ntwo\nthree\n", ("solid", 0))))
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == ["one", "two", "three"]
    folder = folder_in(server, summary_of(server, from_images("for all", ("solid", 0))))
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == ["for all"] * 3


def test_a_list_of_images_may_have_several_sizes_and_a_list_of_captions(server: Host, photos: list[np.ndarray]):
    (server.base / "input" / "pairs").mkdir(exist_ok=True)
    for name in ("first", "second"):
        Image.open(server.base / "input" / f"{name}.png").save(server.base / "input" / "pairs" / f"{name}.png")
        (server.base / "input" / "pairs" / f"{name}.txt").write_text(f"the {name} sks")
    prompt = from_images(("pairs", 1), ("pairs", 0))
    prompt["pairs"] = node("LoadImageTextDataSetFromFolder", folder="pairs")
    text = summary_of(server, prompt)
    folder = folder_in(server, text)
    found = scan(DatasetConfig.parse({"folder": str(folder)}))
    assert [(item.width, item.height, item.captions) for item in found.items] == [
        (64, 64, ("the first sks",)),
        (128, 64, ("the second sks",)),
    ]
    assert "2 images, 2 different captions" in text


def test_masks_become_mask_files_and_a_black_one_is_none(server: Host, photos: list[np.ndarray]):
    text = summary_of(server, from_images(images=("second", 0), masks=("second", 1)))
    folder = folder_in(server, text)
    mask = np.asarray(Image.open(folder / "00000-masklabel.png"))
    assert mask.shape == (64, 128) and (mask[:, :64] == 255).all() and (mask[:, 64:] == 0).all()
    assert "1 with a mask" in text
    text = summary_of(server, from_images(images=("first", 0), masks=("first", 1)))
    assert not list(folder_in(server, text).glob("*masklabel*")), (
        "Load Image gives a black mask for an image without one"
    )


MISTAKES = {
    "one caption too few": (("one\ntwo", ("solid", 0)), {}, "3 images, but the caption text has 2 lines"),
    "no caption": (("", ("solid", 0)), {}, "There is no caption"),
    "masks of another number": (("a", ("solid", 0)), {"masks": ("two masks", 0)}, "3 images and 2 masks"),
    "a mask of another shape": (("a", ("first", 0)), {"masks": ("second", 1)}, "Mask 1 is 128×64, but its image"),
    "a size in words": (("a", ("first", 0)), {"more_resolutions": "large"}, "more_resolutions is “large”"),
    "a trigger that is missing": (("a [trigger]", ("first", 0)), {"trigger": ""}, "no trigger word is set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(server: Host, photos: list[np.ndarray], mistake: str):
    arguments, inputs, expected = MISTAKES[mistake]
    assert expected in message_of(server, from_images(*arguments, **inputs))
    assert server.alive()


def test_captions_may_be_left_out_on_purpose(server: Host, photos: list[np.ndarray]):
    text = summary_of(server, from_images("", missing_caption="empty"))
    assert "trained with an empty one" in text


def test_images_that_change_nothing_are_the_same_job_and_come_back_when_deleted(server: Host, photos: list[np.ndarray]):
    def prompt() -> dict:
        return {**train("from nodes", dataset=["dataset", 0]), **from_images("a sks\na sks again", ("twice", 0))}

    job = job_of(server.run(prompt()))
    status = ended(server, job)
    folder = server.base / status["config"]["dataset"]["folder"]
    assert folder in stored(server) and (server.base / status["lora_path"]).is_file() and status["step"] == 4
    server.forget_cached_outputs()
    before = stored(server)
    assert job_of(server.run(prompt())) == job and stored(server) == before

    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert job_of(server.run(prompt())) == job and len(images_in(folder)) == 2, "written again, not replayed"
    (folder / "00000.txt").write_text("changed by hand")
    assert job_of(server.run(prompt())) == job and (folder / "00000.txt").read_text() == "a sks"
    server.run(prompt())
    assert {"dataset", "train"} <= server.nodes_replayed(server.run(prompt())), "and then it is left alone"

    other = prompt()
    other["dataset"]["inputs"]["captions"] = "a sks\nanother one"
    assert job_of(server.run(other)) != job


def combined(**inputs: object) -> dict:
    return {
        "main": dataset(trigger="sks", weight=2.0),
        "ordinary": from_images("a red square", ("solid", 0), trigger="", regularisation=True, sigma_bias=0.5)[
            "dataset"
        ],
        "solid": node("EmptyImage", width=64, height=64, batch_size=3, color=0xFF0000),
        "dataset": node(
            "ChromaCombineDatasets",
            **{"dataset_1": ["main", 0], "dataset_2": ["ordinary", 0], "weight_1": 1.0, "weight_2": 0.5, **inputs},
        ),
    }


def test_a_regularisation_set_reaches_the_job_with_its_weight(server: Host):
    prompt = {**train("regularised", steps=3, dataset=["dataset", 0]), **combined()}
    prompt["words"] = node("PreviewAny", source=["dataset", 1])
    history = server.run(prompt)
    config = ended(server, job_of(history))["config"]
    (other,) = config["more_datasets"]
    assert (config["dataset"]["trigger"], config["dataset"]["weight"]) == ("sks", 2.0)
    assert (other["regularisation"], other["weight"], other["sigma_bias"], other["trigger"]) == (True, 0.5, 0.5, "")
    (words,) = history["outputs"]["words"]["text"]
    assert "each image 4 times an epoch, main" in words and "weight 0.5, each image once an epoch" in words


def test_combined_sets_may_be_chained(server: Host):
    prompt = {**train("chained", steps=1, dataset=["more", 0], validation_dataset=["heldout", 0]), **combined()}
    prompt["heldout"] = dataset("sks_emblem_heldout")
    prompt["more"] = node(
        "ChromaCombineDatasets", dataset_1=["dataset", 0], dataset_2=["main", 0], weight_1=0.5, weight_2=1.0
    )
    config = ended(server, job_of(server.run(prompt)))["config"]
    assert [config["dataset"]["weight"], *(one["weight"] for one in config["more_datasets"])] == [1.0, 0.25, 2.0]
    assert config["validation_dataset"]["folder"].endswith("sks_emblem_heldout")


def test_sets_that_do_not_fit_their_place_are_explained(server: Host):
    swapped = combined(dataset_1=["ordinary", 0], dataset_2=["main", 0])
    assert "is a regularisation set" in message_of(
        server, {**swapped, "show": node("PreviewAny", source=["dataset", 1])}
    )
    alone = {**train("alone"), **combined()}
    alone["train"]["inputs"]["dataset"] = ["ordinary", 0]
    assert "is a regularisation set" in message_of(server, alone)
    measured = {**train("measured", dataset=["main", 0], validation_dataset=["dataset", 0]), **combined()}
    assert "measured on one" in message_of(server, measured)


def test_every_option_of_a_set_is_a_widget_and_reaches_the_job(server: Host):
    info = server.get("/object_info/ChromaDataset")["ChromaDataset"]["input"]
    offered = info["required"] | info["optional"]
    assert set(DatasetConfig.model_fields) - set(offered) == {"resolutions"}, "resolution and more_resolutions"
    values = {
        "weight": 0.25, "sigma_bias": -0.5, "latents": "sample", "posterior_samples": 2, "crop": "random",
        "random_crops": 2, "mask_floor": 0.25, "background": "black", "caption_extension": "txt",
        "caption_column": "words", "repeat_folders": False,
    }  # fmt: skip
    prompt = {**train("every option", steps=1), "dataset": dataset(**values)}
    config = ended(server, job_of(server.run(prompt)))["config"]["dataset"]
    assert {name: config[name] for name in values} == values | {"caption_extension": ".txt"}
    for node_id in ("ChromaDataset", "ChromaDatasetFromImages"):
        info = server.get(f"/object_info/{node_id}")[node_id]["input"]["optional"]
        assert all(info[name][1].get("advanced") for name in values if name in info)


def test_the_folder_is_looked_at_again_when_anything_in_it_changes(server: Host):
    """Metadata, masks, captions with another extension, sub-folders; for a folder whose images lie in sub-folders."""
    folder = server.base / "input" / "kohya"
    (folder / "2_dog").mkdir(parents=True)
    Image.effect_noise((64, 64), 80).save(folder / "2_dog" / "a.png")
    (folder / "2_dog" / "a.caption").write_text("a dog")
    options = server.get("/object_info/ChromaDataset")["ChromaDataset"]["input"]["required"]["folder"][1]["options"]
    assert "kohya" in options

    def text(**inputs: object) -> str:
        return summary_of(server, {"dataset": dataset("kohya", masks="files", caption_extension=".caption", **inputs)})

    assert "2 uses in an epoch" in text()
    (folder / "2_dog" / "a.caption").write_text("a dog\nanother dog")
    assert "2 different captions" in text()
    Image.new("L", (64, 64), 255).save(folder / "2_dog" / "a-masklabel.png")
    assert "1 with a mask" in text()
    (folder / "3_cat").mkdir()
    Image.effect_noise((64, 64), 80).save(folder / "3_cat" / "b.png")
    (folder / "3_cat" / "b.caption").write_text("a cat")
    assert "2 images" in text()
    (folder / "3_cat").rename(folder / "4_cat")
    assert "6 uses in an epoch" in text()
    rows = [{"file_name": "2_dog/a.png", "text": "one"}, {"file_name": "4_cat/b.png", "text": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "2 different captions" in text(caption_source="metadata")
    rows[1]["text"] = "one"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "1 different captions" in text(caption_source="metadata")


@pytest.mark.parametrize("name", ["chroma_train_from_images", "chroma_train_with_regularisation"])
def test_the_example_workflows_train(server: Host, name: str):
    prompt = change(load_api(name), "ChromaTrainLora", steps=2, preview_prompt="")
    prompt = change(prompt, "ChromaSampler", steps=1)
    history = server.run(prompt)
    (job,) = {job for output in history["outputs"].values() for job in output.get("chromakit_job", ())}
    config = ended(server, job)["config"]
    assert len(config["more_datasets"]) == (name == "chroma_train_with_regularisation")
