"""SimpleTuner's dataloader file (multidatabackend.json): what each option of a data set becomes.

Facts from SimpleTuner's own documentation/DATALOADER.md.
"""

from __future__ import annotations

import math
from typing import Any

from .rules import (
    Given,
    Lost,
    Outcome,
    Same,
    Table,
    choice,
    custom,
    ignored,
    ignored_all,
    lost,
    lost_all,
    maps,
    number,
    switch,
    text,
    whole,
)
from .shared import megapixels, path

FOR_ALL_SETS = (
    "resolution",
    "resolution_type",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "caption_dropout_probability",
    "aspect_bucket_alignment",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "max_upscale_threshold",
    "delete_unwanted_images",
    "delete_problematic_images",
    "parquet_caption_column",
    "parquet_filename_column",
)
"""Options of config.json that hold for every set which does not say otherwise."""

STORES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
"""Kinds of data set that only say where a cache lies."""


def _on(given: Given, name: str) -> bool:
    return name in given and switch(given[name])


def _fixed(given: Given) -> bool:
    return _on(given, "only_instance_prompt") or given.get("caption_strategy") in ("instanceprompt", "instance_prompt")


def _caption_strategy(value: Any, given: Given) -> Outcome:
    if _fixed(given):
        return Outcome("maps", {"caption_source": "fixed"})
    known = {"textfile": "files", "filename": "filenames"}
    word = text(value)
    if word in known:
        return Outcome("maps", {"caption_source": known[word]})
    return Outcome(
        "no counterpart", {}, "captions come from text files, metadata.jsonl/csv, file names or one sentence"
    )


def _instance_prompt(value: Any, given: Given) -> Outcome:
    if _fixed(given):
        return Outcome("maps", {"caption_source": "fixed", "default_caption": text(value)})
    if _on(given, "prepend_instance_prompt"):
        return Outcome("maps", {"caption_prefix": text(value)})
    return Outcome("ignored", {}, "not used with this caption strategy")


def _resolution(value: Any, given: Given) -> Outcome:
    kind, size = given.get("resolution_type", "pixel_area"), number(value)
    if kind == "area" or size < 16:
        return Outcome("maps", {"resolutions": [megapixels(size)]})
    if kind == "pixel":
        reason = "the resolution is the side of a square with the bucket's area here, not the shorter side"
        return Outcome("differs", {"resolutions": [whole(size)]}, reason)
    return Outcome("maps", {"resolutions": [whole(size)]})


def _crop(value: Any, given: Given) -> Outcome:
    if not switch(value):
        return Outcome("maps", {"crop": "centre"})
    style, aspect = given.get("crop_style", "center"), given.get("crop_aspect", "square")
    values = {"crop": "random" if style == "random" else "centre"}
    if aspect in ("square", "random"):
        return Outcome("differs", values, f"crop_aspect {aspect}: pictures keep their own shape here (aspect buckets)")
    if style not in ("center", "centre", "random"):
        return Outcome("differs", values, f"crop_style {style}: crops are centred or random")
    return Outcome("maps", values)


def _shuffle(value: Any, given: Given) -> Outcome:
    if not isinstance(value, dict) or not switch(value.get("enable", False)):
        return Outcome("ignored", {}, "not used")
    if value.get("split_on", "comma") != "comma":
        return Outcome("no counterpart", {}, "only tags between commas are shuffled")
    values = {"tag_shuffles": whole(value.get("count", 1)), "keep_tags": whole(value.get("position_start", 0))}
    if not switch(value.get("include_original", True)):
        return Outcome("differs", values, "the caption as written is always one of the orders")
    return Outcome("maps", values)


def _offset(value: Any, given: Given) -> Outcome:
    offset = number(value)
    if offset == 0:
        return Outcome("ignored", {}, "not used")
    reason = "SimpleTuner moves the draw before its tail remap, ChromaKit moves the noise level after it"
    return Outcome("differs", {"sigma_bias": round(offset / math.log(8), 6)}, reason)


def _starts(first: int):
    def convert(value: Any, given: Given) -> Outcome:
        if whole(value) <= first:
            return Outcome("ignored", {}, "used from the start")
        return Outcome("no counterpart", {}, "every set is used from the first step to the last")

    return convert


