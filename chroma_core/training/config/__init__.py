"""A training job as one frozen value (`job`), and what may change in it on the way (`changes`)."""

from .job import MODEL_PATHS, ObjectiveConfig, Preview, PreviewPrompt, TrainingConfig

__all__ = ["MODEL_PATHS", "ObjectiveConfig", "Preview", "PreviewPrompt", "TrainingConfig"]
