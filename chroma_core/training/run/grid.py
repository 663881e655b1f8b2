"""The grid that a LoRA is chosen from: steps × strengths × prompts, which file each image is, and how they were rated.

`grid.json` in a job's folder says what was asked for; the images, which ComfyUI makes, lie in `grid/` beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, StrictInt, StrictStr, ValidationError, field_validator

from ...errors import ConfigError, JobError, check_text
from ...files import check_format, read_json, write_json
from ...loading.spec import PLACEMENT
from ...settings import Settings
from ..config import TrainingConfig
from ..config.job import Preview

FORMAT = 1
"""Of `grid.json`. Raised whenever an older version would misread it."""

MOST_IMAGES = 120
STRONGEST = 4.0
"""The range of a strength is −4 to 4, as that of Chroma Apply LoRA."""

RATINGS = (1, 5)
Strength = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class GridChoice(Settings):
    """What a grid is asked for. Without prompts it takes the job's previews."""

    steps: tuple[StrictInt, ...] = Field(min_length=1, max_length=12)
    strengths: tuple[Strength, ...] = Field((0.7, 1.0, 1.3), min_length=1, max_length=12)
    prompts: tuple[Annotated[StrictStr, Field(max_length=10_000)], ...] = Field((), max_length=24)

    @field_validator("steps", "strengths", "prompts")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("steps")
    @classmethod
    def _trained(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("a step must be at least 1")
        return value

    @field_validator("strengths")
    @classmethod
    def _in_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(abs(strength) > STRONGEST for strength in value):
            raise ValueError(f"a strength must be between -{STRONGEST:g} and {STRONGEST:g}")
        return value


class UsedLora(Settings):
    """The LoRA of a step: its name in the LoRA folder, and the SHA-256 of the file that it was."""

    name: str
    sha256: str


class Grid(GridChoice):
    """What was asked for and what came of it.

    loras: by step. ratings: 1 to 5, by the key of a cell. written: SHA-256 of the files that were written beside the
    LoRAs, by name: one that is not as we wrote it is the user's.
    """

    loras: dict[int, UsedLora]
    ratings: dict[str, int] = {}
    written: dict[str, str] = {}


@dataclass(frozen=True)
class Cell:
    """One image. key: its name, another one for whatever changes its bits. prompt: the number of its column."""

    key: str
    step: int
    strength: float
    prompt: int
    preview: Preview


@dataclass(frozen=True)
class Average:
    """The mean rating of a step at a strength, over `rated` images; None before the first."""

    step: int
    strength: float
    mean: float | None
    rated: int


def grid_path(job_folder: Path) -> Path:
    return job_folder / "grid.json"


def images_folder(job_folder: Path) -> Path:
    """Where ComfyUI saves a grid's images, each as `KEY_00001_.png`."""
    return job_folder / "grid"


def read_grid(job_folder: Path) -> Grid | None:
    """The job's grid; None before there is one. Raises JobError for a damaged file, or one of a later version."""
    path = grid_path(job_folder)
    if not path.is_file():
        return None
    values = read_json(path, JobError)
    try:
        check_format(f"'{path}'", values.pop("format", None), FORMAT, JobError)
        return Grid.model_validate(values)
    except (AttributeError, TypeError, ValidationError) as error:
        raise JobError(f"'{path}' is damaged. Remove it, and make the grid again.") from error


def write_grid(job_folder: Path, grid: Grid) -> None:
    write_json(grid_path(job_folder), {"format": FORMAT, **grid.model_dump(mode="json")})


def previews(config: TrainingConfig, prompts: Sequence[str]) -> list[Preview]:
    """What each prompt is sampled with: the job's own preview where it has the very text, else the previews' settings.

    Prompt i has their seed + i. Raises PromptError for `[trigger]` without a trigger word, ConfigError for no prompt.
    """
    own = config.preview_list()
    if not prompts:
        if not own:
            raise ConfigError("This job has no preview prompt of its own. Give the grid at least one prompt.")
        return own
    asked = config.model_copy(update={"previews": config.previews.model_copy(update={"prompts": tuple(prompts)})})
    known = {preview.prompt: preview for preview in reversed(own)}
    return [known.get(preview.prompt, preview) for preview in asked.preview_list()]


def cells(config: TrainingConfig, grid: Grid) -> list[Cell]:
    """Every image of a grid, row by row: a step at each strength, and in each row the prompts."""
    model = {name: value for name, value in config.model.to_dict().items() if name not in PLACEMENT}
    columns = list(enumerate(previews(config, grid.prompts)))
    shared = json.dumps([config.recipe_value().to_dict(), model], sort_keys=True)

    def key(step: int, strength: float, preview: Preview) -> str:
        values = json.dumps([grid.loras[step].sha256, strength, asdict(preview)], sort_keys=True)
        return hashlib.sha256(f"{shared}{values}".encode(errors="backslashreplace")).hexdigest()[:16]

    return [
        Cell(key(step, strength, preview), step, strength, number, preview)
        for step in grid.steps
        for strength in grid.strengths
        for number, preview in columns
    ]


def check_grid(config: TrainingConfig, choice: GridChoice) -> None:
    """Raise ConfigError for prompts that cannot be, or too many images."""
    check_text(choice.model_dump(), "The grid cannot be made: ")
    count = len(choice.steps) * len(choice.strengths) * len(previews(config, choice.prompts))
    if count > MOST_IMAGES:
        raise ConfigError(
            f"The grid would have {count} images; at most {MOST_IMAGES} are made. Choose fewer steps or prompts."
        )


def put_grid(job_folder: Path, choice: GridChoice, loras: dict[int, UsedLora]) -> Grid:
    """Write down what the grid is to be; earlier ratings stay, and what is known of files beside the LoRAs."""
    before = read_grid(job_folder)
    kept = {"ratings": before.ratings, "written": before.written} if before else {}
    grid = Grid(**choice.model_dump(), loras=loras, **kept)
    write_grid(job_folder, grid)
    return grid


def image_of(job_folder: Path, key: str) -> Path | None:
    """The image of a cell; None as long as it is not whole."""
    return next((path for path in sorted(images_folder(job_folder).glob(f"{key}_*.png")) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    """Whether a PNG has its end: ComfyUI writes in place, and may be killed meanwhile."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), 2)
            return file.read() == _PNG_END
    except OSError:
        return False


def rated(grid: Grid, key: str, rating: int) -> Grid:
    """The grid with a cell's rating, 1 to 5; 0 takes it back. Raises ConfigError for any other."""
    low, high = RATINGS
    if rating and not low <= rating <= high:
        raise ConfigError(f"The rating is {rating}; it must be a whole number from {low} to {high}, or 0 for none.")
    ratings = {name: value for name, value in grid.ratings.items() if name != key} | ({key: rating} if rating else {})
    return grid.model_copy(update={"ratings": ratings})


def averages(grid: Grid, found: Sequence[Cell]) -> list[Average]:
    """The mean rating of each row, in the grid's order."""
    rows: dict[tuple[int, float], list[int]] = {(cell.step, cell.strength): [] for cell in found}
    for cell in found:
        if cell.key in grid.ratings:
            rows[cell.step, cell.strength].append(grid.ratings[cell.key])
    return [Average(*row, fmean(values) if values else None, len(values)) for row, values in rows.items()]


def best(found: Sequence[Average]) -> Average | None:
    """The row with the highest mean: among equals the one with more ratings, then the strength nearest to 1."""
    some = [row for row in found if row.mean is not None]
    return max(some, key=lambda row: (row.mean, row.rated, -abs(row.strength - 1)), default=None)
