"""Qwen3-VL in this process, from a local folder, with the pictures prepared by our own processor (no torchvision).

One model a process, however many threads ask: their requests are answered together in batches.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from loomvideo.pipelines.vlm.clients import Reply
from loomvideo.pipelines.vlm.requests import VLMMedia, VLMRequest, decode_frames
from loomvideo.platform.errors import UserError

_MAKING = threading.Lock()
_GATHER_S = 0.02


class Batcher:
    """Answers requests of many threads together, in one thread of its own.

    Args:
        answer: Turns requests into replies, in order.
        size: Most requests at once.
    """

    def __init__(self, answer: Callable[[list[VLMRequest]], list[Reply]], size: int):
        self._answer, self._size = answer, size
        self._waiting: queue.Queue[tuple[VLMRequest, Future[Reply]]] = queue.Queue()
        threading.Thread(target=self._loop, name="vlm-batches", daemon=True).start()

    def ask(self, request: VLMRequest) -> Reply:
        """The reply, or the error of the batch."""
        future: Future[Reply] = Future()
        self._waiting.put((request, future))
        return future.result()

    def _loop(self) -> None:
        while True:
            batch = [self._waiting.get()]
            deadline = time.monotonic() + _GATHER_S
            while len(batch) < self._size:
                try:
                    batch.append(self._waiting.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            try:
                replies = self._answer([request for request, _ in batch])
            except BaseException as error:  # handed to who asked
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), reply in zip(batch, replies, strict=True):
                    future.set_result(reply)


@dataclass
class BatchedClient:
    """A model in this process, of which many threads ask and which answers them together.

    Attributes:
        folder: The folder of the model.
        max_tokens: Most output tokens.
        setting: The configuration key of ``folder``, for messages.
        temperature: Sampling temperature; 0 or None takes the likeliest word.
        batch: Requests answered at once, when as many threads ask.
    """

    kind: ClassVar[str]
    folder: str
    max_tokens: int = 1024
    setting: str = "captions.model"
    temperature: float | None = 0.0
    batch: int = 1
    _batcher: Batcher | None = field(default=None, repr=False, kw_only=True)

    def identity(self) -> dict[str, Any]:
        """See :class:`~loomvideo.pipelines.vlm.clients.VLMClient`."""
        return {
            "kind": self.kind,
            "model": self.folder,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature or 0.0,
        }

    def complete(self, request: VLMRequest) -> Reply:
        """Answer; each frame is shown as a picture under its label."""
        with _MAKING:
            if self._batcher is None:
                self._batcher = Batcher(self.complete_many, self.batch)
        return self._batcher.ask(request)

    def complete_many(self, requests: Sequence[VLMRequest]) -> list[Reply]:
        """Answer together."""
        raise NotImplementedError


@dataclass
class QwenVLClient(BatchedClient):
    """Judges and captions with a Qwen3-VL; loads it at the first request.

    Its folder has ``config.json``, safetensors, ``tokenizer.json`` and ``preprocessor_config.json``.

    Attributes:
        device: Torch device; "" spreads over the GPUs of the process where there are any.
        loaded: Model, vocabulary and picture sizes.
    """

    kind = "qwen3_vl"
    device: str = field(default="", kw_only=True)
    loaded: tuple[Any, Any, Any] | None = field(default=None, repr=False, kw_only=True)

    def complete_many(self, requests: Sequence[VLMRequest]) -> list[Reply]:
        """Answer together: rows padded on the left, so that each is answered as if it were alone."""
        import torch

        model, tokenizer, processor = self._load()
        inputs = [_inputs(request, tokenizer, processor) for request in requests]
        longest = max(len(one.input_ids) for one in inputs)
        end = tokenizer.token_id("<|im_end|>")
        ids = torch.full((len(inputs), longest), end, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(inputs):
            ids[row, longest - len(one.input_ids) :] = one.input_ids
            mask[row, longest - len(one.input_ids) :] = 1
        pictures = [one for one in inputs if one.pixel_values is not None]
        media: dict[str, Any] = {}
        if pictures:
            media["pixel_values"] = torch.cat([one.pixel_values for one in pictures]).to(model.device, model.dtype)
            media["image_grid_thw"] = torch.cat([one.image_grid_thw for one in pictures]).to(model.device)
        sampled = bool(self.temperature)
        if sampled:
            # The same question has the same answer in every run; a repeat is another question.
            keys = "".join(request.key(self.identity()) for request in requests)
            torch.manual_seed(int.from_bytes(hashlib.sha256(keys.encode()).digest()[:8], "big") >> 1)
        started = time.monotonic()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                mm_token_type_ids=(ids == model.config.image_token_id).long().to(model.device),
                **media,
                max_new_tokens=self.max_tokens,
                do_sample=sampled,
                **({"temperature": self.temperature} if sampled else {}),
                eos_token_id=end,
                pad_token_id=end,
            )
        seconds = (time.monotonic() - started) / len(inputs)
        replies = []
        for one, row in zip(inputs, output[:, longest:].tolist(), strict=True):
            words = row[: row.index(end)] if end in row else row
            replies.append(
                Reply(tokenizer.decode(words), self.folder, len(one.input_ids), len(words) + (end in row), seconds)
            )
        return replies

    def _load(self) -> tuple[Any, Any, Any]:
        if self.loaded is None:
            import torch
            from transformers import Qwen3VLForConditionalGeneration

            from loomvideo.model.conditioning.inputs import read_processor_config
            from loomvideo.model.conditioning.tokenizer import MLLMTokenizer

            if not (Path(self.folder) / "config.json").is_file():
                raise UserError(f"{self.setting}={self.folder}: no config.json; give the folder of a Qwen3-VL model")
            tokenizer, processor = MLLMTokenizer.from_pretrained(self.folder), read_processor_config(self.folder)
            where = "auto" if not self.device and torch.cuda.is_available() else {"": self.device or "cpu"}
            try:
                model = Qwen3VLForConditionalGeneration.from_pretrained(
                    self.folder, dtype="auto", device_map=where, local_files_only=True, use_safetensors=True
                )
            except (OSError, RuntimeError) as error:
                raise UserError(f"{self.setting}={self.folder}: {str(error).splitlines()[0]}") from error
            self.loaded = model.eval(), tokenizer, processor
        return self.loaded


def _inputs(request: VLMRequest, tokenizer: Any, processor: Any) -> Any:
    import torch

    from loomvideo.model.conditioning.inputs import interleaved_inputs

    words: list[str | VLMMedia] = [request.system] if request.system else []
    words += request.parts
    if request.structured:
        words.append(f"Answer with nothing but a JSON object with the keys reasoning, {', '.join(request.axes)}.")
    parts: list[Any] = []
    for part in words:
        if isinstance(part, VLMMedia):
            parts += [torch.from_numpy(frame.copy()) for frame in decode_frames(part)]
        else:
            parts.append(f"\n{part}" if parts else part)
    return interleaved_inputs(parts, tokenizer, processor)
