"""What a LoRA in training is: kind, rank, alpha, target, for all layers or by patterns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeVar, get_args

from ..errors import ConfigError
from .modules import AdapterKind, quoted

LoraInit = Literal["kaiming", "gaussian"]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoraSettings:
    """What is trained: rank ≥ 1, alpha > 0 (None = rank), target (see `targets`), dropout in [0, 1), kind (`modules`).

    init: how `down` starts (`up` is zero, so training starts at the base model): `kaiming` = uniform in ±1/√in, PEFT's
    default; `gaussian` = normal with deviation 1/rank (not for `lokr`).
    rank_pattern, alpha_pattern: shell patterns on full layer names → a rank or alpha of their own; the first pattern
    that matches counts. A layer with a rank of its own and no alpha given anywhere has alpha = that rank.
    lokr_factor: the size of w1 that LyCORIS aims at; −1 makes both factors about equal.
    """

    rank: int = 16
    alpha: float | None = None
    target: str | Sequence[str] = "all"
    dropout: float = 0.0
    init: LoraInit = "kaiming"
    kind: AdapterKind = "lora"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lokr_factor: int = -1

    def __post_init__(self) -> None:
        if self.kind not in get_args(AdapterKind):
            raise ConfigError(f"The LoRA kind is '{self.kind}'; choose one of: {', '.join(get_args(AdapterKind))}.")
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ConfigError(f"The LoRA rank is {rank}; it must be at least 1 (16 is usual).")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                raise ConfigError(f"The LoRA alpha is {alpha}; it must be above 0. Leave it out for alpha = rank.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"The LoRA dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.init not in get_args(LoraInit):
            raise ConfigError(f"The LoRA init is '{self.init}'; choose one of: {', '.join(get_args(LoraInit))}.")
        if self.kind == "lokr" and self.init != "kaiming":
            raise ConfigError(f"The LoRA init is '{self.init}', which LoKr does not have; leave it at 'kaiming'.")
        if self.lokr_factor < -1 or self.lokr_factor == 0:
            raise ConfigError(f"The lokr_factor is {self.lokr_factor}; it must be -1 (about equal) or at least 1.")

    def rank_of(self, name: str) -> int:
        """The rank of the layer of that name."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer of that name, before a kind's own scaling."""
        rank = self.rank_of(name)
        return float(_first_match(self.alpha_pattern, name, float(rank if self.alpha is None else self.alpha)))

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise ConfigError when a pattern matches none of the layers in training."""
        names = tuple(names)
        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            lost = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
            if lost:
                raise ConfigError(
                    f"The {option} {quoted(lost)} matches none of the {len(names)} layers that are trained. A pattern "
                    f"must match a full layer name such as '{names[0] if names else '(none)'}'; see also the target."
                )


def _first_match(patterns: Mapping[str, Number], name: str, otherwise: Number) -> Number:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)
