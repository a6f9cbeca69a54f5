"""The configuration of ``loomvideo pretrain``, ``finetune-edit``, ``distill`` and ``prefer``."""

from dataclasses import dataclass

from loomvideo.jobs.evaluation.config import JudgeConfig
from loomvideo.model.config import LoRAConfig
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.evaluation.judges.rewards import JudgedRewards
from loomvideo.pipelines.evaluation.rewards import REWARDS, Rewarder
from loomvideo.pipelines.training.config import (
    DistillConfig,
    FeaturePoolConfig,
    ObjectiveConfig,
    PreferConfig,
    RewardsConfig,
)
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.config import KernelConfig
from loomvideo.platform.shards.reading import ReadingConfig
from loomvideo.platform.training.config import TrainingConfig


@dataclass
class DataConfig:
    """What is trained on."""

    shards: list[str] = option([], "dataset folders or URLs made by `loomvideo data prepare`")
    reading: ReadingConfig = option(ReadingConfig, "")


@dataclass
class HeldoutConfig:
    """The evaluation on held-out samples at the end of the job."""

    samples: str = option("", "samples.jsonl with held-out samples; empty skips the evaluation")
    num_edits: int = option(24, "held-out editing samples to edit and measure")
    num_generated: int = option(6, "held-out generation samples to show")
    num_films: int = option(6, "videos kept as mp4")
    num_frames: int = option(17, "frames of a clip, whole latents: 4k+1 with a codec of temporal stride 4")
    buckets: list[int] = option([128], "resolution classes, as in `data prepare`")
    steps: int = option(20, "denoising steps")
    scale: float = option(2.5, "guidance scale of edits; 1 for no guidance")
    visual_scale: float = option(1.5, "guidance scale of the source and references")
    generate_scale: float = option(5.0, "guidance scale of generation without a source")
    seed: int = option(0, "seed of the noise")


@dataclass
class SamplesConfig:
    """Held-out samples generated while training goes on, from checkpoints, by a task of its own."""

    every_steps: int = option(
        0, "sample from evaluation.samples every so many steps, a multiple of training.checkpoint.every_steps; 0 never"
    )
    num_edits: int = option(4, "held-out editing samples")
    num_generated: int = option(2, "held-out generation samples")
    gpus: float = option(0.0, "GPUs of the task; 0 samples on a CPU")
    cpus: int = option(1, "CPUs of the task, also its compute threads on CPU")


@dataclass
class TrainingJobConfig:
    """One training job."""

    run: str = option("", "run name; the same name continues the run; empty makes a new one from the time")
    runs: str = option("runs", "folder of all runs; on a cluster, shared storage")
    model: str = option("tiny", "model size: tiny, small or 5b")
    from_run: str = option("", "start from this run: JOB/NAME, NAME or its folder; @STEP takes a checkpoint's weights")
    from_weights: str = option("", "start from weights: a folder, gen_model.pth, or a Wan2.2 diffusers folder")
    codec_folder: str = option("", "folder of the codec's weights, for model sizes that need one")
    mllm_folder: str = option("", "folder of the MLLM, for model sizes that need one")
    tracking_uri: str = option("", "MLflow; empty takes MLFLOW_TRACKING_URI, else a sqlite store in the runs folder")
    doctor: bool = option(True, "on a cluster, check every node before training")
    data: DataConfig = option(DataConfig, "")
    objective: ObjectiveConfig = option(ObjectiveConfig, "")
    lora: LoRAConfig = option(LoRAConfig, "")
    features: FeaturePoolConfig = option(FeaturePoolConfig, "")
    training: TrainingConfig = option(TrainingConfig, "")
    samples: SamplesConfig = option(SamplesConfig, "")
    evaluation: HeldoutConfig = option(HeldoutConfig, "")
    kernels: KernelConfig = option(KernelConfig, "")

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        if not self.data.shards:
            raise UserError("data.shards: name at least one folder made by `loomvideo data prepare`")
        if self.from_run and self.from_weights:
            raise UserError("from_run and from_weights: give one of them")
        model_size(self.model).grid.check_frames("evaluation.num_frames", self.evaluation.num_frames)
        if self.lora.rank < 0 or self.features.actors < 1:
            raise UserError("lora.rank and features.actors: lora.rank at least 0, features.actors at least 1")
        if self.lora.rank and self.training.optimizer.trainable:
            raise UserError("training.optimizer.trainable: with lora.rank set, name the patterns in lora.unfreeze")
        if self.samples.every_steps % self.training.checkpoint.every_steps:
            raise UserError(
                f"samples.every_steps={self.samples.every_steps}: samples are made from checkpoints; use a multiple of "
                f"training.checkpoint.every_steps={self.training.checkpoint.every_steps}"
            )
        self.data.reading.check()
        self.objective.check()
        self.training.check()


