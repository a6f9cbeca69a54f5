"""The stages as a Ray Data graph: samples stream through, so the judge works while the model still generates."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from loomvideo.pipelines.evaluation.judge_stage import JudgeStage
from loomvideo.pipelines.evaluation.rows import Row
from loomvideo.pipelines.evaluation.stages import GenerateStage, MeasureStage, NormaliseStage, PrepareStage


@dataclass(frozen=True)
class Resources:
    """How wide each stage runs.

    Attributes:
        generators: Actors with the model.
        generator_gpus: GPUs of each.
        generator_cpus: CPUs of each.
        measurers: Actors that keep the networks of learned metrics; 0 measures in plain tasks.
        measurer_gpus: GPUs of each.
        measurer_cpus: CPUs of each.
        judge_batch: Samples a judge call batch.
        judges: Actors with a local judge; one for a server, so that pace and budget hold for the whole run.
        judge_gpus: GPUs of each.
        judge_cpus: CPUs of each.
    """

    generators: int = 1
    generator_gpus: float = 0.0
    generator_cpus: float = 1.0
    measurers: int = 0
    measurer_gpus: float = 0.0
    measurer_cpus: float = 1.0
    judge_batch: int = 8
    judges: int = 1
    judge_gpus: float = 0.0
    judge_cpus: float = 0.0

    def held_cpus(self) -> float:
        """CPUs that actors hold for the whole run."""
        pools = ((self.generators, self.generator_cpus), (self.measurers, self.measurer_cpus))
        return sum(count * cpus for count, cpus in (*pools, (self.judges, self.judge_cpus)))


class _Generate:
    """The generator actor."""

    def __init__(self, make: Callable[[], GenerateStage]):
        self._stage = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _mapped(batch, self._stage)


class _Measure:
    """An actor that keeps the networks of learned metrics."""

    def __init__(self, stage: MeasureStage):
        self._stage = stage

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _mapped(batch, self._stage)


class _Judge:
    """A judge actor; its threads wait for a server's answers, or fill the batches of its local model."""

    def __init__(self, make: Callable[[], JudgeStage]):
        self._stage = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = self._stage([json.loads(text) for text in batch["row"]])
        return {"row": [json.dumps(row) for row in rows]}


def _mapped(batch: dict[str, Any], stage: Callable[[Row], Row]) -> dict[str, Any]:
    return {"row": [json.dumps(stage(json.loads(text))) for text in batch["row"]]}


def run_graph(
    rows: Sequence[Row],
    prepare: PrepareStage,
    generate: Callable[[], GenerateStage],
    normalise: NormaliseStage,
    measure: MeasureStage,
    judge: Callable[[], JudgeStage] | None,
    resources: Resources,
) -> Iterator[Row]:
    """Stream rows through the stages on the current Ray cluster.

    Rows travel as JSON text: Arrow would otherwise infer a different schema from every block's optional fields.

    Args:
        rows: What :func:`~loomvideo.pipelines.evaluation.stages.initial_rows` gave.
        prepare: Stage of CPU tasks.
        generate: Makes the generator stage, inside its actor.
        normalise: Stage of CPU tasks.
        measure: Stage of CPU tasks, or of actors that keep its networks.
        judge: Makes the judge stage, inside its actor; None for no judge.
        resources: Widths.

    Yields:
        Finished rows, in no order.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items([{"row": json.dumps(row)} for row in rows], override_num_blocks=max(1, len(rows)))
    dataset = dataset.map_batches(_mapped, batch_size=1, fn_args=(prepare,))
    dataset = dataset.map_batches(
        _Generate,
        batch_size=1,
        fn_constructor_args=(generate,),
        num_cpus=resources.generator_cpus,
        num_gpus=resources.generator_gpus or None,
        compute=ray.data.ActorPoolStrategy(size=resources.generators),
    )
    dataset = dataset.map_batches(_mapped, batch_size=1, fn_args=(normalise,))
    if resources.measurers:
        dataset = dataset.map_batches(
            _Measure,
            batch_size=1,
            fn_constructor_args=(measure,),
            num_cpus=resources.measurer_cpus,
            num_gpus=resources.measurer_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=resources.measurers),
        )
    else:
        dataset = dataset.map_batches(_mapped, batch_size=1, fn_args=(measure,))
    if judge is not None:
        dataset = dataset.map_batches(
            _Judge,
            batch_size=resources.judge_batch,
            fn_constructor_args=(judge,),
            num_cpus=resources.judge_cpus,
            num_gpus=resources.judge_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=resources.judges),
        )
    for row in dataset.iter_rows():
        finished = json.loads(row["row"])
        yield finished if "judgements" in finished else {**finished, "judgements": []}
