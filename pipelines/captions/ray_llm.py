"""Texts by vLLM inside the Ray cluster (``ray.data.llm``): frames become requests, engines batch them on their GPUs.

The code that every answer must send back is checked here as for the other back ends, and what fails is asked again.
"""

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from loomvideo.pipelines.captions.captioner import CaptionResult, verified, with_text
from loomvideo.pipelines.captions.frames import FrameReader
from loomvideo.pipelines.captions.options import CaptionOptions, CaptionWorkers
from loomvideo.pipelines.captions.requests import caption_request
from loomvideo.pipelines.captions.schema import InvalidAnswerError, parse_answer
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.sources.samples import Sample, stored_sample
from loomvideo.pipelines.vlm.requests import FrameSampling

# Texts of a few sentences: requests in flight matter more than their length.
_BATCH_ROWS = 16
_DECODERS_A_MODEL = 4
_MOST_REFERENCES = 8
_ANY = '{"type": "object"}'
Generate = Callable[[Any], Any]


class RequestWriter:
    """Turns samples into rows with chat messages; one a Ray actor, with a decoder of its own."""

    def __init__(self, options: CaptionOptions, base: str):
        self.options = options
        self.reader = FrameReader(options.num_frames, options.max_side, base)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """``{sample, instruction}`` to ``{…, code, digest, messages, schema, failure}``, JSON where structured."""
        sample = stored_sample(row["sample"])
        try:
            target, source, references = self.reader(sample)
        except DecodeError as error:
            failure = json.dumps({"status": error.reason, "detail": str(error)})
            return {**row, "code": "", "digest": "", "messages": "[]", "schema": _ANY, "failure": failure}
        sampling = FrameSampling(self.options.num_frames, self.options.max_side)
        mode = "verify" if row["instruction"] else self.options.mode
        wordings = 0 if row["instruction"] else self.options.wordings
        request = caption_request(
            sample, mode, target, source, sampling, True, references, row["instruction"], wordings
        )
        content: list[dict[str, Any]] = []
        for media in request.media:
            content.append({"type": "text", "text": f"{media.label}:"})
            for frame in media.frames:
                url = f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}"
                content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": request.text})
        return {
            **row,
            "code": request.code,
            "digest": request.digest,
            "messages": json.dumps([{"role": "user", "content": content}]),
            "schema": json.dumps(request.schema()),
            "failure": "",
        }


def ask_ray_llm(
    workers: CaptionWorkers, base: str = "", generate: Generate | None = None
) -> Callable[[CaptionOptions, list[Sample]], Iterator[tuple[Sample, CaptionResult]]]:
    """An ``ask`` for :func:`~loomvideo.pipelines.captions.dataset.caption_dataset`.

    Args:
        workers: Engines and what each reserves.
        base: Folder that relative media paths start at.
        generate: Dataset to dataset, adds ``generated_text`` and ``__inference_error__``; by default vLLM.
    """

    def ask(options: CaptionOptions, samples: list[Sample]) -> Iterator[tuple[Sample, CaptionResult]]:
        engine = generate or _vllm(options, workers)
        # Decoding must keep up with the models that answer.
        decoders = _DECODERS_A_MODEL * max(workers.count, 1)
        waiting = []
        for sample in samples:
            has_text = sample.instruction if options.mode == "instruction" else sample.caption
            if has_text and not options.overwrite:
                yield sample, CaptionResult(sample.key, "", "existing")
            else:
                waiting.append(sample)
        first: dict[str, CaptionResult] = {}
        sure = []
        for sample, result in _until_answered(options, waiting, {}, base, engine, decoders):
            if options.verify and result.succeeded:
                first[sample.key] = result
                sure.append(sample)
            else:
                yield with_text(sample, result, options.mode), result
        instructions = {key: result.fields["instruction"] for key, result in first.items()}
        for sample, second in _until_answered(options, sure, instructions, base, engine, decoders):
            result = verified(first[sample.key], second)
            yield with_text(sample, result, options.mode), result

    return ask


def _until_answered(
    options: CaptionOptions,
    waiting: list[Sample],
    instructions: dict[str, str],
    base: str,
    engine: Generate,
    decoders: int,
) -> Iterator[tuple[Sample, CaptionResult]]:
    """Ask about samples, those whose answers fail once more; about their instructions where they have one."""
    for attempt in range(options.max_attempts):
        again = []
        for sample, result in _round(options, waiting, instructions, base, engine, decoders):
            last = attempt + 1 == options.max_attempts
            if result.status in ("invalid_answer", "mixed_up", "server_error") and not last:
                again.append(sample)
            else:
                yield sample, result
        waiting = again
        if not waiting:
            return


def _round(
    options: CaptionOptions,
    samples: list[Sample],
    instructions: dict[str, str],
    base: str,
    engine: Generate,
    decoders: int,
) -> Iterator[tuple[Sample, CaptionResult]]:
    import ray

    if not samples:
        return
    rows = [{"sample": sample.to_json(), "instruction": instructions.get(sample.key, "")} for sample in samples]
    requests = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _BATCH_ROWS)).map(
        RequestWriter,
        fn_constructor_args=(options, base),
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=decoders),
    )
    for row in engine(requests).iter_rows():
        sample = stored_sample(row["sample"])
        yield sample, _result(sample, row, options)


def _result(sample: Sample, row: dict[str, Any], options: CaptionOptions) -> CaptionResult:
    failed = CaptionResult(sample.key, row["digest"], "server_error", model=options.model)
    if row["failure"]:
        return dataclasses.replace(failed, **json.loads(row["failure"]))
    if row.get("__inference_error__"):
        return dataclasses.replace(failed, detail=str(row["__inference_error__"])[:500])
    try:
        mode, wordings = ("verify", 0) if row["instruction"] else (options.mode, options.wordings)
        fields = parse_answer(row["generated_text"], mode, row["code"], wordings)
    except InvalidAnswerError as error:
        status = "mixed_up" if error.mixed_up else "invalid_answer"
        return dataclasses.replace(failed, status=status, detail=str(error))
    return dataclasses.replace(failed, status="made", fields=fields)


def _vllm(options: CaptionOptions, workers: CaptionWorkers) -> Generate:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs={"limit_mm_per_prompt": {"image": 2 * options.num_frames + _MOST_REFERENCES}},
        concurrency=workers.count,
        batch_size=_BATCH_ROWS,
        prepare_multimodal_stage={"enabled": True},
        should_continue_on_error=True,
    )

    def before(row: dict[str, Any]) -> dict[str, Any]:
        # A file that does not decode goes through as an empty question; its failure is what counts.
        messages = json.loads(row["messages"]) or [{"role": "user", "content": [{"type": "text", "text": "-"}]}]
        # The schema as text: as a dictionary Arrow would merge those of all rows.
        structured = {"json": row["schema"]}
        limits = {"max_tokens": options.max_tokens, "temperature": 0.0, "structured_outputs": structured}
        return {"messages": messages, "sampling_params": limits}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        names = ("sample", "instruction", "digest", "code", "failure", "generated_text", "__inference_error__")
        return {name: row.get(name) or "" for name in names}

    return build_processor(config, preprocess=before, postprocess=after)