@dataclass
class DistillJobConfig(TrainingJobConfig):
    """One distillation: a training job whose start is the teacher."""

    distill: DistillConfig = option(DistillConfig, "")

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        super().check()
        self.distill.check()
        refuse_validation(self.training, "a model of few steps has no loss at single noise levels")
        if self.training.sequence_ranks > 1:
            raise UserError("training.sequence_ranks: distillation gives every worker packs of its own; use 1")
        if self.lora.unfreeze:
            raise UserError("lora.unfreeze: adapters alone are distilled, as the teacher is the weights under them")
        if self.lora.rank and self.distill.critic.trainable:
            raise UserError(
                "distill.critic.trainable: with lora.rank set, the critic trains its adapters; leave it empty"
            )
        if self.distill.critic_warmup >= self.training.steps:
            raise UserError(
                f"distill.critic_warmup={self.distill.critic_warmup}: the student's first turn comes after it; "
                f"training.steps={self.training.steps} counts the turns of both"
            )


def refuse_validation(training: TrainingConfig, why: str) -> None:
    """Refuse validation where there is nothing to validate on.

    Raises:
        UserError: naming what to watch instead.
    """
    if training.validation.every_steps:
        raise UserError(f"training.validation.every_steps: {why}; set 0 and watch samples.every_steps instead")


def refuse_watched_rewards(rewards: RewardsConfig) -> None:
    """Refuse to watch what is rewarded: it gets better however the reward is had.

    Raises:
        UserError: naming the metric, the weight or floor that makes a reward of it, and the list without it.
    """
    used = {name: f"floors.{name}" for name in rewards.floors}
    for name, weight in rewards.weights.items():
        if weight:
            used[REWARDS[name].metric if name in REWARDS else name] = f"weights.{name}"
    for metric in rewards.watched:
        if metric in used:
            others = ", ".join(name for name in rewards.watched if name not in used)
            raise UserError(
                f"prefer.rewards.watched: {metric} is what prefer.rewards.{used[metric]} is made of, so it cannot show "
                f"that one hacked; leave it out: prefer.rewards.watched=[{others}]"
            )


@dataclass
class PreferJobConfig(TrainingJobConfig):
    """One preference tuning: a training job whose start is also the reference."""

    prefer: PreferConfig = option(PreferConfig, "")
    judge: JudgeConfig = option(JudgeConfig, "")

    def rewarder(self, judge: JudgedRewards | None = None) -> Rewarder:
        """What scores results; without a judge it only knows what is asked for.

        Raises:
            UserError: for a reward that nobody gives, and for a metric that does not exist.
        """
        r = self.prefer.rewards
        return Rewarder(
            r.weights, r.floors, r.server, r.patience_s, r.watched, r.learned_weights, judge, self.prefer.nft.cpus
        )

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        super().check()
        self.prefer.check()
        self.judge.check()
        if self.prefer.method != "nft" and self.judge.kind != "none":
            raise UserError(f"judge.kind={self.judge.kind}: nothing is generated; use prefer.method=nft, or none")
        if self.prefer.method == "nft":
            for section in ("tasks", "datasets"):
                for name, weight in getattr(self.training.mixture, section).items():
                    if weight not in (0, 1):
                        raise UserError(
                            f"training.mixture.{section}.{name}={weight}: rounds ask all edits alike; 0 leaves it out, "
                            "other weights do nothing"
                        )
            judged = self.rewarder().judged
            refuse_watched_rewards(self.prefer.rewards)
            if judged and self.judge.kind == "none":
                raise UserError(f"prefer.rewards: {min(judged)} needs a judge; set judge.kind, such as openai")
            if self.judge.kind != "none" and not judged:
                raise UserError("judge.kind: no reward is a judge's; name judge in prefer.rewards.weights, or set none")
            steps = self.prefer.nft.rounds * self.prefer.nft.steps_per_round
            if self.training.steps != steps:
                raise UserError(
                    f"training.steps={self.training.steps}: rounds decide; set it to prefer.nft.rounds x "
                    f"steps_per_round = {steps}"
                )
        refuse_validation(self.training, "a preference has no loss at single noise levels")
        if self.training.sequence_ranks > 1:
            raise UserError("training.sequence_ranks: preference tuning gives every worker packs of its own; use 1")
        if self.lora.unfreeze:
            raise UserError("lora.unfreeze: adapters alone are tuned, as the reference is the weights under them")


JOB_SCHEMAS: dict[str, type[TrainingJobConfig]] = {"distill": DistillJobConfig, "prefer": PreferJobConfig}


def job_schema(job: str) -> type[TrainingJobConfig]:
    """The schema of a training job's configuration."""
    return JOB_SCHEMAS.get(job, TrainingJobConfig)
