"""Texts for a whole dataset: any known layout in, a sample file with texts out, every sample accounted for.

A server is asked by threads of this process; a model that runs here is loaded by Ray actors, one a GPU. Answers are
cached, so an interrupted or repeated run asks only what is new.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypedDict

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions.captioner import Captioner, CaptionResult, with_text
from loomvideo.pipelines.captions.cost import CaptionCost, caption_cost, check_budget
from loomvideo.pipelines.captions.frames import FrameReader
from loomvideo.pipelines.captions.options import CaptionOptions, CaptionWorkers
from loomvideo.pipelines.sources import Rejected, open_source
from loomvideo.pipelines.sources.samples import Sample, stored_sample
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclasses.dataclass
class CaptionDatasetConfig:
    """A dataset and what its texts are made with."""

    input: str = option("???", "dataset in any layout of docs/sources.md, a local path or URL")
    output: str = option("???", "folder for samples.jsonl and captions.parquet, a local path or URL")
    format: str = option("auto", "layout of the input")
    format_options: dict[str, Any] = option({}, "options of the layout")
    captions: CaptionOptions = option(CaptionOptions, "")
    workers: CaptionWorkers = option(CaptionWorkers, "")


class LedgerRow(TypedDict):
    """What came of an input.

    Attributes:
        key: The sample's key, or where in the input the line stands that is none.
        dataset: The dataset that it counts for.
        status: ``made``, ``existing`` or why there is no text.
        model: The model that answered.
        digest: Hash of the question.
        detail: One line for a person.
        written: Whether the sample is in the output.
    """

    key: str
    dataset: str
    status: str
    model: str
    digest: str
    detail: str
    written: bool


@dataclasses.dataclass
class CaptionedDataset:
    """What captioning a dataset gives.

    Attributes:
        samples: Those that have a text, in input order.
        ledger: What came of every input.
    """

    samples: list[Sample]
    ledger: list[LedgerRow]


Asked = Iterable[tuple[Sample, CaptionResult]]
Progress = Callable[[int, int], None]


def caption_dataset(
    config: CaptionDatasetConfig,
    ask: Callable[[CaptionOptions, list[Sample]], Asked],
    progress: Progress | None = None,
    before: Callable[[CaptionCost], None] = lambda cost: None,
) -> CaptionedDataset:
    """Read a dataset and make its texts.

    Args:
        config: The configuration of the job.
        ask: :func:`ask_server`, :func:`ask_actors` for a model that runs here, or ``ray_llm.ask_ray_llm``.
        progress: Called with the number of answers and of questions.
        before: Called with the estimated cost before the first question.

    Raises:
        UserError: for bad input, a cost over the budget, or when no sample has a text at the end.
    """
    config.captions.check()
    entries = [_unfinished(e) for e in open_source(config.input, config.format, **config.format_options)]
    samples = [entry for entry in entries if isinstance(entry, Sample)]
    if len({sample.key for sample in samples}) != len(samples):
        raise UserError(f"input={config.input}: two samples have the same key")
    asked = [sample for sample in samples if asked_for(sample, config.captions)]
    cost = caption_cost(asked, config.captions)
    check_budget(cost, config.captions)
    before(cost)
    answers: dict[str, tuple[Sample, CaptionResult]] = {}
    for sample, result in ask(config.captions, asked):
        answers[result.key] = (sample, result)
        if progress is not None:
            progress(len(answers), len(asked))
    missing = [sample.key for sample in asked if sample.key not in answers]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(asked)} samples came back without a result, first {missing[0]}")
    finished: list[Sample] = []
    ledger: list[LedgerRow] = []
    for entry in entries:
        if isinstance(entry, Rejected):
            ledger.append(
                LedgerRow(
                    key=entry.where,
                    dataset=entry.dataset,
                    status=entry.reason,
                    model="",
                    digest="",
                    detail=entry.detail,
                    written=False,
                )
            )
            continue
        sample, result = answers.get(entry.key, (entry, CaptionResult(entry.key, "", "existing")))
        ledger.append(
            LedgerRow(
                key=result.key,
                dataset=entry.dataset,
                status=result.status,
                model=result.model,
                digest=result.digest,
                detail=result.detail,
                written=bool(sample.text),
            )
        )
        if sample.text:
            finished.append(sample)
    if not finished:
        first = next((row["detail"] for row in ledger if row["detail"]), "no sample in it")
        raise UserError(f"input={config.input}: no sample has a text at the end; first: {first}")
    return CaptionedDataset(finished, ledger)


def asked_for(sample: Sample, options: CaptionOptions) -> bool:
    """Whether the mode is about this kind of sample: the text of an edit is its instruction, of others a caption."""
    return TASKS[sample.task].needs_source == (options.mode == "instruction")


def _unfinished(entry: Sample | Rejected) -> Sample | Rejected:
    return entry.unfinished if isinstance(entry, Rejected) and entry.unfinished is not None else entry


def ask_server(options: CaptionOptions, samples: list[Sample]) -> Iterator[tuple[Sample, CaptionResult]]:
    """Ask from threads of this process."""
    reader = FrameReader(options.num_frames, options.max_side)
    try:
        yield from Captioner(options).run(samples, reader)
    finally:
        reader.close()


class CaptionActor:
    """A model and a decoder; one a Ray actor."""

    def __init__(self, options: CaptionOptions):
        self.options = options
        self.captioner = Captioner(options)
        self.reader = FrameReader(options.num_frames, options.max_side)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Make one sample's text."""
        sample = stored_sample(row["sample"])
        result = self.captioner.caption(sample, self.reader)
        return {"sample": row["sample"], "result": json.dumps(dataclasses.asdict(result))}


def ask_actors(workers: CaptionWorkers) -> Callable[[CaptionOptions, list[Sample]], Asked]:
    """Ask models in a pool of Ray actors; only rows of text travel."""

    def ask(options: CaptionOptions, samples: list[Sample]) -> Iterator[tuple[Sample, CaptionResult]]:
        import ray

        from loomvideo.platform.ray_session import quiet_data

        quiet_data()
        rows = [{"sample": sample.to_json()} for sample in samples]
        dataset = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), workers.count * 16))).map(
            CaptionActor,
            fn_constructor_args=(options,),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            # Grows with the cluster, which may start without nodes.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(workers.count, 1)),
        )
        for row in dataset.iter_rows():
            sample = stored_sample(row["sample"])
            result = CaptionResult(**json.loads(row["result"]))
            if result.key != sample.key:
                raise RuntimeError(f"text of {result.key} came back for {sample.key}")
            yield with_text(sample, result, options.mode), result

    return ask
