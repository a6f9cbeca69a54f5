"""A local vision-language model on vLLM, where that is installed: the same questions as in ``local``, answered faster.

vLLM is no dependency: it pins its own torch and needs a GPU. What is called of it is ``LLM.chat`` with
``SamplingParams`` and ``StructuredOutputsParams``, as of vLLM 0.11.
"""

import hashlib
import importlib.util
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from loomvideo.pipelines.vlm.clients import Reply, picture_part
from loomvideo.pipelines.vlm.local import BatchedClient
from loomvideo.pipelines.vlm.requests import VLMMedia, VLMRequest, decode_frames
from loomvideo.platform.errors import UserError

MAX_PICTURES = 64
"""Pictures of a question that vLLM is told to make room for."""
MAX_TOKENS_IN = 32_768
"""Length that memory is set aside for: the model's own 262,144 would not fit beside its weights on most GPUs."""


def is_installed() -> bool:
    """Whether vLLM can be imported here."""
    return importlib.util.find_spec("vllm") is not None


@dataclass
class VLLMClient(BatchedClient):
    """Judges with a Qwen3-VL, or any chat model of vLLM that takes pictures; loads it at the first request.

    Attributes:
        gpus: GPUs of the process, among which the model is divided.
        engine: The loaded engine.
    """

    kind = "vllm"
    setting: str = "judge.model"
    gpus: float = field(default=1.0, kw_only=True)
    engine: Any = field(default=None, repr=False, kw_only=True)

    def complete_many(self, requests: Sequence[VLMRequest]) -> list[Reply]:
        """Answer together; answers in JSON keep to the schema of their request."""
        engine = self._load()
        started = time.monotonic()
        outputs = engine.chat(
            [_messages(request) for request in requests],
            [self._sampling(request) for request in requests],
            use_tqdm=False,
        )
        seconds = (time.monotonic() - started) / len(requests)
        return [
            Reply(o.outputs[0].text, self.folder, len(o.prompt_token_ids), len(o.outputs[0].token_ids), seconds)
            for o in outputs
        ]

    def _sampling(self, request: VLMRequest) -> Any:
        from vllm import SamplingParams

        # The same question has the same answer in every run; a repeat is another question.
        seed = int.from_bytes(hashlib.sha256(request.key(self.identity()).encode()).digest()[:4], "big")
        chosen = {"temperature": self.temperature or 0.0, "max_tokens": self.max_tokens, "seed": seed}
        if request.structured:
            from vllm.sampling_params import StructuredOutputsParams

            chosen["structured_outputs"] = StructuredOutputsParams(json=request.schema())
        return SamplingParams(**chosen)

    def _load(self) -> Any:
        if self.engine is None:
            try:
                from vllm import LLM
                from vllm.sampling_params import StructuredOutputsParams  # noqa: F401
            except ImportError as error:
                raise UserError(f"judge.engine=vllm: {error}; install vllm 0.11 or newer on the nodes") from error
            if not (Path(self.folder) / "config.json").is_file():
                raise UserError(f"{self.setting}={self.folder}: no config.json; give the folder of a model")
            self.engine = LLM(
                model=self.folder,
                tensor_parallel_size=max(1, int(self.gpus)),
                max_model_len=MAX_TOKENS_IN,
                limit_mm_per_prompt={"image": MAX_PICTURES, "video": 0},
            )
        return self.engine


def _messages(request: VLMRequest) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in request.parts:
        if isinstance(part, VLMMedia):
            content += [picture_part(part.mime, frame) for frame in part.frames] or _whole_film(part)
        else:
            content.append({"type": "text", "text": part})
    system: list[dict[str, Any]] = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": content}]


def _whole_film(media: VLMMedia) -> list[dict[str, Any]]:
    parts = []
    for frame in decode_frames(media):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling=0)
        parts.append(picture_part("image/jpeg", buffer.getvalue()))
    return parts
