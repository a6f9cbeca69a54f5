"""What a training run can be told; a section of every training job's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class MixtureConfig:
    """How often each source is drawn: P(task) x P(dataset within the task)."""

    tasks: dict[str, float] = option({}, "weight of each task; a task not listed weighs 1, weight 0 leaves it out")
    datasets: dict[str, float] = option({}, "weight of each dataset inside its task; not listed weighs 1")
    by_size: bool = option(False, "weights multiply numbers of samples: without any, every sample is drawn alike")


@dataclass
class PackConfig:
    """How samples are joined into packs and packs into steps."""

    tokens: int = option(16384, "budget of a pack: counted work, attention and conditioning too, in units of a token's")
    max_tokens: int = option(0, "hard limit of plain tokens in a pack, for memory; 0 for none")
    max_context_tokens: int = option(0, "hard limit of conditioning (MLLM) tokens in a pack, for memory; 0 for none")
    per_step: int = option(0, "packs in one optimiser step over all workers; 0 takes the number of workers")
    stretch: float = option(1.25, "how much larger packs may be when workers are lost, so that a step keeps its tokens")
    lookahead: float = option(0.5, "how far beyond a step, in steps, samples are looked at to fill gaps")


def refuse_other_values(choices: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Refuse values that are none of those accepted.

    Args:
        choices: The value and the accepted ones, by the whole key.

    Raises:
        UserError: naming the key and the accepted values.
    """
    for key, (value, accepted) in choices.items():
        if value not in accepted:
            raise UserError(f"{key}={value}: use one of {', '.join(map(str, accepted))}")


