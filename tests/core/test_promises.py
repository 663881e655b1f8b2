"""What must not change without a migration, against tests/recorded: ids, hashes, keys, bits, commands, names.

`CHROMAKIT_RECORD=1` records anew; do that only for a change that is meant. Recorded losses of 50 training steps are in
training/test_training_loop.py; nodes and their inputs in tests/host/test_promises_of_nodes.py.
"""

import argparse
import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from chroma_core.cli.main import command_line
from chroma_core.data.cache import LatentTextCache, component_key
from chroma_core.data.scan import DatasetConfig, scan
from chroma_core.data.views import View, views_of
from chroma_core.loading.component_cache import ComponentCache
from chroma_core.loading.spec import ModelHandle, ModelSpec
from chroma_core.sampling.recipe import RECIPES, recipe
from chroma_core.sampling.sampler import SamplingSettings, sample
from chroma_core.training.config import TrainingConfig
from chroma_core.training.jobs.blocking import run_job
from recorded import hold, plain, recorded

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "chroma_core" / "assets" / "tiny"
EXAMPLE = ROOT / "example_datasets" / "sks_emblem"

DATA = {"folder": "/data/set"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tiny": {"model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"}, "steps": 40},
    "flash int8 model offload": {"model": {"flavour": "flash", "precision": "int8", "offload": "model"}},
    "streamed nf4": {"model": {"flavour": "hd", "precision": "nf4", "offload": "block", "resident_blocks": 4}},
    "local files": {"model": {"transformer": "/m/chroma.gguf", "text_encoder": "/m/t5.safetensors", "vae": "/m/ae"}},
    "pinned": {"model": {"revision": "abc123", "offload_during_startup": True, "quantised_folder": "/q"}},
    "rank and alpha": {"lora": {"rank": 64, "alpha": 32, "target": "all+ffs", "dropout": 0.1}},
    "dora patterns": {"lora": {"kind": "dora", "rank_pattern": {"*attn*": 8}, "alpha_pattern": {"*ff*": 2.5}}},
    "lokr": {"lora": {"kind": "lokr", "lokr_factor": 8, "target": ["*to_q", "*to_k"], "save_dtype": "bf16"}},
    "averaged, started": {"lora": {"ema_decay": 0.999, "start_from": "/loras/a.safetensors"}},
    "full rank": {"full": {"target": "single_transformer_blocks.3*", "norms": True, "layouts": ["original"]}},
    "objective": {"objective": {"draw": "chroma", "remap": "none", "flow_shift": 1.15, "loss": "huber"}},
    "guided objective": {"objective": {"guidance": "random-range", "guidance_range": [1, 4], "text_padding": "zero"}},
    "noise": {"objective": {"noise_offset": 0.05, "pair_noise": True, "prior_weight": 0.5, "minimum": 0.1}},
    "previews": {
        "dataset": {**DATA, "trigger": "sks"},
        "previews": {
            "prompts": ["[trigger] a", {"prompt": "b", "seed": 7, "width": 512, "height": 768}],
            "every": 100,
            "method": "unipc",
            "spacing": "beta",
            "flow_shift": "dynamic",
            "tail_bias": 0.25,
        },
    },
    "data": {
        "dataset": {**DATA, "resolutions": [512, 768], "flip": True, "crop": "random", "latents": "sample"},
        "more_datasets": [{"folder": "/data/other", "weight": 0.5, "regularisation": True, "sigma_bias": 0.2}],
        "validation_dataset": {"folder": "/data/held", "caption_source": "filenames"},
    },
    "captions": {"dataset": {**DATA, "caption_dropout": 0.0, "tag_shuffles": 4, "keep_tags": 1, "masks": "alpha"}},
    "optimizer": {"optimizer": "prodigy", "learning_rate": 1.0, "betas": [0.9, 0.99], "weight_decay": 0.0},
    "schedule": {"lr_schedule": "restarts", "lr_cycles": 3, "warmup_steps": 50, "batch_size": 2, "seed": 7},
    "rest": {
        "recipe": "ai-toolkit",
        "recipe_overrides": {"noise_dtype": "fp32"},
        "gradient_accumulation": 4,
        "gradient_checkpointing": False,
        "compile": True,
        "checkpoint_minutes": 5,
        "keep_best": False,
        "tensorboard": True,
    },
}


