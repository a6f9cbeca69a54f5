"""A vision-language model as a judge of samples: whether an edit did what its instruction asks, and nothing else.

It asks the questions of the evaluation's rubrics (``pipelines/evaluation/judges/rubrics.yaml``), each axis from 1 to 5,
with the pools, the cache, the pace and the budget of captions. It comes after captioning, so that instructions made
there are judged too. Scores go to the index as ``score_vlm_*``; a sample below a limit is filtered.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions.captioner import Captioner, CaptionResult, ReadFrames
from loomvideo.pipelines.captions.cost import CaptionCost, check_budget
from loomvideo.pipelines.captions.frames import FrameReader, Frames
from loomvideo.pipelines.captions.requests import CaptionRequest
from loomvideo.pipelines.captions.schema import json_answer
from loomvideo.pipelines.evaluation.judges.inputs import media_for_item
from loomvideo.pipelines.evaluation.judges.rubrics import own_rubrics
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.config import JudgeOptions, PrepareConfig
from loomvideo.pipelines.prepare.inputs import Inputs, InputTable
from loomvideo.pipelines.prepare.outcomes import RETRIABLE, Outcome
from loomvideo.pipelines.prepare.pools import Pool, map_on_actors
from loomvideo.pipelines.prepare.unit_rows import UnitReport, WorkRow
from loomvideo.pipelines.prepare.units import commit_result, read_planned
from loomvideo.pipelines.sources.samples import Sample, stored_sample
from loomvideo.pipelines.vlm.requests import FrameSampling, labelled
from loomvideo.pipelines.vlm.session import Prices
from loomvideo.platform.shards.plan import digest
from loomvideo.platform.shards.storage import Storage

logger = logging.getLogger(__name__)
JUDGE_FOLDER = "work/judgements"
SCORE_PREFIX = "vlm_"
_VERSION = 1
_REASONING = "reasoning"
_ANSWER_TOKENS, _CHARACTERS_A_TOKEN = 120, 4


@dataclasses.dataclass(frozen=True)
class JudgeRequest(CaptionRequest):
    """The rubric of a sample's task, about the sample; its axes are scored from 1 to 5."""

    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer."""
        properties: dict[str, Any] = {"id": {"enum": [self.code]}, _REASONING: {"type": "string", "maxLength": 2000}}
        properties |= {axis: {"type": "integer", "minimum": 1, "maximum": 5} for axis in self.axes}
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def parse(self, text: str) -> dict[str, Any]:
        """The scores and the reasoning.

        Raises:
            InvalidAnswerError: naming the field that breaks the schema.
        """
        return json_answer(text, self.schema(), self.code)


def judge_request(sample: Sample, frames: Frames, sampling: FrameSampling, structured: bool = True) -> JudgeRequest:
    """Ask about a sample.

    Args:
        sample: The sample with its text.
        frames: The frames of target, source and references.
        sampling: Which frames are shown, how large.
        structured: Whether the server takes a JSON schema; the wording asks for JSON in any case.
    """
    item = EvalItem(sample.dataset, sample.key, sample.task, "", sample.text, sample.source)
    question = own_rubrics().question(item)
    references = [np.asarray(picture)[0] for picture in frames.references]
    media = media_for_item(sampling, frames.target, frames.source, references)
    hashed = [_VERSION, question.text, [(m.label, m.digest) for m in media]]
    named = hashlib.sha256(json.dumps(hashed).encode()).hexdigest()
    request = JudgeRequest((), question.axes, structured, sample_key=sample.key, mode="judge", digest=named)
    form = request.schema()
    parts = labelled(f"{question.text}\nAnswer with nothing but JSON of this schema: {json.dumps(form)}", media)
    return dataclasses.replace(request, parts=parts)


class PairJudge(Captioner):
    """Judges samples as a captioner describes them: many at a time, each answer proven to belong to its sample."""

    def caption(self, sample: Sample, read_frames: ReadFrames) -> CaptionResult:
        """Judge one sample; the scores are the result's fields."""
        try:
            frames = Frames(*read_frames(sample))
        except DecodeError as error:
            return CaptionResult(sample.key, "", error.reason, detail=str(error))
        structured = self.options.backend != "transformers"
        return self._ask(judge_request(sample, frames, self._sampling, structured))

    def finished(self, sample: Sample, result: CaptionResult) -> Sample:
        """Nothing of the sample changes."""
        return sample


class JudgeWorker:
    """Judges the samples of a unit; one a Ray actor.

    Args:
        config: The configuration of the job.
    """

    def __init__(self, config: PrepareConfig):
        options = config.judge.asking()
        self.storage = Storage(config.output)
        self.judge = PairJudge(options)
        base = base_folder(config.input)
        self.reader = FrameReader(options.num_frames, options.max_side, base, config.workers.decode_timeout_s)

    def __call__(self, row: WorkRow) -> UnitReport:
        """Judge the unit that a row names and commit the answers."""
        samples = _samples(self.storage, row)
        found = {result.key: result for _, result in self.judge.run(samples, self.reader)}
        results = [dataclasses.asdict(found[sample.key]) for sample in samples]
        commit_result(self.storage, JUDGE_FOLDER, row, {"results": results})
        asked = sum(result.status == "made" for result in found.values())
        return {"stage": "judge", "unit": row["unit"], "judged": len(results), "asked": asked}

    def close(self) -> None:
        """End the decoder process."""
        self.reader.close()


