"""The flavours of Chroma 1: where each comes from and the defaults its author recommends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Flavour:
    """One published set of weights.

    `repository` is a Hub id (None for the embedded flavour, which lies in `folder`), `revision` the commit to fetch
    unless a model specification names another, `size` the pixels a side of a default image.
    """

    name: str
    title: str
    repository: str | None
    revision: str | None = None
    folder: Path | None = None
    size: int = 1024
    steps: int = 25
    guidance: float = 4.0


# Pinned, so that the same flavour means the same weights tomorrow: each is the commit that `main` of the repository
# pointed to, as recorded in public pages of 2025 and 2026. Another one is chosen by the specification's `revision`.
BASE_COMMIT = "50ebe125b67794f4ed8e4985d26a4414ca62aed3"
HD_COMMIT = "0e0c60ece1e82b17cb7f77342d765ba5024c40c0"
FLASH_COMMIT = "093c4f63b60507234aa53a073f1f9f565b3f4336"

FLAVOURS: dict[str, Flavour] = {
    f.name: f
    for f in (
        Flavour("base", "Chroma1-Base: 512 pixels; for long training", "lodestones/Chroma1-Base", BASE_COMMIT),
        Flavour("hd", "Chroma1-HD: 1024 pixels; for images and quick LoRAs", "lodestones/Chroma1-HD", HD_COMMIT),
        Flavour(
            "flash",
            "Chroma1-Flash: fast, few steps, no guidance; unstable to train on",
            "lodestones/Chroma1-Flash",
            FLASH_COMMIT,
            steps=12,
            guidance=1.0,
        ),
        Flavour(
            "tiny",
            "tiny: a miniature that ships with the pack; coloured shapes at 64 pixels",
            None,
            folder=Path(__file__).parents[1] / "assets" / "tiny",
            size=64,
            guidance=3.0,
        ),
    )
}


def flavour(name: str) -> Flavour:
    """Look up a flavour; raises ConfigError that lists the known ones."""
    try:
        return FLAVOURS[name]
    except KeyError:
        meant = did_you_mean(name, FLAVOURS)
        raise ConfigError(
            f"There is no Chroma flavour '{name}'. Choose one of: {', '.join(FLAVOURS)}.{meant}"
        ) from None
