"""What is said of a dataset, as sentences in English that a page can say in another language, too."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import TypedDict

REMARKS = {
    # of an image that is trained, in a few words that fit below a thumbnail
    "twin_of": "same image as {name}",
    "twin_first": "more than once in this set",
    "tiny": "tiny: {size}",
    "tiny_enlarged": "tiny: {size}, enlarged",
    "small": "small: {size}",
    "small_enlarged": "small: {size}, enlarged",
    "default_used": "no caption: default used",
    "captionless": "no caption",
    "shared_caption": "{count} images have this caption",
    "maskless": "no mask: all of it is trained",
    "folder_repeats": "{count} repeats by its folder's name",
    # why an image is skipped
    "zero_repeats": "its folder's name says 0 repeats",
    "unreadable": "unreadable image: {why}",
    "half_character": "its caption has half a character (a lone surrogate)",
    "caption_no_text": "its caption file is not UTF-8 text",
    "caption_fault": "its caption file is {why}",
    "no_caption": "no caption in {source}",
    "save": "{ending} files are not read. Save it as PNG or JPEG.",
    "convert": "{ending} files are not read. Convert it.",
    "save_or_install": "{ending} files are not read. Save it as PNG or JPEG, or install {plugin} for ComfyUI.",
    "convert_or_install": "{ending} files are not read. Convert it, or install {plugin} for ComfyUI.",
    # of the whole
    "one_skipped": "1 image was skipped: {files}.",
    "skipped": "{count} images were skipped: {files}.",
    "default_captions": "{count} without a caption use the default caption.",
    "empty_captions": "{count} without a caption are trained with an empty one.",
    "left_out": "{count} without a caption are left out.",
    "captions_elsewhere": "{count} have text in a file that is not read, such as {name}: rename these files, or set "
    "caption_extension (now '{extension}').",
    "same_stem": "{files} share one caption file with an image of the same name in another format.",
    "all_the_same": "All captions are the same: the LoRA cannot tell the concept from the rest of the image.",
    "often_the_same": "{count} times the same caption: “{caption}”.",
    "low_variety": "Prompt variety is low: {different} different captions for {images} images, on average {words} "
    "words that are not in nearly all of them. Say in each what is special about the image (place, pose, light, "
    "colours), or everything that all have in common is learned as one.",
    "twins": "Identical images ({count} too many): {files}.",
    "transparent": "{count} with transparency are laid over {background}.",
    "animated": "Of {files} with several frames or pages only the first is used.",
    "misnamed": "{files} of another format than the name says; read all the same.",
    "not_read": "{files} in a format that is not read; save as PNG or JPEG to use them.",
    "many_repeats": "{files} with {repeats} repeats or more from the folder's name; set repeat_folders to false if "
    "that number means something else.",
    "masks_unused": "{count} mask files are not used; set masks to 'files' to use them.",
    "masks_missing": "{count} without a mask are trained as a whole.",
    "below": "{count} smaller than the training resolution are trained at their own, smaller size, e.g. {name}.",
    "below_enlarged": "{count} smaller than the training resolution are enlarged, e.g. {name}.",
    "far_below": "{count} tiny (under a quarter of the training resolution's area), e.g. {name}.",
    "cramped": "{count} with a side below {pixels} pixels are enlarged, e.g. {name}.",
}
"""The sentences by their codes; the page has the same codes in locales/*/main.json."""


class Code(TypedDict):
    """Which sentence of `REMARKS`, and what stands in it."""

    code: str
    values: dict[str, str | int]


class Remark(str):
    """A sentence that knows its code. Copied or sent to another process, it is the sentence alone."""

    code: Code

    def __new__(cls, code: str, **values: str | int) -> Remark:
        made = super().__new__(cls, REMARKS[code].format(**values))
        made.code = {"code": code, "values": values}
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def codes_of(texts: Iterable[str]) -> dict[str, Code]:
    """The codes of those that have one, by the sentence."""
    return {text: text.code for text in texts if isinstance(text, Remark)}
