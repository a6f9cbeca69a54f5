"""Nodes that load a LoomVideo folder, add adapters, and generate or edit.

The model is the package's own pipeline: what these nodes make is what ``loomvideo generate`` makes of the same files,
prompt and seed. Pictures and videos are ComfyUI's ``IMAGE``: float [frames, height, width, 3] in [0, 1].
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource, fitted
from loomvideo.model.parts import MODES
from loomvideo.model.peaks import Work
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.model.tasks import wording
from loomvideo.platform.errors import UserError

CATEGORY = "LoomVideo"
MODEL = "LOOMVIDEO_MODEL"
MAX_REFERENCES = 6
TASKS = ("auto", "t2i", "t2v", "mi2i", "mi2v")


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, and the adapters that this wire of the graph adds: ``(file, strength)`` each."""

    pipeline: LoomVideoPipeline
    adapters: tuple[tuple[str, float], ...] = ()

    def ready(self) -> LoomVideoPipeline:
        """The pipeline with exactly these adapters."""
        wanted = {f"{file}:{strength}": (file, strength) for file, strength in self.adapters if strength}
        if tuple(wanted) != self.pipeline.adapters:
            self.pipeline.unload_lora()
            for name, (file, strength) in wanted.items():
                self.pipeline.load_lora(file, strength, name)
        return self.pipeline


class LoomVideoLoader:
    """Loads a folder: a run's ``weights``, a diffusers folder of ours, or ``gen_model.pth``."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        """What the node takes."""
        return {
            "required": {
                "folder": ("STRING", {"default": "", "tooltip": "weights folder, diffusers folder or gen_model.pth"}),
            },
            "optional": {
                "model": (["", "tiny", "small", "5b"], {"tooltip": "size, where the folder does not say it"}),
                "codec_folder": (
                    "STRING",
                    {"default": "", "tooltip": "Wan2.2's vae folder; empty: beside weights"},
                ),
                "mllm_folder": ("STRING", {"default": "", "tooltip": "Qwen3-VL-8B-Instruct; empty: beside"}),
                "memory": (["auto", *MODES], {"tooltip": "auto: the fastest that fits an edit of 480x832x97"}),
                "mllm_bits": ([16, 8, 4], {}),
                "dit_bits": ([16, 8, 4], {}),
                "kernels": (["auto", "eager", "cpp", "triton"], {"tooltip": "back end of the fused operations"}),
            },
        }

    def load(
        self,
        folder: str,
        model: str = "",
        codec_folder: str = "",
        mllm_folder: str = "",
        memory: str = "auto",
        mllm_bits: int = 16,
        dit_bits: int = 16,
        kernels: str = "auto",
    ) -> tuple[Model]:
        """Load, or make ready to load part by part."""
        if not folder:
            raise UserError("folder: name a weights folder, a diffusers folder of LoomVideo, or gen_model.pth")
        source = ModelSource(folder, model, codec_folder, mllm_folder, kernels, memory=memory, mllm_bits=mllm_bits,
                             dit_bits=dit_bits)  # fmt: skip
        with torch.inference_mode(False):  # weights outlive this prompt
            return (Model(load_pipeline(fitted(source, Work("video_edit", 832, 480, 97, ())))),)


class LoomVideoLora:
    """Adds an adapter of any dialect; several nodes add up."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        """What the node takes: a file of ``models/loras`` inside ComfyUI, else a path."""
        names = _lora_names()
        file = (names, {}) if names else ("STRING", {"default": ""})
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01})
        return {"required": {"model": (MODEL,), "lora": file, "strength": strength}}

    def add(self, model: Model, lora: str, strength: float) -> tuple[Model]:
        """The same model with one more adapter."""
        return (dataclasses.replace(model, adapters=(*model.adapters, (_lora_path(lora), strength))),)


class LoomVideoGenerate:
    """A picture or a video from text, and from reference pictures where some are connected."""

    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("frames",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        """What the node takes."""
        sizes = {
            "task": (list(TASKS), {"tooltip": "auto: by references and the number of frames"}),
            "width": ("INT", {"default": 832, "min": 32, "max": 4096, "step": 32}),
            "height": ("INT", {"default": 480, "min": 32, "max": 4096, "step": 32}),
            "num_frames": ("INT", {"default": 97, "min": 1, "max": 1001, "step": 4, "tooltip": "1 for a picture"}),
        }
        return {"required": {"model": (MODEL,), **_texts(), **sizes, **_sampling(5.0)}, "optional": _references()}

    def generate(
        self, model: Model, prompt: str, negative_prompt: str, task: str, width: int, height: int, num_frames: int,
        seed: int, steps: int, scale: float, visual_scale: float, bucket: int = 0, **references: torch.Tensor
    ) -> tuple[torch.Tensor]:  # fmt: skip
        """Frames float [frames, height, width, 3]."""
        pictures = _pictures(references)
        if task == "auto":
            task = f"{'mi' if pictures else 't'}2{'i' if num_frames == 1 else 'v'}"
        frames = 1 if wording(task).is_image else num_frames
        conditions = {
            "references": pictures,
            "size": (width, height),
            "num_frames": frames,
            "buckets": _buckets(bucket),
        }
        return (_sample(model, task, prompt, negative_prompt, conditions, seed, steps, scale, visual_scale),)


class LoomVideoEdit:
    """A picture or a video changed by an instruction, with reference pictures where some are connected."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("frames",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        """What the node takes."""
        source = {
            "frames": ("IMAGE", {"tooltip": "one for a picture"}),
            "fps": ("FLOAT", {"default": 24.0, "min": 1.0, "max": 240.0, "tooltip": "frame rate of the source"}),
            "max_frames": ("INT", {"default": 97, "min": 1, "max": 1001, "step": 4}),
        }
        return {"required": {"model": (MODEL,), **source, **_texts(), **_sampling(2.5)}, "optional": _references(640)}

    def edit(
        self, model: Model, frames: torch.Tensor, fps: float, max_frames: int, prompt: str, negative_prompt: str,
        seed: int, steps: int, scale: float, visual_scale: float, bucket: int = 640, **references: torch.Tensor
    ) -> tuple[torch.Tensor]:  # fmt: skip
        """Frames float [frames, height, width, 3], at 24 a second where they were brought to a bucket."""
        pictures = _pictures(references)
        task = "ref_edit" if pictures else "image_edit" if len(frames) == 1 else "video_edit"
        conditions = {
            "source": _as_uint8(frames), "references": pictures, "num_frames": max_frames,
            "buckets": _buckets(bucket), "source_fps": fps,
        }  # fmt: skip
        return (_sample(model, task, prompt, negative_prompt, conditions, seed, steps, scale, visual_scale),)


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (LoomVideoLoader, LoomVideoLora, LoomVideoGenerate, LoomVideoEdit)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoomVideoLoader": "Load LoomVideo",
    "LoomVideoLora": "LoomVideo LoRA",
    "LoomVideoGenerate": "LoomVideo Generate",
    "LoomVideoEdit": "LoomVideo Edit",
}


def _texts() -> dict[str, Any]:
    return {
        "prompt": ("STRING", {"multiline": True, "default": ""}),
        "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "empty: the model's own"}),
    }


def _sampling(scale: float) -> dict[str, Any]:
    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
        "steps": ("INT", {"default": 50, "min": 1, "max": 200}),
        "scale": ("FLOAT", {"default": scale, "min": 0.0, "max": 30.0, "step": 0.1}),
        "visual_scale": ("FLOAT", {"default": 1.5, "min": 0.0, "max": 30.0, "step": 0.1}),
    }


def _references(bucket: int = 0) -> dict[str, Any]:
    tooltip = "resolution class to which pictures and source are brought, such as 640; 0 takes them as they are"
    return {
        "bucket": ("INT", {"default": bucket, "min": 0, "max": 960, "tooltip": tooltip}),
        **{f"reference_{number}": ("IMAGE",) for number in range(1, MAX_REFERENCES + 1)},
    }


def _pictures(references: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The connected references in the order of their numbers; a batch counts as several."""
    connected = [references[name] for name in sorted(references) if references[name] is not None]
    return [picture for batch in connected for picture in _as_uint8(batch)]


