"""The stages of a prepare, one after another, each the same way.

A stage deals the samples that reach it into units of work, finds which of them have no committed result that still
holds, and gives those to a pool of workers; then it says what goes on to the next stage. :func:`~.job.prepare` runs the
list, :func:`~.staleness.stale_parts` says what that would do,
:func:`~.quarantine.retriable_work` finds what to try again.

=======  =====================  ========================================  =================================
stage    reads                  writes                                    workers
=======  =====================  ========================================  =================================
assess   frames of all samples  ``work/curation``: scores, decisions      CPUs; off unless ``curate=true``
caption  some frames            ``work/captions``: texts                  a model's GPU, or one asks a server
judge    some frames, texts     ``work/judgements``: scores               a model's GPU, or one asks a server
encode   clips, texts, scores   ``shards/*.tar``, ``work/records``        GPUs, and CPUs anywhere that feed them
=======  =====================  ========================================  =================================
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from loomvideo.pipelines.prepare.builder import ShardBuilder
from loomvideo.pipelines.prepare.caption_stage import (
    CAPTION_FOLDER,
    CaptionWorker,
    asked_inputs,
    caption_pool,
    caption_recipe,
    lost_by_captions,
    run_captions,
    with_captions,
)
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.curate import (
    CURATION_FOLDER,
    SampleAssessor,
    assess_recipe,
    assessments,
    decide,
    lost_by_curation,
)
from loomvideo.pipelines.prepare.inputs import Inputs, InputTable
from loomvideo.pipelines.prepare.judge_stage import (
    JUDGE_FOLDER,
    JudgeWorker,
    judge_pool,
    judge_recipe,
    judged_inputs,
    lost_by_judge,
    run_judge,
    with_judgements,
)
from loomvideo.pipelines.prepare.outcomes import RETRIABLE
from loomvideo.pipelines.prepare.pools import Pool, map_on_actors
from loomvideo.pipelines.prepare.recipe import encode_recipe
from loomvideo.pipelines.prepare.unit_rows import UnitReport, WorkRow
from loomvideo.pipelines.prepare.units import Dealing, UnitPlan, plan_units
from loomvideo.platform.folders import absolute
from loomvideo.platform.shards.commits import Commit
from loomvideo.platform.shards.manifest import SHARD_FOLDER
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.writer import RECORD_FOLDER, ShardRecord

_SAMPLES_IN_A_CHUNK = 64
Reports = Iterator[UnitReport]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: The name of the stage.
        redone: What a changed unit means for members, for ``loomvideo data diff``.
        folder: The folder of its results, in the dataset folder.
        worker: Class of its actors, made with the configuration and called with a row of work.
        on: Whether a configuration has it.
        pool: Its actors.
        dealing: How it deals samples into units.
        recipe: What every result depends on besides its samples.
        asked: Which of the inputs it works on.
        after: What goes on to the next stage, from all its results in unit order.
        lost: Keys in a result that another attempt may save.
        run: Runs its workers, where a plain pool of actors does not do.
        is_by_sample: Whether what goes on of a sample follows from its own result.
        vouches_for_tars: Whether a result counts only with the tar beside it.
    """

    name: str
    redone: str
    folder: str
    worker: type
    on: Callable[[PrepareConfig], bool]
    pool: Callable[[PrepareConfig], Pool]
    dealing: Callable[[PrepareConfig], Dealing]
    recipe: Callable[[PrepareConfig], tuple[object, ...]]
    asked: Callable[[Inputs, PrepareConfig], Inputs]
    after: Callable[[Iterable[bytes], Inputs, PrepareConfig], Inputs]
    lost: Callable[[bytes], set[str]]
    run: Callable[[PrepareConfig, list[WorkRow]], Reports] | None = None
    is_by_sample: bool = False
    vouches_for_tars: bool = False

    def plan(
        self,
        storage: Storage,
        inputs: Inputs,
        config: PrepareConfig,
        again: Collection[str] = (),
        redeal: bool = False,
    ) -> UnitPlan:
        """Deal the inputs and find what is stale; writes nothing."""
        sizes = storage.sizes(SHARD_FOLDER) if self.vouches_for_tars else {}

        def sound(commit: Commit) -> bool:
            return not commit.num_bytes or sizes.get(f"{commit.unit}.tar") == commit.num_bytes

        return plan_units(
            storage, self.name, self.folder, self.asked(inputs, config), self.dealing(config), self.recipe(config),
            again, redeal and self.vouches_for_tars, sound,
        )  # fmt: skip