def configuration(changes: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig.parse({"name": "A Job", "dataset": DATA, **changes})


def test_job_ids_and_hashes():
    made = {name: configuration(changes) for name, changes in CONFIGURATIONS.items()}
    assert len({config.job_id() for config in made.values()}) >= 18
    hold(
        "jobs",
        {
            name: {
                "id": config.job_id(),
                "sha256": hashlib.sha256(config.canonical_json().encode()).hexdigest(),
                "configuration": json.loads(config.canonical_json()),
            }
            for name, config in made.items()
        },
    )


def test_a_recorded_configuration_is_still_the_same_job():
    """job.json of an earlier version holds all options; read back it must be the job that it was."""
    for name, changes in CONFIGURATIONS.items():
        config = configuration(changes)
        assert TrainingConfig.parse(config.model_dump(mode="json")).job_id() == config.job_id(), name


def test_cache_keys():
    images = scan(DatasetConfig(folder=str(EXAMPLE)), 64).items[:2]
    caches = {
        name: LatentTextCache(Path("cache"), "a vae", "a text encoder", recipe(name))
        for name in ("canonical", "comfyui")
    }
    varied = DatasetConfig(folder="-", flip=True, crop="random", random_crops=2, latents="sample", posterior_samples=2)
    views = [View((64, 64)), View((64, 96), True, 0.25, 3, "black"), *views_of(images[0], (64, 96), varied)]
    keys = {
        "tokenizer": component_key(TINY / "tokenizer"),
        "latents": {
            f"{image.name} {view}": caches["canonical"].latents_path(image, view).as_posix()
            for image in images
            for view in views
        },
        "masks": caches["canonical"].mask_path(images[0], views[1], 0.25).as_posix(),
        "texts": {
            f"{name}: {text}": cache.text_path(text).as_posix()
            for name, cache in caches.items()
            for text in ("", "a red circle", "ein grüner Kreis")
        },
    }
    hold("cache_keys", keys)


IMAGES = {
    **{f"recipe {name}": ({}, name) for name in RECIPES},
    **{f"method {name}": ({"method": name}, "canonical") for name in ("heun", "dpmpp_2m", "unipc")},
    "seed 7": ({"seed": 7}, "canonical"),
    "tail bias": ({"tail_bias": 0.5}, "canonical"),
    "beta": ({"spacing": "beta"}, "canonical"),
    "shift": ({"flow_shift": 1.15}, "canonical"),
    "no guidance": ({"guidance": 1.0}, "canonical"),
}


def test_sampled_latents():
    """Latents of the shipped `tiny` after six steps, number by number."""
    torch.set_num_threads(1)
    spec, components = ModelSpec("tiny", precision="fp32", text_precision="fp32"), ComponentCache()
    encoder = components.text_encoder(spec, "cpu")
    now: dict[str, Any] = {}
    with components.transformer(ModelHandle(spec), "cpu") as transformer:
        for name, (changes, rules_name) in IMAGES.items():
            rules = recipe(rules_name)
            texts = [encoder.encode(text, rules) for text in ("a red circle on a blue background", "")]
            settings = SamplingSettings(**{"steps": 6, "seed": 42, "guidance": 4.0} | changes)
            latents = sample(
                transformer, texts[:1], texts[1], width=64, height=64, settings=settings, recipe=rules
            ).float()
            now[name] = {
                "shape": list(latents.shape),
                "sha256": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
                "values": [float(f"{value:.8g}") for value in latents.flatten()[::17].tolist()],
            }
    before = recorded("latents", now)
    assert list(before) == list(now)
    worst = {}
    for name, entry in now.items():
        assert entry["shape"] == before[name]["shape"]
        a, b = torch.tensor(entry["values"]), torch.tensor(before[name]["values"])
        worst[name] = ((a - b).abs().max() / b.abs().max()).item()
    same = sum(entry["sha256"] == before[name]["sha256"] for name, entry in now.items())
    print(f"{same} of {len(now)} bit for bit as recorded; largest relative difference {max(worst.values()):.1e}")
    # Bits differ between kinds of CPU. Numbers rounded to bf16 on the way may round the other way there.
    tolerance = {name: 5e-3 if "bf16" in str(recipe(rules)) else 1e-5 for name, (_, rules) in IMAGES.items()}
    assert not {name: difference for name, difference in worst.items() if difference > tolerance[name]}


TIMED = ("chromakit.versions", "chromakit.job_id")


def test_the_header_of_a_lora(tmp_path):
    config = TrainingConfig.parse(
        {
            "name": "A Job",
            "model": {"flavour": "tiny", "precision": "fp32", "text_precision": "fp32"},
            "dataset": {"folder": str(EXAMPLE), "trigger": "sks"},
            "lora": {"rank": 4, "alpha": 2},
            "previews": {"prompts": ["[trigger]"], "every": 0, "steps": 1},
            "steps": 2,
            "gradient_checkpointing": False,
        }
    )
    status = run_job(config, tmp_path / "jobs", tmp_path / "loras", "cpu")
    assert status["state"] == "completed", status["message"]
    with safe_open(status["lora_path"], framework="pt") as file:
        header = dict(file.metadata())
        tensors = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}  # noqa: SIM118
    numbers = json.loads(header["chromakit.training"])
    losses = {key: numbers.pop(key) for key in ("heldout_loss_base", "heldout_loss", "loss_smooth")}
    values = {key: value for key, value in header.items() if key not in TIMED}
    values["chromakit.training"] = json.dumps(numbers)
    names = hashlib.sha256(json.dumps(tensors).encode()).hexdigest()
    job = tmp_path / "jobs" / status["id"]
    now = plain(
        {
            "keys": sorted(header),
            "values": dict(sorted(values.items())),
            "tensors": {"count": len(tensors), "names and shapes": names},
            "job.json": sorted(json.loads((job / "job.json").read_text())),
            "files of the job": sorted({re.sub(r"\d{3,}", "N", p.relative_to(job).as_posix()) for p in job.rglob("*")}),
        }
    )
    hold("lora", now)
    before = recorded("lora_losses", losses)
    assert {key: value for key, value in losses.items() if value is not None} == pytest.approx(
        {key: value for key, value in before.items() if value is not None}, rel=1e-5
    )


