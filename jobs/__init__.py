"""The jobs, from the command line or Python: ``from loomvideo.jobs import prepare, pretrain, evaluate, generate``."""

from loomvideo.jobs.api import (
    EvaluationResult,
    GenerationResult,
    TrainingResult,
    evaluate,
    finetune_edit,
    generate,
    prepare,
    pretrain,
)

__all__ = [
    "EvaluationResult",
    "GenerationResult",
    "TrainingResult",
    "evaluate",
    "finetune_edit",
    "generate",
    "prepare",
    "pretrain",
]