@dataclass
class OptimizerConfig:
    """AdamW."""

    name: str = option("adamw", "adamw, or adamw8bit (CUDA only; 8-bit moments)")
    learning_rate: float = option(2e-5, "peak learning rate")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices; vectors have none")
    clip_norm: float = option(1.0, "gradients are scaled to at most this global norm; 0 for no clipping")
    schedule: str = option("constant", "constant or cosine, after the warm-up")
    warmup_steps: int = option(100, "linear warm-up from 0")
    final_ratio: float = option(0.1, "last learning rate of the cosine schedule over the peak")
    trainable: list[str] = option([], "patterns (shell style) of parameter names to train; empty trains all")

    def check(self, key: str) -> None:
        """Refuse values that no optimiser has.

        Args:
            key: Where these settings are in the job's configuration, such as ``training.optimizer``.

        Raises:
            UserError: naming the key and the accepted values.
        """
        refuse_other_values(
            {
                f"{key}.name": (self.name, ("adamw", "adamw8bit")),
                f"{key}.schedule": (self.schedule, ("constant", "cosine")),
            }
        )


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, kept on the ZeRO partitions."""

    decay: float = option(0.9999, "decay a step; 0 keeps no average")
    warmup: bool = option(True, "start with min(decay, (1 + step) / (10 + step)), so that short runs average too")
    warmup_steps: int = option(10_000, "steps after which the decay is constant in any case")


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = option(3, "3 partitions weights, gradients and optimiser state; 2 keeps weights whole")
    hpz_partition_size: int = option(1, "ranks of one node that keep a second copy of the weights (ZeRO++ hpZ)")
    offload_optimizer: bool = option(False, "keep optimiser state and master weights in host memory")
    persistence_elements: int = option(100_000, "parameters up to this size stay gathered between steps (stage 3)")
    bucket_elements: int = option(0, "elements of a gradient reduction; 0 chooses from the model's size")
    overlap: bool = option(True, "overlap communication and backward (CUDA)")


@dataclass
class WorkersConfig:
    """Training workers, one a GPU, or CPU processes."""

    num: int = option(2, "workers to start with")
    min: int = option(0, "elastic: continue with as few as this; 0 for a fixed number")
    gpus: int = option(0, "GPUs a worker; 0 trains on CPUs")
    cpus: int = option(1, "CPUs a worker, also its compute threads on CPU")
    max_failures: int = option(3, "restarts after a worker died, in failure_window_s; preemptions are not counted")
    failure_window_s: float = option(86_400.0, "a worker's death is forgotten after so long")
    resize_s: float = option(60.0, "elastic: how often to look for nodes to grow onto; a checkpoint is written first")


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = option(500, "write after so many steps; always at the end")
    every_s: float = option(600.0, "and after so many seconds; 0 for no clock")
    keep_last: int = option(2, "newest checkpoints kept")
    keep_best: bool = option(False, "also write and keep the checkpoint with the best validation loss")
    keep_every: int = option(0, "also keep every checkpoint whose step is a multiple; 0 keeps none")
    background: bool = option(True, "write while training goes on")
    wait_s: float = option(30.0, "how long a due one waits for the one before; after that it is put off")
    url: str = option("", "folder or fsspec URL of checkpoints, below it JOB/RUN/checkpoints; empty for the run's own")


@dataclass
class GuardConfig:
    """What to do with a bad step."""

    sigmas: float = option(8.0, "skip a step whose loss is further above the running mean; 0 only skips non-finite")
    warmup_steps: int = option(50, "steps before the running mean is trusted")
    max_skips: int = option(5, "consecutive skips before rolling back to the last checkpoint")
    max_rollbacks: int = option(2, "rollbacks before the run stops")
    hang_s: float = option(600.0, "dump all stacks and stop a worker that makes no step for so long; 0 never")


@dataclass
class ValidationConfig:
    """Loss on fixed (sample, noise, level) triples by task and noise level."""

    every_steps: int = option(0, "validate after so many steps; 0 never")
    samples_per_task: int = option(4, "held-out samples of each task")
    levels: int = option(9, "noise levels, evenly spaced inside (0, 1)")
    split: str = option("heldout", "index split the samples come from")
    beside: bool = option(False, "evaluate checkpoints in a task of its own, so that the training workers never stop")
    gpus: float = option(0.0, "GPUs of that task; 0 evaluates on a CPU")
    cpus: int = option(1, "CPUs of that task")


@dataclass
class TrainingConfig:
    """One training run."""

    steps: int = option(1000, "optimiser steps")
    seed: int = option(0, "seed of everything random")
    precision: str = option("bf16", "bf16 or fp32 weights and activations; master weights are always float32")
    sequence_ranks: int = option(1, "neighbouring workers that share every pack's tokens, for clips too long for one")
    activation_checkpointing: str = option(
        "none", "backward recomputes none, all but attention and matmuls (selective), or full"
    )
    deterministic: bool = option(False, "attention and sums in a fixed order on GPUs, for audits bit by bit; slower")
    compile: bool = option(False, "torch.compile each layer, lengths dynamic")
    data_threads: int = option(2, "threads that load samples in each worker")
    prefetch_steps: int = option(3, "steps loaded ahead")
    log_every: int = option(10, "steps between reports")
    split: str = option("train", "index split to train on")
    peak_tflops: float = option(0.0, "dense peak of a worker's device, for MFU; 0 looks it up by the GPU's name")
    efficiency: float = option(0.45, "share of the peak expected of executed operations, for the predicted step time")
    profile_steps: list[int] = option([], "steps that rank 0 traces with torch.profiler into the run's profile/")
    mixture: MixtureConfig = option(MixtureConfig, "")
    pack: PackConfig = option(PackConfig, "")
    optimizer: OptimizerConfig = option(OptimizerConfig, "")
    ema: EmaConfig = option(EmaConfig, "")
    zero: ZeroConfig = option(ZeroConfig, "")
    workers: WorkersConfig = option(WorkersConfig, "")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "")
    guard: GuardConfig = option(GuardConfig, "")
    validation: ValidationConfig = option(ValidationConfig, "")

    def check(self) -> None:
        """Refuse values no run can have.

        Raises:
            UserError: naming the key and the accepted values.
        """
        refuse_other_values(
            {
                "training.precision": (self.precision, ("bf16", "fp32")),
                "training.zero.stage": (self.zero.stage, (2, 3)),
            }
        )
        self.optimizer.check("training.optimizer")
        for workers in (self.workers.num, self.workers.min):
            if self.sequence_ranks > 0 and workers % self.sequence_ranks:
                raise UserError(f"training.sequence_ranks={self.sequence_ranks}: must divide {workers} workers")
        validation = self.validation
        if validation.beside and validation.every_steps % self.checkpoint.every_steps:
            raise UserError(
                f"training.validation.every_steps={validation.every_steps}: beside training it is checkpoints that are "
                f"evaluated; use a multiple of training.checkpoint.every_steps={self.checkpoint.every_steps}"
            )
        positive = {
            "steps": self.steps,
            "pack.tokens": self.pack.tokens,
            "workers.num": self.workers.num,
            "workers.cpus": self.workers.cpus,
            "log_every": self.log_every,
            "sequence_ranks": self.sequence_ranks,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "data_threads": self.data_threads,
            "prefetch_steps": self.prefetch_steps,
        }
        for key, value in positive.items():
            if value < 1:
                raise UserError(f"training.{key}={value}: must be at least 1")