def _after_assessing(results: Iterable[bytes], inputs: Inputs, config: PrepareConfig) -> Inputs:
    kept, outcomes = decide(list(assessments(results)), config)
    collected = InputTable(config)
    for sample, assessed in kept:
        collected.add(sample, {"scores": assessed.scores, "reasons": list(assessed.reasons)})
    return collected.finish([*inputs.losses, *outcomes])


def _lost_by_builders(result: bytes) -> set[str]:
    losses = ShardRecord.from_bytes(result, f"a record in {RECORD_FOLDER}").losses
    return {loss["key"] for loss in losses if loss["outcome"] == "quarantined" and loss["reason"] in RETRIABLE}


ASSESS = Stage(
    name="assess",
    redone="scores",
    folder=CURATION_FOLDER,
    worker=SampleAssessor,
    on=lambda config: config.curate,
    pool=lambda config: Pool(config.curation_workers.count, config.curation_workers.cpus),
    dealing=lambda config: Dealing("assess", _SAMPLES_IN_A_CHUNK),
    recipe=assess_recipe,
    asked=lambda inputs, config: inputs,
    after=_after_assessing,
    lost=lost_by_curation,
)
CAPTION = Stage(
    name="caption",
    redone="mllm",
    folder=CAPTION_FOLDER,
    worker=CaptionWorker,
    on=lambda config: config.makes_texts,
    pool=caption_pool,
    # In the order of shards, so that the first have all their texts early.
    dealing=lambda config: Dealing("caption", _SAMPLES_IN_A_CHUNK, seed=config.seed),
    recipe=lambda config: (caption_recipe(config),),
    asked=asked_inputs,
    after=with_captions,
    lost=lost_by_captions,
    run=run_captions,
    is_by_sample=True,
)
JUDGE = Stage(
    name="judge",
    redone="scores",
    folder=JUDGE_FOLDER,
    worker=JudgeWorker,
    on=lambda config: config.judge.backend != "off",
    pool=judge_pool,
    dealing=lambda config: Dealing("judge", _SAMPLES_IN_A_CHUNK, seed=config.seed),
    recipe=lambda config: (judge_recipe(config),),
    asked=judged_inputs,
    after=with_judgements,
    lost=lost_by_judge,
    run=run_judge,
    is_by_sample=True,
)
ENCODE = Stage(
    name="encode",
    redone="everything",
    folder=RECORD_FOLDER,
    worker=ShardBuilder,
    on=lambda config: True,
    # Two: one is encoded while the other is fetched or uploaded.
    pool=lambda config: Pool(config.workers.count, config.workers.cpus, config.workers.gpus, rows=2),
    dealing=lambda config: Dealing("", config.shards.max_samples, config.shards.target_bytes, config.seed),
    recipe=encode_recipe,
    asked=lambda inputs, config: inputs,
    after=lambda results, inputs, config: inputs,
    lost=_lost_by_builders,
    vouches_for_tars=True,
)
STAGES = (ASSESS, CAPTION, JUDGE, ENCODE)


def stages_of(config: PrepareConfig) -> list[Stage]:
    """The stages that a configuration has; encoding is the last."""
    return [stage for stage in STAGES if stage.on(config)]


def run_stage(stage: Stage, config: PrepareConfig, work: list[WorkRow]) -> Reports:
    """Work through a stage's rows on the Ray cluster; yields a report a unit."""
    config = reached_by_workers(config)
    if stage.run is not None:
        yield from stage.run(config, work)
    else:
        yield from map_on_actors(stage.worker, (config,), work, stage.pool(config))


def reached_by_workers(config: PrepareConfig) -> PrepareConfig:
    """A configuration whose places mean the same to workers: Ray may have been started in another folder."""
    return dataclasses.replace(
        config,
        input=absolute(config.input),
        output=absolute(config.output),
        codec_folder=absolute(config.codec_folder),
        mllm_folder=absolute(config.mllm_folder),
    )
