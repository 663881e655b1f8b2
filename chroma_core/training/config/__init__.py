"""A training job as one frozen value (`job`), and what may change in it on the way (`changes`)."""

from .job import MODEL_PATHS, LoraConfig, ObjectiveConfig, PreviewConfig, PreviewPrompt, TrainingConfig
from .preserve import PreserveConfig

__all__ = [
    "MODEL_PATHS",
    "LoraConfig",
    "ObjectiveConfig",
    "PreserveConfig",
    "PreviewConfig",
    "PreviewPrompt",
    "TrainingConfig",
]
