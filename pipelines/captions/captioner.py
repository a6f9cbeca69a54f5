"""Texts for samples from a model: many requests at a time, each answer proven to belong to its sample.

The model sends back a code of the sample and its pictures, so an answer that a batching server or a bug here attaches
to another sample is seen and asked for again, never stored.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loomvideo.pipelines.captions.frames import Frames
from loomvideo.pipelines.captions.options import CaptionOptions
from loomvideo.pipelines.captions.requests import CaptionRequest, caption_request
from loomvideo.pipelines.captions.schema import InvalidAnswerError
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.pipelines.vlm.clients import OpenAIClient, Reply, VLMClient, VLMError
from loomvideo.pipelines.vlm.local import QwenVLClient
from loomvideo.pipelines.vlm.requests import FrameSampling
from loomvideo.pipelines.vlm.session import AnswerCache, Pace, Session


@dataclass(frozen=True)
class CaptionResult:
    """What came of one sample.

    Attributes:
        key: The key of the sample.
        digest: The digest of what was asked; "" when nothing was.
        status: ``made``, ``cached``, ``existing``, or the reason there is none: ``invalid_answer``, ``mixed_up``,
            ``not_verified``, ``blocked``, ``timeout``, …
        fields: The answer: ``sentence`` or ``instruction``, and attributes.
        model: The model that answered.
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


# Decodes what of a sample is shown: the fields of Frames, those of the end left out where there are none.
ReadFrames = Callable[[Sample], tuple]


def build_client(options: CaptionOptions) -> VLMClient:
    """The model that the options name."""
    if options.backend == "transformers":
        return QwenVLClient(options.model, options.max_tokens)
    return OpenAIClient(
        options.base_url, options.model, options.api_key_env, 0.0, options.max_tokens, options.timeout_s
    )


class Captioner:
    """Makes texts with a client, a cache and a pace.

    Args:
        options: The options of the stage.
        client: Default: what the options name; none is needed for ``existing``.
        sleep: What waits; tests replace it.
    """

    def __init__(
        self,
        options: CaptionOptions,
        client: VLMClient | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        options.check()
        self.options = options
        self._session: Session | None = None
        if client or options.backend != "existing":
            self._session = Session(
                client or build_client(options),
                AnswerCache(Path(options.cache)),
                pace=Pace(options.per_minute),
                max_attempts=options.max_attempts,
                backoff_s=1.0,
                sleep=sleep,
            )
        self._sampling = FrameSampling(options.num_frames, options.max_side)

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
                        yield self.finished(sample, result), result
            finally:
                for future in waiting:
                    future.cancel()

    def finished(self, sample: Sample, result: CaptionResult) -> Sample:
        """The sample with what came of it."""
        return with_text(sample, result, self.options.mode)

    def caption(self, sample: Sample, read_frames: ReadFrames) -> CaptionResult:
        """Make one sample's text."""
        has_text = sample.instruction if self.options.mode == "instruction" else sample.caption
        if self.options.backend == "existing" or (has_text and not self.options.overwrite):
            status = "existing" if sample.text else "no_text"
            return CaptionResult(sample.key, "", status)
        try:
            target, source, references = Frames(*read_frames(sample))
        except DecodeError as error:
            return CaptionResult(sample.key, "", error.reason, detail=str(error))
        structured = self.options.backend != "transformers"
        mode = self.options.mode
        wordings = self.options.wordings
        request = caption_request(
            sample, mode, target, source, self._sampling, structured, references, wordings=wordings
        )
        result = self._ask(request)
        if not (self.options.verify and result.succeeded):
            return result
        text = result.fields["instruction"]
        again = caption_request(sample, "verify", target, source, self._sampling, structured, references, text)
        return verified(result, self._ask(again))

    def _ask(self, request: CaptionRequest) -> CaptionResult:
        fields: dict[str, Any] = {}

        def check(reply: Reply) -> None:
            try:
                fields.update(request.parse(reply.text))
            except InvalidAnswerError as error:
                raise VLMError("mixed up" if error.mixed_up else "invalid answer", True, str(error)) from error

        answer = self._session.ask(request, check)
        if answer.reply is None:
            status = answer.failure.replace(" ", "_")
            return CaptionResult(request.sample_key, request.digest, status, detail=answer.detail)
        if answer.cached:
            check(answer.reply)
        status = "cached" if answer.cached else "made"
        return CaptionResult(request.sample_key, request.digest, status, fields, answer.reply.model)


def verified(result: CaptionResult, second: CaptionResult) -> CaptionResult:
    """An instruction with what came of the second question about it; without its text when the answer was not yes."""
    if not second.succeeded:
        return dataclasses.replace(result, status=second.status, fields={}, detail=f"second question: {second.detail}")
    verdict, reason = second.fields["verdict"], second.fields["reason"]
    if verdict != "yes":
        detail = f"{verdict}: {reason} (instruction: {result.fields['instruction']})"
        return dataclasses.replace(result, status="not_verified", fields={}, detail=detail)
    return dataclasses.replace(result, fields=result.fields | {"verified": reason})


def with_text(sample: Sample, result: CaptionResult, mode: str) -> Sample:
    """The sample with the text of a result, its attributes and provenance in ``extra.captions``."""
    if result.status not in ("made", "cached"):
        return sample
    text = result.fields["instruction" if mode == "instruction" else "sentence"].strip()
    attributes = {k: v for k, v in result.fields.items() if k not in ("instruction", "sentence", "wordings")}
    if "wordings" in result.fields:
        others = [other.strip() for other in result.fields["wordings"]]
        others = list(dict.fromkeys(other for other in others if other not in ("", text)))
        sample = dataclasses.replace(sample, texts=others)
    record = {"mode": mode, "model": result.model, "digest": result.digest} | (
        {"attributes": attributes} if attributes else {}
    )
    extra = sample.extra | {"captions": record}
    if mode == "instruction":
        return dataclasses.replace(sample, instruction=text, extra=extra)
    return dataclasses.replace(sample, caption=text, extra=extra)
