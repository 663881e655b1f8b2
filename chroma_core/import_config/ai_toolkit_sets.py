"""ai-toolkit's YAML: what each option of a data set becomes."""

from __future__ import annotations

from . import ai_toolkit_convert as convert
from .ai_toolkit import CACHE, NOT_BUILT
from .rules import (
    Outcome,
    Same,
    Table,
    choice,
    custom,
    ignored_all,
    lost,
    lost_all,
    maps,
    number,
    switch,
    text,
    true_is,
    whole,
)
from .shared import path

SET_OPTIONS: Table = {
    "folder_path": maps("folder", path),
    "dataset_path": maps("folder", path),
    "caption_ext": maps("caption_extension", convert.extension),
    "caption_type": maps("caption_extension", convert.extension),
    "default_caption": maps("default_caption"),
    "trigger_word": maps("trigger", text, "also the process's `trigger_word`"),
    "caption_dropout_rate": custom(
        convert.dropout, "caption_dropout", "with a trigger word: differs, it is dropped as well"
    ),
    "shuffle_tokens": custom(
        convert.shuffle, "tag_shuffles", "8 fixed orders; ai-toolkit shuffles at every use", "differs"
    ),
    "keep_tokens": maps("keep_tags", whole),
    "resolution": custom(convert.resolutions, "resolutions", "one number or several"),
    "num_repeats": maps("repeats", whole),
    "bucket_tolerance": maps("alignment", whole),
    "flip_x": maps("flip", switch),
    "flip_y": convert.only(False, "pictures are mirrored sideways only"),
    "random_crop": true_is({"crop": "random"}),
    "is_reg": maps("regularisation", switch),
    "alpha_mask": true_is({"masks": "alpha"}),
    "mask_min_value": maps("mask_floor", number),
    "mask_path": lost('masks lie beside the pictures: name them `picture-masklabel.png` and set masks = "files"'),
    "invert_mask": lost("white is what counts: invert the files"),
    "buckets": convert.only(True, "aspect buckets are always used"),
    "loss_multiplier": lost("see weight: how often a set is used"),
    "network_weight": lost("one strength for all sets"),
    "type": choice("", {"image": Same("pictures")}),
    **lost_all("token_dropout_rate random_triggers replacements use_short_captions", "captions are taken as they are"),
    **lost_all("augments augmentations random_scale square_crop poi standardize_images scale", NOT_BUILT),
    **lost_all("control_path inpaint_path unconditional_path controls clip_image_path", "no conditioning pictures"),
    "num_frames": custom(
        lambda value, given: (
            Outcome("ignored", {}, "pictures") if whole(value) == 1 else Outcome("no counterpart", {}, "no videos")
        ),
        "",
        "1: pictures; videos are not trained",
        "no counterpart",
    ),
    **ignored_all("cache_latents cache_latents_to_disk cache_text_embeddings cache_clip_vision_to_disk", CACHE),
    **ignored_all(
        "num_workers prefetch_factor fast_image_size debug shrink_video_to_frames fps do_i2v guidance_type "
        "full_size_control_images random_triggers_max replay_transforms shuffle_augmentations "
        "extra_values control_transparent_color",
        "not what is trained",
    ),
}
