"""Configuration of what is learned from a sample, and of the actors that compute its MLLM states."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import OptimizerConfig

if TYPE_CHECKING:
    from loomvideo.model.few_steps import FewSteps


@dataclass
class ObjectiveConfig:
    """What is learned from a sample."""

    use_source_embedding: bool = option(True, "Scale-and-Add is on; off in stage 1")
    shift_scale: float = option(0.5, "timestep shift added per doubling of tokens over the base; 0.65 in stage 1")
    shift_base_tokens: int = option(64, "tokens up to which timesteps are not shifted; small videos need fewer")
    shift_limit: float = option(8.0, "largest timestep shift")
    generate_shift_scale: float | None = option(
        None, "shift_scale of samples without a source, which must also learn to remove the last noise; null: the same"
    )
    generate_shift_limit: float | None = option(None, "shift_limit of samples without a source; null: the same")
    start_as_copy: bool = option(
        False, "from scratch: begin with velocities that copy the source, so that short runs need not learn that first"
    )
    drop_all: float = option(0.1, "share of visits trained without any conditioning, for guidance")
    drop_text: float = option(0.1, "share of visits trained without text, pictures kept, for guidance")

    def shift(self, has_source: bool) -> tuple[float, int, float]:
        """Scale, base tokens and limit of the timestep shift.

        Args:
            has_source: Whether a source stands beside the target, as in edits; dropped conditioning changes nothing.
        """
        scale, limit = self.shift_scale, self.shift_limit
        if not has_source:
            scale = scale if self.generate_shift_scale is None else self.generate_shift_scale
            limit = limit if self.generate_shift_limit is None else self.generate_shift_limit
        return scale, self.shift_base_tokens, limit

    def check(self) -> None:
        """Raise UserError for shares that are none and a limit below no shift."""
        for key in ("shift_limit", "generate_shift_limit"):
            limit = getattr(self, key)
            if limit is not None and limit < 1:
                raise UserError(f"objective.{key}={limit}: at least 1, which shifts nothing")
        if min(self.drop_all, self.drop_text) < 0 or self.drop_all + self.drop_text > 1:
            raise UserError("objective.drop_all and objective.drop_text: shares that add up to at most 1")


@dataclass
class FeaturePoolConfig:
    """The actors that compute MLLM states for datasets prepared with features.mode=streamed or text."""

    actors: int = option(1, "frozen MLLMs")
    gpus: float = option(0.0, "GPUs of each; 0 computes on CPUs")
    cpus: int = option(1, "CPUs of each, also its compute threads on CPU")
    packed: bool = option(False, "prompts that arrive together go through it one behind another, without padding")


@dataclass
class DistillConfig:
    """Distribution matching distillation: a student of a few steps from a guided teacher."""

    schedule: list[float] = option([1000.0, 750.0, 500.0, 250.0], "the student's timesteps, 1 to 8, from 1000 down")
    shift: float = option(5.0, "moves the schedule towards noise as the sampler's flow_shift does; 1 leaves it")
    generate_shift: float | None = option(None, "the same of tasks without a source; null: the same")
    scale: float = option(2.5, "the teacher's guidance scale of edits, folded in; 1 for none")
    visual_scale: float = option(1.5, "the teacher's guidance scale of source and references; 1 for none")
    generate_scale: float = option(5.0, "the teacher's guidance scale of generation without a source; 1 for none")
    critic_steps: int = option(5, "turns of the critic for one of the student")
    critic_warmup: int = option(100, "turns of the critic before the student's first")
    min_level: float = option(0.02, "lowest level at which teacher and critic are compared, before the shift")
    max_level: float = option(0.98, "highest level, before the shift")
    critic: OptimizerConfig = option(OptimizerConfig, "")

    def few_steps(self) -> "FewSteps":
        """What the student learns to do.

        Raises:
            UserError: for a schedule that cannot be sampled.
        """
        from loomvideo.model.few_steps import FewSteps  # knows torch, which the command line does without

        folded = {"scale": self.scale, "visual_scale": self.visual_scale, "generate_scale": self.generate_scale}
        try:
            return FewSteps.of(self.schedule, self.shift, folded, self.generate_shift)
        except UserError as error:
            raise UserError(f"distill.{error}") from error

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            UserError: naming the key.
        """
        self.few_steps()
        if not 0 <= self.min_level < self.max_level <= 1:
            raise UserError(
                f"distill.min_level={self.min_level} and max_level={self.max_level}: 0 <= min_level < max_level <= 1"
            )
        if self.critic_steps < 1 or self.critic_warmup < 0:
            raise UserError("distill.critic_steps and critic_warmup: at least 1, and at least 0")
        self.critic.check("distill.critic")


