"""Generation and editing from text, pictures and clips: the whole model behind one call."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.adapted_parts import AdaptedParts
from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.codec import Codec, build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditions import Conditions, encode_conditions, latents_of
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.few_steps import FewSteps, sample_few_steps, stated_few_steps
from loomvideo.model.guidance import FULL, NUM_STEPS, Guidance
from loomvideo.model.kernels import set_backend
from loomvideo.model.loading import ModelSource, load_parts
from loomvideo.model.media_inputs import Clip, Picture, as_clip, as_picture, fit_clip, fit_picture
from loomvideo.model.parallel import Ranks
from loomvideo.model.parts import ResidentParts, SequentialParts
from loomvideo.model.sampler import Anchor, OnStep, SchedulerConfig, SolverChoice, sample
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.model.sizes import ModelSize
from loomvideo.model.tasks import wording

logger = logging.getLogger(__name__)

MAX_SOURCE_FRAMES = 97
"""Of a source that is fitted to the model, unless the call says how many."""


class LoomVideoPipeline(AdaptedParts):
    """The transformer with its frozen codec and MLLM.

    Args:
        dit: The transformer, on the device and in the dtype to compute in.
        codec: Pixels to latents and back.
        mllm: Prompts to hidden states.
        scheduler: Sampler settings; None for the published ones.
        generate_scheduler: Those of tasks without a source; None for the same.
        default_guidance: The scales of a task unless a call says.
        ranks: Ranks that share each generation, all calling :meth:`sample` alike; None for this one alone.
        negative_prompt: What the unconditional branch is told unless a call says; None for an empty message.
        parts: Parts that are loaded one after another, in place of the three.
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
        generate_scheduler: SolverChoice | None = None,
        default_guidance: Callable[[str], Guidance] = Guidance.default,
    ):
        if parts is None:
            if dit is None or codec is None or mllm is None:
                raise TypeError("LoomVideoPipeline: give dit, codec and mllm, or parts")
            parts = ResidentParts(dit.eval(), codec, mllm)
        super().__init__(parts, lora)
        self.scheduler: SolverChoice = scheduler or SchedulerConfig()
        self.generate_scheduler = generate_scheduler
        self.default_guidance = default_guidance
        self.ranks = ranks
        self.negative_prompt = negative_prompt
        self.few_steps = few_steps
        self._noticed = False

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
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        return encode_conditions(self.parts, task, prompt, source, references, size, num_frames, negative)

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
            conditions: What :meth:`encode` gave.
            steps: Denoising steps. A distilled transformer takes those that it knows, without guidance, and says once
                when others are asked for.
            guidance: Scales; None takes the model size's of the task.
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
            dit = self.float8_dit() if shortcuts.fp8 else self.dit
            if self.few_steps is not None:
                self._notice(self.few_steps, shortcuts.steps or steps)
                again = [torch.randn(noise.shape, generator=generator) for _ in self.few_steps.timesteps[1:]]
                branch = conditions.branches[FULL]
                return sample_few_steps(dit, [noise, *again], branch, self.few_steps, self.ranks, on_step, anchor)
            return sample(
                dit,
                noise,
                conditions.branches,
                guidance or self.default_guidance(conditions.task),
                steps,
                self.scheduler_of(conditions.task),
                batch_branches=batch_branches,
                on_step=on_step,
                shortcuts=shortcuts,
                ranks=self.ranks,
                anchor=anchor,
            )

    def sample_seeds(
        self,
        conditions: Conditions,
        seeds: Sequence[int],
        steps: int = NUM_STEPS,
        guidance: Guidance | None = None,
        batch_branches: bool = False,
        on_step: OnStep | None = None,
        shortcuts: Shortcuts | None = None,
    ) -> Tensor:
        """:meth:`sample` for several seeds in one pass: each video is what its seed gives alone.

        A distilled transformer takes them one after another. The arguments are those of :meth:`sample`.

        Returns:
            Latents, fp32 [seeds, channels, frames, height, width].
        """
        rest = (batch_branches, on_step, shortcuts)
        if self.few_steps is not None:
            return torch.stack([self.sample(conditions, steps, guidance, seed, *rest) for seed in seeds])
        shape = conditions.latent_shape
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return self.sample(conditions, steps, guidance, 0, *rest, noise=noise)

    def scheduler_of(self, task: str) -> SolverChoice:
        """Sampler settings of a task."""
        return self.scheduler if wording(task).needs_source else self.generate_scheduler or self.scheduler

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
            guidance: Scales; None takes the model size's of the task.
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

    @torch.inference_mode()
    def latents(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [frames, height, width, 3] as the codec encodes them: [channels, frames, height, width]."""
        with self.parts.use("codec") as codec:
            return latents_of(codec, frames, self.parts.device)


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
        generate_scheduler=size.generate_scheduler,
        default_guidance=size.guidance,
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
        dit,
        codec,
        mllm,
        size.scheduler,
        negative_prompt=size.negative_prompt,
        few_steps=few_steps,
        generate_scheduler=size.generate_scheduler,
        default_guidance=size.guidance,
    )
