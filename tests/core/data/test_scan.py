"""Reading a dataset folder: what is used, what is skipped and named, what is refused."""

import os

import pytest
from PIL import Image

from chroma_core.data.contact_sheet import contact_sheet, summary, thumbnail
from chroma_core.data.images import UnreadableImage, image_facts, load_image
from chroma_core.data.scan import DatasetConfig, scan
from chroma_core.errors import ConfigError, DataError, PromptError
from training_cases import write_dataset


def read(folder, **options):
    return scan(DatasetConfig.parse({"folder": str(folder), **options}))


def test_items_come_in_order_with_size_caption_and_content_hash(tmp_path):
    write_dataset(tmp_path, 3, size=(96, 64))
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "sub" / "z.PNG")
    (tmp_path / "sub" / "z.txt").write_text("first line\n\n  second line \n")
    found = read(tmp_path)
    assert [item.name for item in found.items] == ["00.png", "01.png", "02.png", "sub/z.PNG"]
    assert (found.items[0].width, found.items[0].height) == (96, 64)
    assert found.items[3].captions == ("first line", "second line")
    assert len({item.sha256 for item in found.items}) == 4
    assert found.skipped == [] and found.warnings == []


def test_an_image_that_was_replaced_by_one_of_the_same_size_and_time_is_seen(tmp_path):
    """Hashes are remembered by what the file system says of a file, and that is not trusted in the first moments."""
    write_dataset(tmp_path, 1)
    (path,) = tmp_path.glob("*.png")
    body = path.read_bytes()
    seen = []
    for last in (b"\0", b"\1"):
        path.write_bytes(body + last)  # what follows an image's end is not decoded
        os.utime(path, (1_000_000_000, 1_000_000_000))
        seen.append(scan(DatasetConfig(folder=str(tmp_path))).items[0].sha256)
    assert seen[0] != seen[1]


