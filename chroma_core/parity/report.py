"""What was compared: the pairs of runtimes, the factors by how far they move the picture; in words and side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import ConfigError
from .case import Case, NotRun
from .factors import Factor
from .painted import Difference, Painted, compare

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
"""The runtimes that must paint the same picture."""

TOLERANCE = 0.01
"""The mean difference of their latents that may be rounding: keeping tiny's latents in bf16 moves them by .007."""

_BACKGROUND, _INK = (24, 24, 27), (228, 228, 231)


@dataclass
class Report:
    """Filled by `add`, `add_pairs` and `add_factor`; pictures are kept for the sheet."""

    case: Case
    comparisons: list[Difference] = field(default_factory=list)
    factors: list[tuple[Factor, Difference]] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    def add_pairs(self, painted: dict[str, Painted | NotRun]) -> None:
        """Compare those of `PAIRS` that were both painted; say of the others why not."""
        for a, b in PAIRS:
            first, second = painted.get(a), painted.get(b)
            if first is None or second is None:
                continue
            pair = f"{a}-{b}"
            reason = next((str(p) for p in (first, second) if isinstance(p, NotRun)), None)
            if isinstance(first, Painted) and isinstance(second, Painted):
                self.comparisons.append(compare(pair, first, second))
            elif reason is not None:
                self.not_run[pair] = reason
        self.pictures.update({name: p.picture for name, p in painted.items() if isinstance(p, Painted)})

    def add_factor(self, factor: Factor, base: Painted, changed: Painted | NotRun) -> None:
        """One row of the table of factors."""
        if isinstance(changed, Painted):
            try:
                self.factors.append((factor, compare(factor.name, base, changed)))
                self.pictures[factor.name] = changed.picture
                return
            except ConfigError as error:
                changed = NotRun(str(error))
        self.not_run[factor.name] = str(changed)

    @property
    def same_picture(self) -> bool | None:
        """Whether preview, command line and nodes agree, as far as they were painted; None when no two of them were."""
        ours = self._ours()
        return all(difference.mean_abs_diff <= TOLERANCE for difference in ours) if ours else None

    def verdict(self) -> str:
        """`same_picture` in one line."""
        ours = self._ours()
        pairs = [difference.pair for difference in ours if difference.mean_abs_diff > TOLERANCE]
        if not ours:
            return "Nothing was compared: no two of preview, command line and nodes were painted."
        if pairs:
            return (
                f"Not the same picture: {', '.join(pairs)} differ by more than rounding (mean |Δ| above {TOLERANCE:g})."
            )
        return f"The same picture: {', '.join(difference.pair for difference in ours)}."

    def _ours(self) -> list[Difference]:
        return [found for found in self.comparisons if SAME_SAMPLER.issuperset(found.pair.split("-"))]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "case": self.case.to_dict(),
            "same_picture": self.same_picture,
            "comparisons": [difference.to_dict() for difference in self.comparisons],
            "factors": [
                {"kind": factor.kind, "factor": factor.name}
                | {key: value for key, value in difference.to_dict().items() if key != "pair"}
                for factor, difference in self.sorted_factors()
            ],
            "not_run": [{"pair": pair, "reason": reason} for pair, reason in self.not_run.items()],
        }

    def sorted_factors(self) -> list[tuple[Factor, Difference]]:
        """What moves the picture most, first."""
        return sorted(self.factors, key=lambda row: -row[1].mean_abs_diff)

    def table(self) -> str:
        """The report as text."""
        width, height = self.case.effective_size
        steps, guidance = self.case.settings.steps, self.case.settings.guidance
        lines = [
            f"“{self.case.prompt}”, {width}×{height} pixels (after flooring), seed {self.case.settings.seed}, {steps} "
            f"steps of {self.case.settings.method}, guidance {guidance:g}, recipe {self.case.recipe.name}",
        ]
        if self.comparisons:
            lines += ["", _row("pair", "max |Δ|", "mean |Δ|", "PSNR", "")]
            lines += [_difference(difference.pair, difference) for difference in self.comparisons]
        if self.factors:
            lines += ["", _row("changed alone", "max |Δ|", "mean |Δ|", "PSNR", "")]
            lines += [_difference(factor.name, difference) for factor, difference in self.sorted_factors()]
        if self.not_run:
            lines += ["", "Not run:", *(f"  {pair}: {reason}" for pair, reason in self.not_run.items())]
        return "\n".join(
            [*lines, "", "|Δ| is of the latents, whose standard deviation is about 3; PSNR of the pictures."]
        )


def _row(*cells: str) -> str:
    name, *numbers, note = cells
    return f"{name:<34}" + "".join(f"{number:>12}" for number in numbers) + (f"   {note}" if note else "")


def _difference(name: str, found: Difference) -> str:
    quality = "∞" if found.psnr is None else f"{found.psnr:.1f} dB"
    note = "identical" if found.identical else "same pixels" if found.psnr is None else ""
    return _row(name, f"{found.max_abs_diff:.2e}", f"{found.mean_abs_diff:.2e}", quality, note)


def side_by_side(pictures: dict[str, Image.Image], columns: int = 4, cell: int = 256) -> Image.Image:
    """Named pictures in a grid, each fitted into a square of `cell` pixels. Raises ConfigError without pictures."""
    if not pictures:
        raise ConfigError("There is no picture to show: nothing was painted.")
    columns, line, gap = min(columns, len(pictures)), 34, 8
    font = ImageFont.load_default(12)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line) + gap), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(pictures.items()):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + line)
        scale = cell / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        small = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
        draw.text((x, y + cell + 4), _fitted(name, font, cell), _INK, font)
    return sheet


def _fitted(text: str, font: Any, width: int) -> str:
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}…"
    return shown
