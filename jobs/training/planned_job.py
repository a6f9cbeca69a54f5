"""What a job's preset says that its plan needs, so that the two cannot differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from loomvideo.jobs.command import job_config
from loomvideo.jobs.training.config import DistillJobConfig, PreferJobConfig, TrainingJobConfig, job_schema
from loomvideo.model.buckets import choose_bucket
from loomvideo.model.flops import relative_cost
from loomvideo.model.guidance import Guidance
from loomvideo.model.sizes import ModelSize, model_size
from loomvideo.platform.errors import UserError

MLLM_TOKENS = 830
"""Of an edit of 121 frames, its source and its instruction; estimated."""


@dataclass(frozen=True)
class PlannedJob:
    """A job and the pack that is planned for it.

    Attributes:
        name: Its preset.
        config: Its configuration.
        size: Its model's size.
        lengths: Tokens of each sample of a pack.
        mllm_lengths: Their MLLM tokens.
        cost: What they count of ``training.pack.tokens``.
    """

    name: str
    config: TrainingJobConfig
    size: ModelSize
    lengths: list[int]
    mllm_lengths: list[int]
    cost: float

    @property
    def branches(self) -> int:
        """Guidance branches of an edit, as the teacher of a distillation computes them."""
        config = self.config
        if not isinstance(config, DistillJobConfig):
            raise TypeError("a distillation alone has a teacher")
        return len(Guidance(config.distill.scale, config.distill.visual_scale).weights())

    @property
    def passes(self) -> float:
        """Passes of a result of a round: its sampler's steps by the branches that its guidance scales leave."""
        config = self.config
        if not isinstance(config, PreferJobConfig):
            raise TypeError("rounds alone have results")
        nft = config.prefer.nft
        branches = [len(Guidance(nft.scale_of(each), nft.visual_scale).weights()) for each in range(nft.repeats)]
        return nft.sampler_steps * sum(branches) / nft.repeats


def planned_job(
    method: str,
    model: str,
    like: str = "",
    changes: Sequence[str] = (),
    lengths: Sequence[int] = (),
    mllm_lengths: Sequence[int] = (),
) -> PlannedJob:
    """The job that a plan is made for.

    Args:
        method: ``distill`` or ``prefer``.
        model: The model size, where ``like`` names no preset.
        like: A preset of the job, or a YAML file.
        changes: ``section.key=value`` over it, as the job takes them.
        lengths: Tokens of each sample of a pack; none for as many edits as the budget holds, of the size of the
            preset's evaluation, 480x832 in the class 640.
        mllm_lengths: Their MLLM tokens.

    Raises:
        UserError: for a job that does not run, and for a pack that the preset's budget does not hold.
    """
    preset = like or ("5b-lora" if (method, model) == ("prefer", "5b") else model)
    config = job_config(job_schema(method), method, [f"preset={preset}", "data.shards=[planned]", *changes])
    config.check()
    if isinstance(config, PreferJobConfig) and config.prefer.method != "nft":
        steps = config.prefer.nft.rounds * config.prefer.nft.steps_per_round
        raise UserError(
            f"prefer.method={config.prefer.method}: nothing is generated, and rounds are planned; use "
            f"'changes=[prefer.method=nft,training.steps={steps}]'"
        )
    size, budget = model_size(config.model), config.training.pack
    if lengths:
        cost = sum(relative_cost(size.dit, n, m, n) for n, m in zip(lengths, mllm_lengths, strict=True))
        if cost > budget.tokens:
            raise UserError(
                f"lengths: count {cost:,.0f}, more than training.pack.tokens={budget.tokens} of preset {preset}; give "
                f"fewer, or plan another budget with 'changes=[training.pack.tokens={-(-int(cost) // 1000) * 1000}]'"
            )
        return PlannedJob(preset, config, size, list(lengths), list(mllm_lengths), cost)
    bucket = choose_bucket(832, 480, config.evaluation.buckets, "video")
    tokens = size.grid.num_tokens(config.evaluation.num_frames, *bucket)
    one = float(relative_cost(size.dit, tokens, MLLM_TOKENS, tokens))
    rooms = (budget.tokens, one), (budget.max_tokens, tokens), (budget.max_context_tokens, MLLM_TOKENS)
    edits = int(min(room / needed for room, needed in rooms if room))
    if edits < 1:
        raise UserError(
            f"lengths: an edit of {tokens:,} tokens and {MLLM_TOKENS} MLLM tokens counts {one:,.0f} and does not fit "
            f"training.pack of preset {preset} (tokens={budget.tokens}); give lengths and mllm_lengths"
        )
    return PlannedJob(preset, config, size, [tokens] * edits, [MLLM_TOKENS] * edits, edits * one)
