"""The jobs, from the command line or Python: ``from loomvideo.jobs import prepare, pretrain, evaluate, generate``."""

from loomvideo.jobs.api import (
    EvaluationResult,
    GenerationResult,
    TrainingResult,
    distill,
    evaluate,
    finetune_edit,
    generate,
    prefer,
    prepare,
    pretrain,
)

__all__ = [
    "EvaluationResult",
    "GenerationResult",
    "TrainingResult",
    "distill",
    "evaluate",
    "finetune_edit",
    "generate",
    "prefer",
    "prepare",
    "pretrain",
]
