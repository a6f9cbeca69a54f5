"""Texts for samples from a model: many requests at a time, each answer proven to belong to its sample.

The model sends back a code of the sample and its pictures, so an answer that a batching server or a bug here attaches
to another sample is seen and asked for again, never stored.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.pipelines.captions.options import CaptionOptions
from loomvideo.pipelines.captions.requests import CaptionRequest, caption_request
from loomvideo.pipelines.captions.schema import InvalidAnswerError, parse_answer
from loomvideo.pipelines.evaluation.judges.clients import JudgeClient, JudgeError, OpenAIClient
from loomvideo.pipelines.evaluation.judges.local import QwenVLClient
from loomvideo.pipelines.evaluation.judges.requests import FrameSampling
from loomvideo.pipelines.evaluation.judges.session import AnswerCache, Pace
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.sources.samples import Sample

MAX_BACKOFF_S = 60.0


@dataclass(frozen=True)
class CaptionResult:
    """What came of one sample.

    Attributes:
        key: Of the sample.
        digest: Of what was asked; "" when nothing was.
        status: ``made``, ``cached``, ``existing``, or the reason there is none: ``invalid_answer``, ``mixed_up``,
            ``blocked``, ``timeout``, …
        fields: The answer: ``sentence`` or ``instruction``, and attributes.
        model: That answered.
        detail: One line about a failure.
    """

    key: str
    digest: str
    status: str
    fields: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    detail: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the sample has a text now."""
        return self.status in ("made", "cached", "existing")


# Decoded target and source (None without one), uint8 [frames, height, width, 3].
ReadFrames = Callable[[Sample], tuple[np.ndarray, np.ndarray | None]]


def build_client(options: CaptionOptions) -> JudgeClient:
    """The model that the options name."""
    if options.backend == "transformers":
        return QwenVLClient(options.model, options.max_tokens)
    return OpenAIClient(
        options.base_url, options.model, options.api_key_env, 0.0, options.max_tokens, options.timeout_s
    )


class Captioner:
    """Makes texts with a client, a cache and a pace.

    Args:
        options: Of the stage.
        client: Default: what the options name; none is needed for ``existing``.
        sleep: For tests.
    """

    def __init__(
        self,
        options: CaptionOptions,
        client: JudgeClient | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        options.check()
        self.options = options
        self._client = client if client or options.backend == "existing" else build_client(options)
        self._cache = AnswerCache(Path(options.cache))
        self._pace = Pace(options.per_minute)
        self._sampling = FrameSampling(options.num_frames, options.max_side)
        self._sleep = sleep

    def run(self, samples: Iterable[Sample], read_frames: ReadFrames) -> Iterator[tuple[Sample, CaptionResult]]:
        """Samples with their texts as answers come in, in any order; a failed one keeps the text it had.

        Args:
            samples: Read no faster than answers come.
            read_frames: Decodes a sample; called in worker threads.
        """
        waiting: dict[Future, Sample] = {}
        supply = iter(samples)
        # One model in this process takes one request at a time.
        workers = 1 if self.options.backend == "transformers" else self.options.concurrency
        with ThreadPoolExecutor(workers, thread_name_prefix="captions") as pool:
            exhausted = False
            try:
                while not exhausted or waiting:
                    while not exhausted and len(waiting) < 2 * workers:
                        sample = next(supply, None)
                        if sample is None:
                            exhausted = True
                        else:
                            waiting[pool.submit(self.caption, sample, read_frames)] = sample
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        sample = waiting.pop(future)
                        result = future.result()
                        if result.key != sample.key:
                            raise RuntimeError(f"text of {result.key} came back for {sample.key}")
                        yield with_text(sample, result, self.options.mode), result
            finally:
                for future in waiting:
                    future.cancel()

    def caption(self, sample: Sample, read_frames: ReadFrames) -> CaptionResult:
        """Make one sample's text."""
        has_text = sample.instruction if self.options.mode == "instruction" else sample.caption
        if self.options.backend == "existing" or (has_text and not self.options.overwrite):
            status = "existing" if sample.text else "no_text"
            return CaptionResult(sample.key, "", status)
        try:
            target, source = read_frames(sample)
        except DecodeError as error:
            return CaptionResult(sample.key, "", error.reason, detail=str(error))
        structured = self.options.backend != "transformers"
        request = caption_request(sample, self.options.mode, target, source, self._sampling, structured)
        identity = self._client.identity()
        cache_key = request.key(identity)
        stored = self._cache.get(cache_key)
        if stored is not None:
            fields = parse_answer(stored.text, request.mode, request.code)
            return CaptionResult(sample.key, request.digest, "cached", fields, stored.model)
        return self._ask(request, cache_key, identity)

    def _ask(self, request: CaptionRequest, cache_key: str, identity: dict[str, Any]) -> CaptionResult:
        failure = CaptionResult(request.sample_key, request.digest, "error")
        for attempt in range(self.options.max_attempts):
            self._pace.wait()
            try:
                reply = self._client.complete(request)
                fields = parse_answer(reply.text, request.mode, request.code)
            except InvalidAnswerError as error:
                status = "mixed_up" if error.mixed_up else "invalid_answer"
                failure = dataclasses.replace(failure, status=status, detail=str(error))
            except JudgeError as error:
                failure = dataclasses.replace(failure, status=error.reason.replace(" ", "_"), detail=str(error))
                if not error.retryable:
                    break
                if attempt + 1 < self.options.max_attempts:
                    backoff = min(MAX_BACKOFF_S, 2.0**attempt) * random.uniform(0.5, 1.5)
                    self._sleep(error.retry_after_s if error.retry_after_s is not None else backoff)
            else:
                # Only answers that hold are kept: the same question would get the same bad answer for ever.
                self._cache.put(cache_key, reply, identity)
                return CaptionResult(request.sample_key, request.digest, "made", fields, reply.model)
        return failure


def with_text(sample: Sample, result: CaptionResult, mode: str) -> Sample:
    """The sample with the text of a result, its attributes and provenance in ``extra.captions``."""
    if result.status not in ("made", "cached"):
        return sample
    text = result.fields["instruction" if mode == "instruction" else "sentence"].strip()
    attributes = {k: v for k, v in result.fields.items() if k not in ("instruction", "sentence")}
    record = {"mode": mode, "model": result.model, "digest": result.digest} | (
        {"attributes": attributes} if attributes else {}
    )
    extra = sample.extra | {"captions": record}
    if mode == "instruction":
        return dataclasses.replace(sample, instruction=text, extra=extra)
    return dataclasses.replace(sample, caption=text, extra=extra)
