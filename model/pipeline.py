"""Generation and editing from text, pictures and clips: the whole model behind one call."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.codec import Codec, build_codec
from loomvideo.model.conditioning.inputs import MLLMInputs, build_inputs, text_inputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.guidance import NUM_STEPS, Guidance
from loomvideo.model.presets import PIPELINE_FILE, ModelPreset, preset, stated_preset, with_folders
from loomvideo.model.sampler import Branch, SchedulerConfig, sample
from loomvideo.model.weights import load_dit, open_checkpoint
from loomvideo.platform.errors import UserError

EDIT_TASKS = ("image_edit", "video_edit", "ref_edit")


@dataclass
class Conditions:
    """What a generation is conditioned on, encoded once.

    Attributes:
        task: The task.
        branches: Conditioning of each guidance branch.
        latent_shape: [channels, frames, height, width] of what is generated.
    """

    task: str
    branches: dict[str, Branch]
    latent_shape: tuple[int, int, int, int]


class LoomVideoPipeline:
    """The transformer with its frozen codec and MLLM.

    Args:
        dit: The transformer, on the device and in the dtype to compute in.
        codec: Pixels to latents and back.
        mllm: Prompts to hidden states.
        scheduler: Sampler settings; None for the published ones.
    """

    def __init__(self, dit: LoomVideoDiT, codec: Codec, mllm: FrozenMLLM, scheduler: SchedulerConfig | None = None):
        self.dit = dit.eval()
        self.codec = codec
        self.mllm = mllm
        self.scheduler = scheduler or SchedulerConfig()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        model: str | None = None,
        codec_folder: str = "",
        mllm_folder: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LoomVideoPipeline":
        """Load a checkpoint with its codec and MLLM.

        Args:
            checkpoint: The ``weights`` folder of a run, an exported folder, or the published ``gen_model.pth``.
            model: Preset; None takes what the folder states.
            codec_folder: The codec's weights (``Wan2.2-TI2V-5B-Diffusers/vae``), for presets that need them.
            mllm_folder: The MLLM (``Qwen3-VL-8B-Instruct``), for presets that need one.
            device: Where to run; None takes CUDA where there is one.
            dtype: Of the transformer and the MLLM; None takes bf16 on CUDA, fp32 elsewhere.

        Raises:
            UserError: if the checkpoint cannot be read or does not say its preset.
        """
        model = model or stated_preset(checkpoint)
        if model is None:
            raise UserError(f"{checkpoint}: has no {PIPELINE_FILE}; name its preset with model=")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls.from_parts(with_folders(preset(model), codec_folder, mllm_folder), checkpoint, device, dtype)

    @classmethod
    def from_parts(
        cls,
        model: ModelPreset,
        weights: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "LoomVideoPipeline":
        """Build a preset's codec and MLLM around a transformer's weights.

        Args:
            model: The preset, its folders filled in where it needs them.
            weights: A weights folder or file, see :func:`loomvideo.model.weights.open_checkpoint`.
            device: Where everything runs.
            dtype: Of the transformer and the MLLM; None takes bf16 on CUDA, fp32 elsewhere.
        """
        device = torch.device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        stated = open_checkpoint(weights).config
        dit = load_dit(weights, stated or model.dit, device, dtype)
        codec = build_codec(model.codec, device, dtype)
        return cls(dit, codec, FrozenMLLM.from_preset(model, device, dtype), model.scheduler)

    @torch.inference_mode()
    def encode(
        self,
        task: str,
        prompt: str,
        source: np.ndarray | None = None,
        references: Sequence[np.ndarray] = (),
        size: tuple[int, int] | None = None,
        num_frames: int = 1,
        negative_prompt: str = "",
    ) -> Conditions:
        """Encode everything that does not change over the steps.

        Args:
            task: ``t2i, t2v, image_edit, video_edit, ref_edit`` or ``mi2v``.
            prompt: Instruction or caption.
            source: uint8 [frames, height, width, 3] to edit; frames and sides as the codec takes them.
            references: uint8 [height, width, 3] each, sides multiples of 32.
            size: ``(width, height)`` of what is generated; an edit takes its source's.
            num_frames: 4k+1; an edit takes its source's.
            negative_prompt: What the unconditional branch is told.

        Raises:
            UserError: if the task lacks its source or references or the size is none the codec can make.
        """
        if (task in EDIT_TASKS) != (source is not None):
            raise UserError(f"task={task}: {'source is missing' if source is None else 'takes no source'}")
        if source is not None:
            num_frames, size = len(source), (source.shape[2], source.shape[1])
        if size is None or num_frames % 4 != 1 or size[0] % 32 or size[1] % 32:
            raise UserError(f"size={size} num_frames={num_frames}: sides must be multiples of 32 and frames 4k+1")
        source_latents = None if source is None else self._latents(source)
        reference_latents = [self._latents(image[None]) for image in references]
        frames = None if source is None else torch.from_numpy(source)
        pictures = [torch.from_numpy(image) for image in references]
        inputs = {
            "full": build_inputs(task, prompt, frames, pictures, "full", self.mllm.tokenizer, self.mllm.processor),
            "unconditional": text_inputs(negative_prompt, self.mllm.tokenizer),
        }
        if source is not None or references:
            inputs["visual"] = self._visual_inputs(task, frames, pictures)
        states = dict(zip(inputs, self.mllm.encode(list(inputs.values())), strict=True))
        branches = {
            name: Branch(states[name])
            if name == "unconditional"
            else Branch(states[name], source_latents, reference_latents)
            for name in inputs
        }
        shape = (self.codec.latent_channels, (num_frames - 1) // 4 + 1, size[1] // 16, size[0] // 16)
        return Conditions(task, branches, shape)

    def denoise(
        self,
        conditions: Conditions,
        steps: int = NUM_STEPS,
        guidance: Guidance | None = None,
        seed: int = 0,
        batch_branches: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> np.ndarray:
        """Generate from encoded conditions: uint8 [frames, height, width, 3]. The same seed gives the same frames."""
        noise = torch.randn(conditions.latent_shape, generator=torch.Generator().manual_seed(seed))
        latents = sample(
            self.dit,
            noise,
            conditions.branches,
            guidance or Guidance.default(conditions.task),
            steps,
            self.scheduler,
            batch_branches=batch_branches,
            on_step=on_step,
        )
        return self.decode(latents)

    def __call__(
        self,
        prompt: str,
        task: str = "t2v",
        source: np.ndarray | None = None,
        references: Sequence[np.ndarray] = (),
        size: tuple[int, int] | None = None,
        num_frames: int = 1,
        negative_prompt: str = "",
        steps: int = NUM_STEPS,
        guidance: Guidance | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """:meth:`encode` and :meth:`denoise` in one."""
        conditions = self.encode(task, prompt, source, references, size, num_frames, negative_prompt)
        return self.denoise(conditions, steps, guidance, seed)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [channels, frames, height, width] to uint8 [frames, height, width, 3]."""
        video = self.codec.decode(latents[None].float())[0]
        return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    def _latents(self, frames: np.ndarray) -> Tensor:
        parameter = next(self.dit.parameters())
        video = torch.from_numpy(frames).to(parameter.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return self.codec.encode(video).mean[0]

    def _visual_inputs(self, task: str, frames: Tensor | None, pictures: list[Tensor]) -> MLLMInputs:
        return build_inputs(task, "", frames, pictures, "spans", self.mllm.tokenizer, self.mllm.processor)


def without_source(conditions: Conditions) -> Conditions:
    """The same conditions with a source of zeros: what the transformer does from the MLLM alone."""
    branches = {name: dataclasses.replace(branch, source=None) for name, branch in conditions.branches.items()}
    return dataclasses.replace(conditions, branches=branches)