SET_OPTIONS: Table = {
    "id": ignored("a name"),
    "dataset_type": ignored(
        "`image`; `eval` becomes validation_dataset; caches are left out; others have no counterpart"
    ),
    "disabled": ignored("a disabled set is left out"),
    "disable": ignored("a disabled set is left out"),
    "type": choice(
        "",
        {"local": Same("a folder of this computer")}
        | {
            kind: Lost("only folders of this computer are read")
            for kind in ("aws", "csv", "huggingface", "webshart", "parquet")
        },
    ),
    "instance_data_dir": maps("folder", path),
    "caption_strategy": custom(
        _caption_strategy,
        "caption_source",
        "`textfile` → `files`, `filename` → `filenames`, `instanceprompt` → `fixed`; `parquet`, `csv`, … have no "
        "counterpart",
    ),
    "instance_prompt": custom(
        _instance_prompt,
        "default_caption or caption_prefix",
        "the only caption, or with `prepend_instance_prompt` the prefix",
    ),
    "only_instance_prompt": custom(
        lambda value, given: (
            Outcome("maps", {"caption_source": "fixed"}) if switch(value) else Outcome("ignored", {}, "not used")
        ),
        "caption_source",
        "true → `fixed`",
    ),
    "prepend_instance_prompt": ignored("taken over with instance_prompt"),
    "caption_dropout_probability": maps("caption_dropout", number),
    "caption_shuffle": custom(_shuffle, "tag_shuffles, keep_tags", "`count`, `position_start`; tags between commas"),
    "disable_multiline_split": lost("each line of a caption file is a caption of its own"),
    "repeats": custom(
        lambda value, given: Outcome("maps", {"repeats": whole(value) + 1}),
        "repeats",
        "SimpleTuner counts the repetitions beside the first use: n → n + 1",
    ),
    "probability": maps("weight", number),
    "resolution": custom(
        _resolution,
        "resolutions",
        "`pixel_area`; `area` in megapixels (1.0 → 1024); `pixel`, the shorter side, differs",
    ),
    "resolution_type": ignored("taken over with resolution"),
    "aspect_bucket_alignment": maps("alignment", whole),
    "crop": custom(
        _crop, "crop", "with `crop_style` (`center`, `random`); square crops differ: buckets keep the shape"
    ),
    "crop_style": ignored("taken over with crop"),
    "crop_aspect": ignored("taken over with crop"),
    "crop_aspect_buckets": lost("buckets follow from resolution and alignment"),
    "maximum_image_size": ignored("pictures are always scaled down before they are cropped"),
    "target_downsample_size": ignored("pictures are always scaled down before they are cropped"),
    "minimum_image_size": lost("small pictures are named and trained at their own size: sort them out by hand"),
    "max_upscale_threshold": lost("pictures are never enlarged, unless upscale = true"),
    "is_regularisation_data": maps("regularisation", switch),
    "is_regularization_data": maps("regularisation", switch),
    "timestep_sampling_offset": custom(_offset, "sigma_bias", "offset / ln 8", "differs"),
    "start_epoch": custom(_starts(1), "", "every set is used throughout", "no counterpart"),
    "start_step": custom(_starts(0), "", "every set is used throughout", "no counterpart"),
    "metadata_backend": choice(
        "",
        {
            "discovery": Same("sizes are read from the pictures"),
            "parquet": Lost("captions come from text files or metadata.jsonl/csv"),
        },
    ),
    **lost_all("end_epoch end_step", "every set is used from the first step to the last"),
    **lost_all("minimum_aspect_ratio maximum_aspect_ratio max_num_samples", "all pictures of a folder are used"),
    **lost_all("delete_unwanted_images delete_problematic_images delete_nsfw_images", "pictures are never deleted"),
    **lost_all(
        "conditioning conditioning_data conditioning_type source_dataset_id grounding", "no conditioning pictures"
    ),
    **lost_all("slider_strength video audio", "not trained"),
    **lost_all(
        "parquet caption_filter_list parquet_caption_column parquet_filename_column", "captions are taken as they are"
    ),
    **lost_all("aws_bucket_name aws_data_prefix csv_file huggingface", "only folders of this computer are read"),
    **ignored_all(
        "cache_dir cache_dir_vae cache_dir_conditioning_image_embeds text_embeds image_embeds "
        "conditioning_image_embeds "
        "write_batch_size text_encoder_batch_size vae_cache_clear_each_epoch vae_cache_ondemand vae_cache_disable "
        "text_cache_ondemand text_cache_disable skip_file_discovery preserve_data_backend_cache "
        "metadata_update_interval "
        "hash_filenames default aws_region_name aws_endpoint_url aws_access_key_id aws_secret_access_key",
        "latents and text states are always cached, and in ChromaKit's own way",
    ),
}
