"""One picture again and again with one number changed: which of them moves it, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..model.precision import PRECISIONS
from ..sampling.recipe import RECIPES, StateDtype, TextAttention
from ..sampling.schedule import Spacing
from ..sampling.solvers import Method
from .case import Case

FactorKind = Literal["recipe", "schedule", "guidance", "lora", "precision", "size", "seed"]
"""`seed` is the yardstick: how far apart two pictures of one prompt are that have nothing else in common."""


@dataclass(frozen=True)
class Factor:
    """One change: what it is called, and the case that it makes."""

    kind: FactorKind
    name: str
    case: Case


def vary(case: Case, kinds: tuple[FactorKind, ...] = get_args(FactorKind)) -> Iterator[Factor]:
    """The cases that differ from `case` in one number, those that would be the same left out."""
    makers = {
        "recipe": _recipes,
        "schedule": _schedules,
        "guidance": _guidance,
        "lora": _loras,
        "precision": _precisions,
        "size": _sizes,
        "seed": lambda case: [("another seed", _set(case, seed=case.settings.seed + 1))],
    }
    for kind in kinds:
        for name, changed in makers[kind](case):
            if changed != case:
                yield Factor(kind, name, changed)


def _set(case: Case, **settings: Any) -> Case:
    return replace(case, settings=replace(case.settings, **settings))


def _recipes(case: Case) -> list[tuple[str, Case]]:
    found = [(f"recipe {name}", replace(case, recipe=recipe)) for name, recipe in RECIPES.items()]

    def field(name: str, value: Any) -> tuple[str, Case]:
        return f"{name} {value}", replace(case, recipe=case.recipe.override({name: value}))

    found += [field("text_attention", value) for value in get_args(TextAttention)]
    found += [field("visible_padding", value) for value in (0, 1)]
    for name in ("noise_dtype", "time_dtype", "latents_dtype"):
        found += [field(name, value) for value in get_args(StateDtype) if value != "model"]
    return found


def _schedules(case: Case) -> list[tuple[str, Case]]:
    steps = case.settings.steps
    found = [(f"{count} steps", _set(case, steps=count)) for count in (max(1, steps // 2), 2 * steps)]
    found += [(f"method {method}", _set(case, method=method)) for method in get_args(Method)]
    found += [(f"spacing {spacing}", _set(case, spacing=spacing)) for spacing in get_args(Spacing)]
    found += [(f"flow shift {shift}", _set(case, flow_shift=shift)) for shift in ("dynamic", "none", 3.0)]
    return [*found, ("tail bias 0.5", _set(case, tail_bias=0.5))]


def _guidance(case: Case) -> list[tuple[str, Case]]:
    value = case.settings.guidance
    # Some pipelines count the guidance from 0: their g is our g − 1.
    found = [(f"guidance {value + change:g}", _set(case, guidance=value + change)) for change in (-1, 1)]
    return [*found, ("negative ignored", replace(case, negative=""))]


def _loras(case: Case) -> list[tuple[str, Case]]:
    if not case.loras:
        return []
    found = [(f"LoRA {mode}", case.with_loras(mode=mode)) for mode in ("live", "merged")]
    changed = [replace(use, strength=round(0.9 * use.strength, 6)) for use in case.loras]
    return [
        *found,
        ("LoRA at 90 % strength", replace(case, loras=tuple(changed))),
        ("no LoRA", replace(case, loras=())),
    ]


def _precisions(case: Case) -> list[tuple[str, Case]]:
    own = [name for name, chosen in PRECISIONS.items() if not chosen.library]
    found = [(f"precision {name}", replace(case, spec=replace(case.spec, precision=name))) for name in own]
    return found + [(f"T5 in {name}", replace(case, spec=replace(case.spec, text_precision=name))) for name in own]


def _sizes(case: Case) -> list[tuple[str, Case]]:
    """A size that is floored away changes nothing: that is worth seeing too."""
    return [("16 pixels wider, before flooring", replace(case, width=case.width + 16))]
