"""What was compared: pairs of runtimes, and one image with one number changed at a time; as a table, JSON and a sheet.

The factors (`vary`) say which number moves the image, and by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from PIL import Image

from ..errors import ConfigError
from ..model.precision import PRECISIONS
from ..sampling.recipe import RECIPES, StateDtype, TextAttention
from ..sampling.schedule import Spacing
from ..sampling.solvers import Method
from .case import Case, Difference, NotRun, Sampled, compare

PAIRS = (
    ("preview", "cli"),
    ("preview", "node"),
    ("cli", "node"),
    ("cli", "core"),
    ("cli", "diffusers"),
    ("cli", "diffusers_float_mask"),
    ("live", "merged"),
)
"""The runtimes that are compared. `core` is this process; `diffusers_float_mask` is its pipeline as it ships."""

SAME_SAMPLER = {"preview", "cli", "node", "core"}
"""The runtimes that must give the same image."""

TOLERANCE = 0.01
"""The mean difference of their latents that may be rounding: keeping tiny's latents in bf16 moves them by .007."""

FactorKind = Literal["recipe", "schedule", "guidance", "lora", "precision", "size", "seed"]
"""`seed` is the yardstick: how far apart two images of one prompt are that have nothing else in common."""


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
    found = [(f"LoRA {mode}", case.with_loras(mode=mode)) for mode in case.lora_modes]
    changed = tuple(replace(use, strength=round(0.9 * use.strength, 6)) for use in case.loras)
    return [*found, ("LoRA at 90 % strength", replace(case, loras=changed)), ("no LoRA", replace(case, loras=()))]


def _precisions(case: Case) -> list[tuple[str, Case]]:
    own = [name for name, chosen in PRECISIONS.items() if not chosen.library]
    found = [(f"precision {name}", replace(case, spec=replace(case.spec, precision=name))) for name in own]
    return found + [(f"T5 in {name}", replace(case, spec=replace(case.spec, text_precision=name))) for name in own]


def _sizes(case: Case) -> list[tuple[str, Case]]:
    """A size that is floored away changes nothing: that is worth seeing too."""
    return [("16 pixels wider, before flooring", replace(case, width=case.width + 16))]


@dataclass
class Report:
    """Filled by `add`, `add_pairs` and `add_factor`; images are kept for the sheet."""

    case: Case
    comparisons: list[Difference] = field(default_factory=list)
    factors: list[tuple[Factor, Difference]] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    images: dict[str, Image.Image] = field(default_factory=dict)

    def add_pairs(self, sampled: dict[str, Sampled | NotRun]) -> None:
        """Compare those of `PAIRS` that were both sampled; say of the others why not."""
        for a, b in PAIRS:
            first, second = sampled.get(a), sampled.get(b)
            if isinstance(first, Sampled) and isinstance(second, Sampled):
                self.comparisons.append(compare(f"{a}-{b}", first, second))
            elif first is not None and second is not None:
                self.not_run[f"{a}-{b}"] = next(str(each) for each in (first, second) if isinstance(each, NotRun))
        self.images.update({name: p.image for name, p in sampled.items() if isinstance(p, Sampled)})

    def add_factor(self, factor: Factor, base: Sampled, changed: Sampled | NotRun) -> None:
        """One row of the table of factors."""
        if isinstance(changed, Sampled):
            try:
                self.factors.append((factor, compare(factor.name, base, changed)))
                self.images[factor.name] = changed.image
                return
            except ConfigError as error:
                changed = NotRun(str(error))
        self.not_run[factor.name] = str(changed)

    @property
    def same_image(self) -> bool | None:
        """Whether preview, command line and nodes agree, as far as they were sampled; None when no two of them were."""
        ours = self._ours()
        return all(difference.mean_abs_diff <= TOLERANCE for difference in ours) if ours else None

    def verdict(self) -> str:
        """`same_image` in one line."""
        ours = self._ours()
        wrong = ", ".join(difference.pair for difference in ours if difference.mean_abs_diff > TOLERANCE)
        if not ours:
            return "Nothing was compared: no two of preview, command line and nodes were sampled."
        if wrong:
            return f"Not the same image: {wrong} differ by more than rounding (mean |Δ| above {TOLERANCE:g})."
        return f"The same image: {', '.join(difference.pair for difference in ours)}."

    def _ours(self) -> list[Difference]:
        return [found for found in self.comparisons if SAME_SAMPLER.issuperset(found.pair.split("-"))]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "case": self.case.to_dict(),
            "same_picture": self.same_image,
            "comparisons": [difference.to_dict() for difference in self.comparisons],
            "factors": [
                {"kind": factor.kind, "factor": factor.name}
                | {key: value for key, value in difference.to_dict().items() if key != "pair"}
                for factor, difference in self.sorted_factors()
            ],
            "not_run": [{"pair": pair, "reason": reason} for pair, reason in self.not_run.items()],
        }

    def sorted_factors(self) -> list[tuple[Factor, Difference]]:
        """What moves the image most, first."""
        return sorted(self.factors, key=lambda row: -row[1].mean_abs_diff)

    def table(self) -> str:
        """The report as text."""
        width, height = self.case.effective_size
        steps, guidance = self.case.settings.steps, self.case.settings.guidance
        lines = [
            f"“{self.case.prompt}”, {width}×{height} pixels (after flooring), seed {self.case.settings.seed}, {steps} "
            f"steps of {self.case.settings.method}, guidance {guidance:g}, recipe {self.case.recipe.name}",
        ]
        factors = [difference for _, difference in self.sorted_factors()]
        for title, rows in {"pair": self.comparisons, "changed alone": factors}.items():
            if rows:
                lines += ["", _row(title, "max |Δ|", "mean |Δ|", "PSNR", ""), *map(_difference, rows)]
        if self.not_run:
            lines += ["", "Not run:", *(f"  {pair}: {reason}" for pair, reason in self.not_run.items())]
        return "\n".join(
            [*lines, "", "|Δ| is of the latents, whose standard deviation is about 3; PSNR of the images."]
        )


def _row(*cells: str) -> str:
    name, *numbers, note = cells
    return f"{name:<34}" + "".join(f"{number:>12}" for number in numbers) + (f"   {note}" if note else "")


def _difference(found: Difference) -> str:
    quality = "∞" if found.psnr is None else f"{found.psnr:.1f} dB"
    note = "identical" if found.identical else "same pixels" if found.psnr is None else ""
    return _row(found.pair, f"{found.max_abs_diff:.2e}", f"{found.mean_abs_diff:.2e}", quality, note)