def texts(folder: Path, pattern: str) -> list[str]:
    """Every string of the sources below `folder` that matches."""
    return sorted(
        {
            node.value
            for path in folder.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(pattern, node.value)
        }
    )


def routes() -> list[str]:
    """Method and path of every route that the nodes have in their tables."""
    found = []
    for path in (ROOT / "nodes").rglob("*.py"):
        for method, where in re.findall(
            r"Route\(\s*\"(get|post|put|delete)\",\s*\"([^\"]+)\"", path.read_text(encoding="utf-8")
        ):
            found.append(f"{method.upper()} {where}")
    return sorted(found)


def test_names_that_others_rely_on():
    names = {
        "routes": routes(),
        "events": texts(ROOT / "nodes", r"chromakit\.[\w.]+"),
        "header keys": texts(ROOT / "chroma_core", r"(chromakit|modelspec)\.[\w.]+"),
        "recipes": {name: rules.to_dict() for name, rules in RECIPES.items()},
    }
    assert len(names["routes"]) > 15 and len(names["events"]) >= 3
    hold("names", names)


def options(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Every argument of a command: what a script that calls it relies on."""
    found = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        assert action.help, f"{parser.prog}: {action.dest} says nothing of itself"
        kind = getattr(action.type, "__name__", None)
        default = action.default.as_posix() if isinstance(action.default, Path) else action.default
        found.append(
            {
                "name": " ".join(action.option_strings) or action.dest,
                "dest": action.dest,
                "kind": type(action).__name__.strip("_"),
                "type": kind if kind in ("int", "float", "Path") else None,
                "default": default,
                "choices": list(action.choices) if action.choices is not None else None,
                "nargs": action.nargs,
                "required": action.required,
            }
        )
    return found


def test_commands_and_their_options():
    (commands,) = (a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction))
    assert len(commands.choices) >= 10
    hold("commands", {name: options(parser.complete()) for name, parser in commands.choices.items()})