def _samples(storage: Storage, row: WorkRow) -> list[Sample]:
    return [stored_sample(planned["sample"]) for planned in read_planned(storage, row)]


def judged_inputs(inputs: Inputs, config: PrepareConfig) -> Inputs:
    """The samples of the tasks that are judged."""
    wanted = [sample.task in config.judge.tasks and bool(sample.text) for sample in inputs.samples()]
    return Inputs(inputs.table.filter(pa.array(wanted, pa.bool_())), [])


def judge_recipe(config: PrepareConfig) -> str:
    """Names all that the judgements depend on besides the samples; limits are no part of it."""
    judge = config.judge
    asked = (judge.backend, judge.model, judge.max_tokens, judge.num_frames, judge.max_side, sorted(judge.tasks))
    return digest("judge", _VERSION, own_rubrics().digest, json.dumps(asked))


def judge_pool(config: PrepareConfig) -> Pool:
    """Actors that hold a model, or that ask a server, each with a decoder of its own."""
    workers = config.judge_workers
    return Pool(workers.count, workers.cpus, 0.0 if config.judge.backend == "openai" else workers.gpus)


def judge_cost(samples: Iterable[Sample], options: JudgeOptions) -> CaptionCost:
    """Estimate what judging the samples costs."""
    prices = Prices(options.input_usd, options.output_usd)
    questions = tokens_in = 0
    for sample in samples:
        text = own_rubrics().question(EvalItem("", sample.key, sample.task, "", sample.text, sample.source)).text
        shown = 1 if TASKS[sample.task].is_image else options.num_frames
        shown = shown * (2 if sample.source else 1) + len(sample.references)
        questions += 1
        tokens_in += 2 * len(text) // _CHARACTERS_A_TOKEN + shown * prices.tokens_per_frame
    tokens_out = questions * _ANSWER_TOKENS
    hours = questions / options.per_minute / 60 if options.per_minute else 0.0
    return CaptionCost(questions, tokens_in, tokens_out, prices.cost_usd(tokens_in, tokens_out), hours)


def run_judge(config: PrepareConfig, work: list[WorkRow]) -> Iterator[UnitReport]:
    """Judge units on the Ray cluster; yields a report a unit.

    Raises:
        UserError: if the estimate passes ``judge.budget_usd``.
    """
    storage, judge = Storage(config.output), config.judge
    cost = judge_cost((sample for row in work for sample in _samples(storage, row)), judge)
    check_budget(cost, judge.asking(), "judge")
    logger.warning("judge: %s (estimated; answers in %s cost nothing)", cost, judge.cache)
    share = judge.per_minute / max(min(config.judge_workers.count or len(work), len(work)), 1)
    judge = dataclasses.replace(judge, cache=os.path.abspath(judge.cache), per_minute=share)
    yield from map_on_actors(JudgeWorker, (dataclasses.replace(config, judge=judge),), work, judge_pool(config))


def lost_by_judge(result: bytes) -> set[str]:
    """Keys of a committed result that another attempt may judge."""
    return {values["key"] for values in json.loads(result)["results"] if values["status"] in RETRIABLE}


def with_judgements(results: Iterable[bytes], inputs: Inputs, config: PrepareConfig) -> Inputs:
    """The inputs with their scores; samples below a limit or without an answer are set aside with the reason."""
    found = {values["key"]: CaptionResult(**values) for data in results for values in json.loads(data)["results"]}
    losses, collected = list(inputs.losses), InputTable(config)
    for sample, assessed in zip(inputs.samples(), inputs.assessed(), strict=True):
        result = found.get(sample.key)
        if result is None:
            collected.add(sample, assessed)
            continue
        if not result.succeeded:
            losses.append(Outcome.of(sample, "quarantined", "judge", result.status, result.detail))
            continue
        scores = {axis: float(score) for axis, score in result.fields.items() if axis != _REASONING}
        low = [f"{axis} {scores[axis]:.0f} < {limit:g}" for axis, limit in config.judge.min_scores.items()
               if scores.get(axis, limit) < limit]  # fmt: skip
        if low and not config.stages.score_only:
            message = f"{', '.join(low)}: {result.fields[_REASONING]}"
            losses.append(Outcome.of(sample, "filtered", "judge", "judged_low", message))
            continue
        named = {f"{SCORE_PREFIX}{axis}": score for axis, score in scores.items()}
        reasons = [*assessed.get("reasons", []), *(["judged_low"] if low else [])]
        collected.add(sample, assessed | {"scores": assessed.get("scores", {}) | named, "reasons": reasons})
    return collected.finish(losses)
