"""Qwen3-VL in this process, from a local folder, with the pictures prepared by our own processor (no torchvision)."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loomvideo.pipelines.vlm.clients import Reply
from loomvideo.pipelines.vlm.requests import Media, VLMRequest, decode_frames
from loomvideo.platform.errors import UserError


@dataclass
class QwenVLClient:
    """Judges and captions greedily; loads the model at the first request.

    Attributes:
        folder: Of a Qwen3-VL: ``config.json``, safetensors, ``tokenizer.json``, ``preprocessor_config.json``.
        max_tokens: Most output tokens.
        setting: The configuration key of ``folder``, for messages.
        device: Torch device; "" spreads over the GPUs of the machine where there are any.
        loaded: Model, vocabulary and picture sizes.
    """

    folder: str
    max_tokens: int = 1024
    setting: str = "captions.model"
    device: str = ""
    loaded: tuple[Any, Any, Any] | None = field(default=None, repr=False)

    def identity(self) -> dict[str, Any]:
        """See :class:`~loomvideo.pipelines.vlm.clients.VLMClient`."""
        return {"kind": "qwen3_vl", "model": self.folder, "max_tokens": self.max_tokens, "temperature": 0.0}

    def complete(self, request: VLMRequest) -> Reply:
        """Answer; each frame is shown as a picture under its label."""
        import torch

        from loomvideo.model.conditioning.inputs import interleaved_inputs

        model, tokenizer, processor = self._load()
        words: list[str | Media] = [request.system] if request.system else []
        words += request.parts
        if request.structured:
            words.append(f"Answer with nothing but a JSON object with the keys reasoning, {', '.join(request.axes)}.")
        parts: list[Any] = []
        for part in words:
            if isinstance(part, Media):
                parts += [torch.from_numpy(frame.copy()) for frame in decode_frames(part)]
            else:
                parts.append(f"\n{part}" if parts else part)
        inputs = interleaved_inputs(parts, tokenizer, processor)
        ids = inputs.input_ids[None]
        started = time.monotonic()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                mm_token_type_ids=(ids == model.config.image_token_id).long().to(model.device),
                pixel_values=inputs.pixel_values.to(model.device, model.dtype),
                image_grid_thw=inputs.image_grid_thw.to(model.device),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                eos_token_id=tokenizer.token_id("<|im_end|>"),
                pad_token_id=tokenizer.token_id("<|im_end|>"),
            )
        answer = output[0, ids.shape[1] :].tolist()
        words = tokenizer.decode(answer).removesuffix("<|im_end|>")
        return Reply(words, self.folder, ids.shape[1], len(answer), time.monotonic() - started)

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