@dataclass
class SourcePreferenceConfig:
    """Direct preference optimisation with the source as rejected sample."""

    beta: float = option(50.0, "how sharply the margin of squared errors decides")
    cap: float = option(0.1, "margin above which nothing is gained by being worse at the source")
    anchor: float = option(50.0, "charge for a growing error of the target itself; 0 for none")
    relative: bool = option(
        False, "count errors in parts of the squared difference of target and source; beta, cap and anchor then too"
    )

    def check(self) -> None:
        """Raise UserError for values that prefer nothing."""
        if self.beta <= 0 or self.cap <= 0 or self.anchor < 0:
            raise UserError("prefer.source: beta and cap above 0, anchor at least 0")


@dataclass
class RewardsConfig:
    """What samples are scored by; see `docs/distillation.md` for the names."""

    weights: dict[str, float] = option(
        {"garment_colour": 1.0},
        "weight of each reward, in its own unit; what is named joins the preset's, 0 leaves it out",
    )
    learned_weights: dict[str, str] = option(
        {}, "file or folder of a network whose figures are named, as in `loomvideo evaluate` (….learned_weights.clip=…)"
    )
    floors: dict[str, float] = option({}, "least values of metrics, such as outside_psnr_db: 25; below it, the worst")
    watched: list[str] = option(
        ["sharpness", "edge_f1"],
        "metrics that no reward or floor is made of, which are refused, reported to see a reward hacked",
    )
    server: str = option("", "URL that also scores samples: its rewards may be named in weights")
    patience_s: float = option(
        600.0, "how long a server or judge that is away is asked again before samples count as failed, once an outage"
    )


@dataclass
class NFTConfig:
    """DiffusionNFT in rounds of generating, scoring and training."""

    rounds: int = option(8, "rounds")
    prompts: int = option(64, "samples of the shards that are asked in a round")
    edits: list[str] = option(
        [], "kinds of edit that are asked, as a sample's extra.edit.kind names them, such as [recolour]; empty asks all"
    )
    repeats: int = option(8, "results of each, compared with each other")
    steps_per_round: int = option(40, "optimiser steps after each")
    sampler_steps: int = option(20, "denoising steps of the results; a distilled model takes its own")
    scale: float = option(1.0, "guidance scale of the results; 1 for none")
    scales: list[float] = option(
        [], "guidance scales that a prompt's results take in turn, as noise alone may hardly change them; empty: scale"
    )
    same_noise: bool = option(False, "a prompt's results start from one noise, so that they differ by scales alone")
    visual_scale: float = option(1.0, "guidance scale of source and references")
    beta: float = option(1.0, "how far the two policies lie from the old one; less goes further in a round")
    spread: float = option(1.0, "rewards are r = 1/2 + (reward - mean) / (2 spread std) of their prompt, within [0, 1]")
    drift_weight: float = option(0.0, "charge for the distance from the weights of the start")
    actors: int = option(
        1,
        "actors that generate and score, and end before training takes their devices; a lost one is replaced, up to "
        "training.workers.max_failures times a round",
    )
    gpus: float = option(0.0, "GPUs of each; 0 generates on CPUs")
    cpus: int = option(1, "CPUs of each, and results of a prompt that it scores at once")

    def scale_of(self, repeat: int) -> float:
        """The guidance scale of a prompt's result number ``repeat``."""
        return self.scales[repeat % len(self.scales)] if self.scales else self.scale

    def check(self) -> None:
        """Raise UserError for rounds without samples or comparisons."""
        least = {"rounds": 1, "prompts": 1, "repeats": 2, "steps_per_round": 1, "sampler_steps": 1, "actors": 1}
        least |= {"cpus": 1, "gpus": 0}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise UserError(f"prefer.nft.{key}={getattr(self, key)}: must be at least {value}")
        if self.same_noise and len(set(self.scales)) < self.repeats:
            raise UserError(
                f"prefer.nft.same_noise: {self.repeats} results differ by scales alone; give as many prefer.nft.scales"
            )
        if self.beta <= 0 or self.spread <= 0 or self.drift_weight < 0:
            raise UserError("prefer.nft: beta and spread above 0, drift_weight at least 0")


@dataclass
class PreferConfig:
    """Preference tuning."""

    method: str = option("source", "source: targets over sources, nothing generated; nft: rounds of scored results")
    source: SourcePreferenceConfig = option(SourcePreferenceConfig, "")
    nft: NFTConfig = option(NFTConfig, "")
    rewards: RewardsConfig = option(RewardsConfig, "")

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            UserError: naming the key.
        """
        if self.method not in ("source", "nft"):
            raise UserError(f"prefer.method={self.method}: use source or nft")
        self.source.check()
        self.nft.check()
