"""Qwen3-VL as a judge in this process, through transformers: an anchor that no provider can retire."""

import time
from dataclasses import dataclass, field
from typing import Any

from loomvideo.pipelines.evaluation.judges.clients import Reply
from loomvideo.pipelines.evaluation.judges.requests import JudgeRequest, decode_frames


@dataclass
class TransformersJudge:
    """A vision-language model from a local folder or hub name.

    Attributes:
        model: Folder or name, such as ``Qwen/Qwen3-VL-32B-Instruct``.
        max_tokens: Most output tokens.
        device: Torch device; ``auto`` spreads over the GPUs of the machine.
        loaded: The model and its processor, loaded at the first request.
    """

    model: str
    max_tokens: int = 512
    device: str = "auto"
    loaded: tuple[Any, Any] | None = field(default=None, repr=False)

    def identity(self) -> dict[str, Any]:
        """See :class:`~loomvideo.pipelines.evaluation.judges.clients.JudgeClient`."""
        return {"kind": "transformers", "model": self.model, "max_tokens": self.max_tokens, "temperature": 0.0}

    def complete(self, request: JudgeRequest) -> Reply:
        """Answer greedily; each sampled frame is shown as a picture under its label."""
        import torch
        from PIL import Image

        model, processor = self._load()
        content: list[dict[str, Any]] = []
        pictures = []
        for media in request.media:
            content.append({"type": "text", "text": f"{media.label}:"})
            for frame in decode_frames(media):
                content.append({"type": "image"})
                pictures.append(Image.fromarray(frame))
        text = request.text
        if request.structured:
            text += f"\nAnswer with nothing but a JSON object with the keys reasoning, {', '.join(request.axes)}."
        content.append({"type": "text", "text": text})
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=pictures, return_tensors="pt").to(model.device)
        started = time.monotonic()
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        reply = processor.decode(answer, skip_special_tokens=True)
        return Reply(reply, self.model, inputs["input_ids"].shape[1], len(answer), time.monotonic() - started)

    def _load(self) -> tuple[Any, Any]:
        if self.loaded is None:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            model = AutoModelForImageTextToText.from_pretrained(self.model, dtype="auto", device_map=self.device)
            self.loaded = model.eval(), AutoProcessor.from_pretrained(self.model)
        return self.loaded