def _as_uint8(frames: torch.Tensor) -> np.ndarray:
    return (frames[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _buckets(bucket: int) -> tuple[int, ...]:
    return (bucket,) if bucket else ()


def _sample(
    model: Model, task: str, prompt: str, negative_prompt: str, conditions: dict[str, Any],
    seed: int, steps: int, scale: float, visual_scale: float,
) -> torch.Tensor:  # fmt: skip
    pipeline = model.ready()
    progress = _Progress(steps)
    guidance = Guidance(scale, visual_scale if wording(task).has_media else None)
    encoded = pipeline.conditions(prompt, task, negative_prompt=negative_prompt or None, **conditions)
    latents = pipeline.sample(encoded, steps, guidance, seed, on_step=progress)
    return torch.from_numpy(pipeline.decode(latents).astype(np.float32) / 255)


class _Progress:
    """Moves ComfyUI's bar and stops where its user asked to; outside ComfyUI nothing."""

    def __init__(self, steps: int) -> None:
        self._check, self._bar = None, None
        with contextlib.suppress(ImportError):
            from comfy.model_management import throw_exception_if_processing_interrupted
            from comfy.utils import ProgressBar

            self._check, self._bar = throw_exception_if_processing_interrupted, ProgressBar(steps)

    def __call__(self, step: int, latents: torch.Tensor) -> None:
        if self._bar is not None:
            self._check()
            self._bar.update(1)


def _lora_names() -> list[str]:
    with contextlib.suppress(ImportError):
        import folder_paths

        return folder_paths.get_filename_list("loras")
    return []


def _lora_path(name: str) -> str:
    with contextlib.suppress(ImportError):
        import folder_paths

        return folder_paths.get_full_path("loras", name) or name
    return name
