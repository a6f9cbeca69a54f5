"""Generation and editing from text, pictures and clips: the whole model behind one call."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.adapters import Adapter, parse_choice, read_adapter, set_adapters
from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.codec import Codec, LatentGrid, build_codec
from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.inputs import build_inputs, text_inputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.few_steps import FewSteps, sample_few_steps, stated_few_steps
from loomvideo.model.float8 import float8_blocks
from loomvideo.model.guidance import FULL, NUM_STEPS, Guidance
from loomvideo.model.kernels import set_backend
from loomvideo.model.loading import ModelSource, load_parts
from loomvideo.model.media_inputs import Clip, Picture, as_clip, as_picture, fit_clip, fit_picture
from loomvideo.model.parallel import Ranks
from loomvideo.model.parts import ResidentParts, SequentialParts
from loomvideo.model.sampler import Anchor, Branch, OnStep, SchedulerConfig, SolverChoice, sample
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.model.sizes import ModelSize
from loomvideo.model.tasks import wording
from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)

MAX_SOURCE_FRAMES = 97
"""Of a source that is fitted to the model, unless the call says how many."""


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
        ranks: Ranks that share each generation, all calling :meth:`sample` alike; None for this one alone.
        negative_prompt: What the unconditional branch is told unless a call says; None for an empty message.
        parts: In place of the three, parts that are loaded one after another.
        lora: Adapters, ``FILE`` or ``FILE:STRENGTH`` each.
        few_steps: What the transformer was distilled to; None for an ordinary one.
    """

    def __init__(
        self,
        dit: LoomVideoDiT | None = None,
        codec: Codec | None = None,
        mllm: FrozenMLLM | None = None,
        scheduler: SolverChoice | None = None,
        ranks: Ranks | None = None,
        negative_prompt: str | None = None,
        parts: ResidentParts | SequentialParts | None = None,
        lora: Sequence[str] = (),
        few_steps: FewSteps | None = None,
    ):
        if parts is None:
            if dit is None or codec is None or mllm is None:
                raise TypeError("LoomVideoPipeline: give dit, codec and mllm, or parts")
            parts = ResidentParts(dit.eval(), codec, mllm)
        self.parts = parts
        self.scheduler = scheduler or SchedulerConfig()
        self.ranks = ranks
        self.negative_prompt = negative_prompt
        self.few_steps = few_steps
        self._noticed = False
        self._float8: LoomVideoDiT | None = None
        self._adapters: dict[str, Adapter] = {}
        for choice in lora:
            self.load_lora(*parse_choice(choice))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        model: str | None = None,
        codec_folder: str = "",
        mllm_folder: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernels: str = "auto",
        compile: bool = False,
        lora: Sequence[str] = (),
    ) -> "LoomVideoPipeline":
        """Load a checkpoint with its codec and MLLM, as every command does.

        Args:
            checkpoint: The ``weights`` folder of a run, an exported folder, or the published ``gen_model.pth``.
            model: Its size, tiny, small or 5b; None takes what the folder states.
            codec_folder: The codec's weights (``Wan2.2-TI2V-5B-Diffusers/vae``), for model sizes that need them.
            mllm_folder: The MLLM (``Qwen3-VL-8B-Instruct``), for model sizes that need one.
            device: Where to run; None takes CUDA where there is one.
            dtype: The type of the transformer and the MLLM; None takes bf16 on CUDA, fp32 elsewhere.
            kernels: Back end of the fused operations; empty leaves the one in use.
            compile: Compile the transformer's blocks.
            lora: Adapters, ``FILE`` or ``FILE:STRENGTH`` each; see :meth:`load_lora`.

        Raises:
            UserError: if the checkpoint cannot be read or does not say its model size.
        """
        source = ModelSource(
            str(checkpoint),
            model or "",
            codec_folder,
            mllm_folder,
            kernels,
            compile,
            device=str(device or ""),
            lora=tuple(lora),
        )
        return load_pipeline(source, dtype)

    @property
    def grid(self) -> LatentGrid:
        """How the codec and the transformer's patches divide pixels and frames."""
        return self.parts.grid

    @property
    def dit(self) -> LoomVideoDiT:
        """The transformer, with its adapters."""
        with self.parts.use("dit") as dit:
            if getattr(dit, "adapters", ()) != tuple(self._adapters.values()):
                set_adapters(dit, tuple(self._adapters.values()))
                self._float8 = None
            return dit

    def load_lora(self, path: str | Path, strength: float = 1.0, name: str | None = None) -> None:
        """Add an adapter beside the transformer's layers; several add up.

        Args:
            path: A safetensors file of any dialect of :mod:`loomvideo.model.adapters`, or PEFT's folder.
            strength: What its contribution is multiplied by.
            name: To unload it by; None for the path. A name that is loaded already is replaced.

        Raises:
            UserError: if it cannot be read, or naming the keys that belong to no layer.
        """
        self._adapters[name or str(path)] = read_adapter(path, self.dit, strength)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._adapters)

    def set_lora_strengths(self, strengths: Mapping[str, float]) -> None:
        """Use these of the loaded adapters, by name, with these strengths; the others have none.

        Raises:
            UserError: if one is not loaded.
        """
        for name in strengths:
            self._check_loaded(name)
        for name, adapter in self._adapters.items():
            self._adapters[name] = dataclasses.replace(adapter, strength=strengths.get(name, 0.0))

    def unload_lora(self, name: str | None = None) -> None:
        """Take off an adapter, or all: the transformer is then exactly what it was before.

        Raises:
            UserError: if none of that name is loaded.
        """
        if name is None:
            self._adapters.clear()
        else:
            self._check_loaded(name)
            del self._adapters[name]

    def _check_loaded(self, name: str) -> None:
        if name not in self._adapters:
            raise UserError(f"lora {name}: not loaded; loaded are {', '.join(self._adapters) or 'none'}")

    @property
    def codec(self) -> Codec:
        """Pixels to latents and back."""
        with self.parts.use("codec") as codec:
            return codec

    @property
    def mllm(self) -> FrozenMLLM:
        """Prompts to hidden states."""
        with self.parts.use("mllm") as mllm:
            return mllm

    @torch.inference_mode()
    def encode(
        self,
        task: str,
        prompt: str,
        source: np.ndarray | None = None,
        references: Sequence[np.ndarray] = (),
        size: tuple[int, int] | None = None,
        num_frames: int = 1,
        negative_prompt: str | None = None,
    ) -> Conditions:
        """Encode everything that does not change over the steps.

        Args:
            task: A name of :data:`loomvideo.model.tasks.WORDINGS`.
            prompt: Instruction or caption.
            source: uint8 [frames, height, width, 3] to edit; frames and sides as the codec takes them.
            references: uint8 [height, width, 3] each, sides as the codec takes them.
            size: ``(width, height)`` of what is generated; an edit takes its source's.
            num_frames: Whole latents (4k+1 with Wan's codec); an edit takes its source's.
            negative_prompt: What the unconditional branch is told after ``generate an image: ``, as the published
                sampler words it; None takes the model size's own.

        Raises:
            UserError: if the task lacks its source or references or the size is none the codec can make.
        """
        if wording(task).needs_source != (source is not None):
            raise UserError(f"task={task}: {'source is missing' if source is None else 'takes no source'}")
        if source is not None:
            num_frames, size = len(source), (source.shape[2], source.shape[1])
        if size is None:
            raise UserError(f"size: task={task} has no source to take it from; give width and height")
        self.grid.check_frames("num_frames", num_frames)
        self.grid.check_size("size", *size)
        negative_prompt = self.negative_prompt if negative_prompt is None else negative_prompt
        source_latents, reference_latents = None, []
        if source is not None or references:
            with self.parts.use("codec") as codec:
                source_latents = None if source is None else self._latents(codec, source)
                reference_latents = [self._latents(codec, image[None]) for image in references]
        frames = None if source is None else torch.from_numpy(source)
        pictures = [torch.from_numpy(image) for image in references]
        with self.parts.use("mllm") as mllm:
            build = functools.partial(build_inputs, tokenizer=mllm.tokenizer, processor_config=mllm.processor)
            inputs = {
                "full": build(task, prompt, frames, pictures, "full"),
                "unconditional": text_inputs(prompts.negative(negative_prompt), mllm.tokenizer),
            }
            if wording(task).has_media:
                inputs["visual"] = build(task, "", frames, pictures, "spans")
            states = dict(zip(inputs, mllm.encode(list(inputs.values())), strict=True))
        branches = {
            name: Branch(states[name])
            if name == "unconditional"
            else Branch(states[name], source_latents, reference_latents)
            for name in inputs
        }
        shape = (self.parts.latent_channels, *self.grid.latent_shape(num_frames, *size))
        return Conditions(task, branches, shape)

    def sample(
        self,
        conditions: Conditions,
        steps: int = NUM_STEPS,
        guidance: Guidance | None = None,
        seed: int = 0,
        batch_branches: bool = False,
        on_step: OnStep | None = None,
        shortcuts: Shortcuts | None = None,
        noise: Tensor | None = None,
        anchor: Anchor | None = None,
    ) -> Tensor:
        """Denoise encoded conditions.

        Args:
            conditions: From :meth:`encode`.
            steps: Denoising steps. A distilled transformer takes those that it knows, without guidance, and says once
                when others are asked for.
            guidance: Scales; None takes the task's.
            seed: The seed of the noise; the same seed gives the same latents.
            batch_branches: Run the guidance branches in one pass.
            on_step: Called after each step with its index and the latents; see :func:`loomvideo.model.sampler.sample`.
            shortcuts: Approximations; None for none.
            noise: Start from this noise, fp32 of the conditions' ``latent_shape``, in place of the seed's.
            anchor: What the first frames are drawn to; None for nothing.

        Returns:
            Latents, fp32 [channels, frames, height, width].
        """
        shortcuts = shortcuts or Shortcuts()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(conditions.latent_shape, generator=generator)
        noise = drawn if noise is None else noise
        with self.parts.use("dit"):
            dit = self._float8_dit() if shortcuts.fp8 else self.dit
            if self.few_steps is not None:
                self._notice(self.few_steps, shortcuts.steps or steps)
                again = [torch.randn(noise.shape, generator=generator) for _ in self.few_steps.timesteps[1:]]
                branch = conditions.branches[FULL]
                return sample_few_steps(dit, [noise, *again], branch, self.few_steps, self.ranks, on_step)
            return sample(
                dit,
                noise,
                conditions.branches,
                guidance or Guidance.default(conditions.task),
                steps,
                self.scheduler,
                batch_branches=batch_branches,
                on_step=on_step,
                shortcuts=shortcuts,
                ranks=self.ranks,
                anchor=anchor,
            )

    def num_steps(self, steps: int) -> int:
        """Denoising steps of a generation that is asked for ``steps``."""
        return steps if self.few_steps is None else self.few_steps.num_steps

    def _notice(self, few_steps: FewSteps, steps: int) -> None:
        if steps != few_steps.num_steps and not self._noticed:
            self._noticed = True
            logger.warning("steps=%d: this checkpoint was distilled to %s; it takes those", steps, few_steps.describe())

    def denoise(
        self,
        conditions: Conditions,
        steps: int = NUM_STEPS,
        guidance: Guidance | None = None,
        seed: int = 0,
        batch_branches: bool = False,
        on_step: OnStep | None = None,
        shortcuts: Shortcuts | None = None,
    ) -> np.ndarray:
        """:meth:`sample` and :meth:`decode`: uint8 [frames, height, width, 3]."""
        return self.decode(self.sample(conditions, steps, guidance, seed, batch_branches, on_step, shortcuts))

    def __call__(
        self,
        prompt: str,
        task: str = "t2v",
        source: Clip | None = None,
        references: Sequence[Picture] = (),
        size: tuple[int, int] | None = None,
        num_frames: int = 1,
        negative_prompt: str | None = None,
        steps: int = NUM_STEPS,
        guidance: Guidance | None = None,
        seed: int = 0,
        shortcuts: Shortcuts | None = None,
        buckets: Sequence[int] = (),
        source_fps: float = TARGET_FPS,
    ) -> np.ndarray:
        """Generate or edit: :meth:`encode` and :meth:`denoise` in one.

        Args:
            prompt: Instruction or caption.
            task: A name of :data:`loomvideo.model.tasks.WORDINGS`.
            source: What to edit: uint8 [frames, height, width, 3], or Pillow images.
            references: Pictures: uint8 [height, width, 3] each, or Pillow images.
            size: ``(width, height)`` of what is generated; an edit takes its source's.
            num_frames: Whole latents; an edit takes its source's, with ``buckets`` at most these where it is above 1.
            negative_prompt: What the unconditional branch is told after ``generate an image: ``, as the published
                sampler words it; None takes the model size's own.
            steps: Denoising steps.
            guidance: Scales; None takes the task's.
            seed: The seed of the noise; the same seed gives the same frames.
            shortcuts: Approximations; None for none.
            buckets: Resolution classes, such as ``(640,)``, to which source and references are resized and cropped,
                the source also resampled to 24 frames a second and cut to whole latents; empty takes them as they are.
            source_fps: Frame rate of the source, for ``buckets``.

        Returns:
            uint8 [frames, height, width, 3], one frame for an image.

        Raises:
            UserError: as :meth:`encode`.
        """
        conditions = self.conditions(
            prompt, task, source, references, size, num_frames, negative_prompt, buckets, source_fps
        )
        return self.denoise(conditions, steps, guidance, seed, shortcuts=shortcuts)

    def conditions(
        self,
        prompt: str,
        task: str = "t2v",
        source: Clip | None = None,
        references: Sequence[Picture] = (),
        size: tuple[int, int] | None = None,
        num_frames: int = 1,
        negative_prompt: str | None = None,
        buckets: Sequence[int] = (),
        source_fps: float = TARGET_FPS,
    ) -> Conditions:
        """:meth:`encode` of media as people have them; the arguments are those of :meth:`__call__`.

        Raises:
            UserError: as :meth:`encode`.
        """
        if buckets:
            most = num_frames if num_frames > 1 else MAX_SOURCE_FRAMES
            most = 1 if wording(task).is_image else most
            source = None if source is None else fit_clip(source, buckets, most, source_fps, self.grid)
            references = [fit_picture(picture, buckets) for picture in references]
        source = None if source is None else as_clip(source)
        references = [as_picture(picture) for picture in references]
        return self.encode(task, prompt, source, references, size, num_frames, negative_prompt)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [channels, frames, height, width] to uint8 [frames, height, width, 3]."""
        return np.concatenate(list(self.decode_stream(latents)))

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[np.ndarray]:
        """:meth:`decode` piece by piece in time, so that a file can be encoded meanwhile."""
        with self.parts.use("codec") as codec:
            for piece in codec.decode_stream(latents[None].float()):
                pixels = ((piece[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                yield pixels.permute(1, 2, 3, 0).cpu().numpy()

    def _float8_dit(self) -> LoomVideoDiT:
        dit = self.dit  # which forgets the copy of one with other adapters
        if self._float8 is None:
            self._float8 = float8_blocks(dit)
        return self._float8

    @torch.inference_mode()
    def latents(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [frames, height, width, 3] as the codec encodes them: [channels, frames, height, width]."""
        with self.parts.use("codec") as codec:
            return self._latents(codec, frames)

    def _latents(self, codec: Codec, frames: np.ndarray) -> Tensor:
        video = torch.from_numpy(frames).to(self.parts.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return codec.encode(video).mean[0]


def without_source(conditions: Conditions) -> Conditions:
    """The same conditions with a source of zeros: what the transformer does from the MLLM alone."""
    branches = {name: dataclasses.replace(branch, source=None) for name, branch in conditions.branches.items()}
    return dataclasses.replace(conditions, branches=branches)


def load_pipeline(source: ModelSource, dtype: torch.dtype | None = None) -> LoomVideoPipeline:
    """Load a checkpoint with its codec and MLLM.

    Generation, serving, evaluation and the samples of a training run all load through here, so that none of them
    computes with other operations than the others.

    Args:
        source: What to load; ``memory=auto`` counts as ``resident``, see :func:`loomvideo.model.loading.fitted`.
        dtype: The type of the transformer and the MLLM; None takes bf16 on CUDA, fp32 elsewhere.

    Raises:
        UserError: if the checkpoint, a folder, the kernels or the way of using memory cannot be used.
    """
    size = source.size
    if source.kernels:
        set_backend(source.kernels)
    parts = load_parts(source, dtype)
    return LoomVideoPipeline(
        scheduler=size.scheduler,
        negative_prompt=size.negative_prompt,
        parts=parts,
        lora=source.lora,
        few_steps=stated_few_steps(source.weights),
    )


def pipeline_around(dit: LoomVideoDiT, size: ModelSize, few_steps: FewSteps | None = None) -> LoomVideoPipeline:
    """Give a transformer its codec and MLLM, on its device and in its dtype, with the kernels in use.

    Args:
        dit: Such as one whose weights come from a training checkpoint.
        size: The model's size, its folders filled in.
        few_steps: What it is being distilled to; None for an ordinary one.
    """
    parameter = next(dit.parameters())
    codec = build_codec(size.codec, parameter.device, parameter.dtype)
    mllm = FrozenMLLM.of_size(size, parameter.device, parameter.dtype)
    return LoomVideoPipeline(
        dit, codec, mllm, size.scheduler, negative_prompt=size.negative_prompt, few_steps=few_steps
    )