def test_a_thumbnail_is_the_crop_of_the_image(tmp_path):
    """Also of a large JPEG, which is decoded at a fraction of its size."""
    image = Image.new("RGB", (1600, 800), "red")
    image.paste("blue", (800, 0, 1600, 800))
    image.save(tmp_path / "large.jpg", quality=95)
    found = scan(DatasetConfig(folder=str(tmp_path), default_caption="halves", resolution=512))
    small = thumbnail(found.items[0], found, 512, 100)
    assert small is not None and max(small.size) == 100
    left, right = small.getpixel((2, small.height // 2)), small.getpixel((small.width - 3, small.height // 2))
    assert left[0] > 240 > 20 > left[2] and right[2] > 240 > 20 > right[0]
    assert load_image(tmp_path / "large.jpg", least=200).size == (400, 200)


def test_hidden_folders_are_no_part_of_a_set(tmp_path):
    write_dataset(tmp_path, 1)
    write_dataset(tmp_path / ".thumbnails", 1)
    write_dataset(tmp_path / "sub" / ".cache" / "deep", 1)
    assert [item.name for item in read(tmp_path).items] == ["00.png"]


def test_a_folder_that_cannot_be_listed_is_an_error_that_says_why(tmp_path, monkeypatch):
    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("pathlib.Path.is_dir", stale)
    with pytest.raises(DataError, match="cannot be read: Stale file handle"):
        read(tmp_path)


def test_missing_and_empty_folder_are_errors(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="holds no image"):
        read(tmp_path)


def test_an_unreadable_image_is_named_skipped_and_counted(tmp_path):
    write_dataset(tmp_path, 3)
    (tmp_path / "01.png").write_bytes(b"this is not a picture")
    found = read(tmp_path)
    assert [item.name for item in found.items] == ["00.png", "02.png"]
    assert found.skipped == [("01.png", "unreadable image: not an image")]
    assert found.warnings == ["1 image was skipped: 01.png (unreadable image: not an image)."]


def test_no_usable_image_left_is_an_error_that_names_them(tmp_path):
    write_dataset(tmp_path, 2)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"None of the 2 images.*00\.png.*01\.png"):
        read(tmp_path)


def test_a_missing_caption_follows_the_chosen_rule(tmp_path):
    write_dataset(tmp_path, 3)
    (tmp_path / "01.txt").unlink()
    (tmp_path / "02.txt").write_text("  \n")
    skipping = read(tmp_path)
    assert len(skipping.items) == 1 and [name for name, _ in skipping.skipped] == ["01.png", "02.png"]
    default = read(tmp_path, default_caption="a picture")
    assert [item.captions for item in default.items] == [("a red circle",), ("a picture",), ("a picture",)]
    assert default.warnings == ["2 without a caption use the default caption."]
    assert read(tmp_path, missing_caption="empty", trigger="sks").items[1].captions == ("sks",)
    with pytest.raises(DataError, match=r"'01\.png'.*has no caption.*01\.txt"):
        read(tmp_path, missing_caption="error")
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    with pytest.raises(DataError, match="set a default caption"):
        read(tmp_path)


def test_the_trigger_word_is_replaced_or_put_in_front_once(tmp_path):
    write_dataset(tmp_path, 3)
    (tmp_path / "00.txt").write_text("[trigger] on a hill")
    found = read(tmp_path, trigger="sks")
    assert [item.captions[0] for item in found.items] == ["sks on a hill", "sks on a blue background", "sks a photo"]
    with pytest.raises(PromptError, match="trigger"):
        read(tmp_path)


def test_a_caption_that_is_not_text_is_skipped(tmp_path):
    write_dataset(tmp_path, 2)
    (tmp_path / "00.txt").write_bytes(b"\xff\xfe\x00broken")
    assert read(tmp_path).skipped == [("00.png", "its caption file is not UTF-8 text")]


def test_twins_and_monotony_are_remarked(tmp_path):
    write_dataset(tmp_path, 5)
    (tmp_path / "03.png").write_bytes((tmp_path / "00.png").read_bytes())
    for path in tmp_path.glob("*.txt"):
        path.write_text("sks")
    warnings = " ".join(read(tmp_path, resolution=512).warnings)
    assert "00.png = 03.png" in warnings
    assert "All captions are the same" in warnings
    assert "5 smaller than the training resolution are trained at their own, smaller size" in warnings


def test_options_are_strict_and_errors_readable():
    assert DatasetConfig.parse({"folder": "x", "resolution": 512}).resolutions == (512,)
    assert DatasetConfig.parse({"folder": "x", "resolution": 0}).sizes(64) == (64,)
    with pytest.raises(ConfigError, match="flipp is not a known option"):
        DatasetConfig.parse({"folder": "x", "flipp": True})
    with pytest.raises(ConfigError, match=r"caption_dropout.*found 2"):
        DatasetConfig.parse({"folder": "x", "caption_dropout": 2})
    with pytest.raises(ConfigError, match="alignment"):
        DatasetConfig.parse({"folder": "x", "alignment": 60})


def test_images_are_opened_as_a_person_sees_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    facts = image_facts(tmp_path / "turned.jpg")
    assert (facts.width, facts.height) == (20, 40) == load_image(tmp_path / "turned.jpg").size
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("I;16", (8, 8), 32896).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = load_image(tmp_path / "print.jpg").getpixel((4, 4))  # type: ignore[misc]
    assert red > 200 and green < 60 and blue < 60
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 90).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    facts = image_facts(tmp_path / "cut.jpg")
    assert (facts.width, facts.height) == (64, 64)
    with pytest.raises(UnreadableImage):
        load_image(tmp_path / "cut.jpg")


def test_contact_sheet_and_summary(tmp_path):
    write_dataset(tmp_path, 5, size=(128, 64))
    found = read(tmp_path, alignment=32, trigger="sks", repeats=2)
    sheet = contact_sheet(found.items, found, default_resolution=64, columns=3, cell=120)
    assert sheet.width == 360 and sheet.height > 240
    assert len(sheet.getcolors(100_000) or []) > 50
    text = summary(found, default_resolution=64)
    assert "5 images" in text and "trigger word “sks”" in text and "2 repeats" in text and "96×32: 5" in text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_never_read(tmp_path):
    """A pipe would keep whoever reads it waiting for ever."""
    write_dataset(tmp_path, 2)
    (tmp_path / "00.txt").unlink()
    os.mkfifo(tmp_path / "00.txt")
    os.mkfifo(tmp_path / "02.png")
    (tmp_path / "03.png").symlink_to("/dev/zero")
    found = read(tmp_path)
    assert [item.name for item in found.items] == ["01.png"]
    assert found.skipped == [
        ("00.png", "its caption file is no file but a folder, pipe, socket or device"),
        ("02.png", "unreadable image: not a file"),
        ("03.png", "unreadable image: not a file"),
    ]
