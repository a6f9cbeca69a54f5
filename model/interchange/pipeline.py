"""LoomVideo as a pipeline of diffusers: its calling conventions around :class:`~loomvideo.model.pipeline`."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.conditions import Conditions
from loomvideo.model.few_steps import few_steps_of
from loomvideo.model.guidance import NUM_STEPS, Guidance
from loomvideo.model.interchange.folder import declare_pipeline
from loomvideo.model.interchange.parts import ComponentParts, processor_of
from loomvideo.model.interchange.schedulers import SchedulerChoice
from loomvideo.model.kernels import set_backend
from loomvideo.model.media_inputs import Clip, Picture
from loomvideo.model.parts import BlockStream, move_all_but
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sampler import StopDenoising
from loomvideo.model.tasks import Task, wording
from loomvideo.platform.errors import UserError

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
StepCallback = Callable[[DiffusionPipeline, int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class LoomVideoPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        frames: One video each: float32 [videos, frames, height, width, 3] in [0, 1] (``np``), [videos, frames, 3,
            height, width] (``pt``), lists of pictures (``pil``), or [videos, channels, frames, rows, columns] latents.
    """

    frames: Any


class LoomVideoDiffusionPipeline(DiffusionPipeline):
    """Generation and editing with the calling conventions of diffusers.

    Args:
        transformer: The transformer.
        vae: ``AutoencoderKLWan``, or the embedded codec of the small sizes.
        text_encoder: The ``Qwen3VLModel`` whose layers condition the transformer's blocks.
        tokenizer: Its tokenizer.
        scheduler: Integrates the velocity; any scheduler along the flow.
        processor: Patch geometry and picture sizes of the MLLM; None for Qwen3-VL's own.
        negative_prompt: What the unconditional branch is told unless a call says; None for an empty message.
        few_steps: What the transformer was distilled to, as its folder states it: it takes those steps, without
            guidance. None for an ordinary one.
        sampling: Scales and flow shift that differ from the published ones, by ``edit`` and ``generate``, as
            :meth:`loomvideo.model.sizes.ModelSize.sampling_notes` says them; None for the published.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 - the library's own declaration

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        scheduler: Any,
        processor: dict[str, Any] | None = None,
        negative_prompt: str | None = None,
        few_steps: dict[str, Any] | None = None,
        sampling: dict[str, dict[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            processor=processor, negative_prompt=negative_prompt, few_steps=few_steps, sampling=sampling
        )
        self._sampling = sampling or {}
        self._own_scheduler = scheduler
        set_backend("auto")
        transformer.eval()
        self._interrupt = False
        self._pipeline = LoomVideoPipeline(
            parts=ComponentParts(self, processor_of(processor)),
            negative_prompt=negative_prompt,
            few_steps=few_steps_of(few_steps) if few_steps else None,
        )

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> Any:
        """Read ``model_index.json``; the folder's own loader is for programs that do not know this class."""
        read = super().load_config(pretrained_model_name_or_path, **options)
        config = read[0] if isinstance(read, tuple) else read
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return read

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any) -> None:
        """Save as diffusers does, with what lets ``DiffusionPipeline`` find this class.

        Raises:
            UserError: while adapters are loaded, whose weights would be saved beside the transformer's.
        """
        if self._pipeline.adapters:
            raise UserError("save_pretrained: adapters are loaded; call unload_lora_weights first")
        super().save_pretrained(save_directory, *arguments, **options)
        index = Path(save_directory) / self.config_name
        declare_pipeline(Path(save_directory), json.loads(index.read_text()))

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` in a callback to keep the latents as they are."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        video: Clip | None = None,
        image: Picture | None = None,
        reference_images: Sequence[Picture] = (),
        task: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 97,
        num_inference_steps: int = NUM_STEPS,
        guidance_scale: float | None = None,
        visual_guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        buckets: Sequence[int] = (),
        fps: float = TARGET_FPS,
    ) -> LoomVideoPipelineOutput | tuple[Any]:
        """Generate or edit.

        Args:
            prompt: Instruction or caption, or several.
            negative_prompt: What the unconditional branch is told; None takes the model's own.
            video: A video to edit: uint8 [frames, height, width, 3], or Pillow images.
            image: A picture to edit, in place of a video.
            reference_images: Pictures that the prompt speaks of.
            task: One of :data:`loomvideo.model.tasks.WORDINGS`; None takes what the inputs say.
            height: The height of what is generated without a source.
            width: Likewise.
            num_frames: Whole latents (4k+1 with Wan's VAE); an edit takes its source's, 1 is a picture.
            num_inference_steps: Denoising steps.
            guidance_scale: The scale of text; None takes the task's.
            visual_guidance_scale: The scale of media; None takes the task's.
            num_videos_per_prompt: Videos of each prompt, each from noise of its own.
            generator: Draws the noise; one for each video, or one for all.
            latents: The noise itself, [channels, frames, rows, columns] or one of them for each video.
            output_type: ``np``, ``pt``, ``pil`` or ``latent``.
            return_dict: Whether to return an object and not a tuple.
            callback_on_step_end: Called after each step with this pipeline, the step, its timestep and
                ``{"latents": …}``; may return others to go on with.
            callback_on_step_end_tensor_inputs: What it is given; ``latents`` alone is there.
            buckets: Resolution classes, such as ``(640,)``, to which sources and references are resized and cropped,
                a video also resampled to 24 frames a second; empty takes them as they are.
            fps: Frame rate of the video, for ``buckets``.

        Raises:
            UserError: for what cannot be generated, naming the argument.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type={output_type}: choose one of {', '.join(OUTPUT_TYPES)}")
        if list(callback_on_step_end_tensor_inputs) not in ([], ["latents"]):
            raise UserError(f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs}: only latents")
        if num_videos_per_prompt < 1:
            raise UserError(f"num_videos_per_prompt={num_videos_per_prompt}: must be at least 1")
        if video is not None and image is not None:
            raise UserError("video and image: give one of them")
        found = wording(task or _meant(video, image, bool(reference_images), num_frames))
        source = video if image is None else image
        size = (width, height) if width and height else None
        guidance = self._guidance(found, guidance_scale, visual_guidance_scale)
        self._pipeline.scheduler = SchedulerChoice(self.scheduler)
        self._pipeline.generate_scheduler = self._generate_scheduler()
        self._interrupt = False
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts) * num_videos_per_prompt
        generators = _each(generator, count, "generator")
        noises = _noises(latents, count)
        made: list[Any] = []
        for text in prompts:
            conditions = self._pipeline.conditions(
                text, found.name, source, reference_images, size, 1 if found.is_image else num_frames,
                negative_prompt, buckets, fps,
            )  # fmt: skip
            for _ in range(num_videos_per_prompt):
                noise = noises[len(made)]
                if noise is None:
                    noise = _noise(conditions, generators[len(made)])
                made.append(self._make(conditions, noise, num_inference_steps, guidance, callback_on_step_end))
        if output_type != "latent":
            made = [_as(output_type, self._pipeline.decode(latents)) for latents in made]
        self.maybe_free_model_hooks()
        frames = made if output_type == "pil" else np.stack(made) if output_type == "np" else torch.stack(made)
        return LoomVideoPipelineOutput(frames) if return_dict else (frames,)

    def _guidance(self, task: Task, scale: float | None, visual_scale: float | None) -> Guidance:
        own = self._sampling.get("edit" if task.needs_source else "generate", {})
        if scale is None:
            scale = own.get("scale", task.scale)
        if task.visual_scale is None:
            return Guidance(scale)
        return Guidance(scale, own.get("visual_scale", task.visual_scale) if visual_scale is None else visual_scale)

    def _generate_scheduler(self) -> SchedulerChoice | None:
        """The folder's own scheduler as tasks without a source take it; one that was put in its place serves all."""
        shift = self._sampling.get("generate", {}).get("flow_shift")
        if shift is None or self.scheduler is not self._own_scheduler:
            return None
        return SchedulerChoice(type(self.scheduler).from_config(self.scheduler.config, flow_shift=shift))

    def _make(
        self, conditions: Conditions, noise: Tensor, steps: int, guidance: Guidance, callback: StepCallback | None
    ) -> Tensor:
        few, task = self._pipeline.few_steps, conditions.task
        scheduler = self._pipeline.scheduler_of(task)
        has_source = wording(task).needs_source
        timesteps = torch.tensor(few.timesteps_of(has_source)) if few else scheduler.build(steps).timesteps
        with self.progress_bar(total=len(timesteps)) as bar:

            def on_step(step: int, latents: Tensor) -> Tensor | None:
                bar.update()
                changed = callback(self, step, timesteps[step], {"latents": latents}) if callback else None
                if self._interrupt:
                    raise StopDenoising
                return (changed or {}).get("latents")

            return self._pipeline.sample(conditions, steps, guidance, on_step=on_step, noise=noise)

    def load_lora_weights(
        self, path: str | os.PathLike, weight_name: str = "", adapter_name: str | None = None, strength: float = 1.0
    ) -> None:
        """Add an adapter beside the transformer's layers; see :meth:`LoomVideoPipeline.load_lora`."""
        file = Path(path) / weight_name if weight_name else path
        self._pipeline.load_lora(file, strength, adapter_name)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Use these of the loaded adapters with these strengths, the others not at all.

        Raises:
            UserError: if one is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        self._pipeline.set_lora_strengths(dict(zip(names, weights, strict=True)))

    def unload_lora_weights(self) -> None:
        """Take off all adapters."""
        self._pipeline.unload_lora()

    def enable_vae_tiling(self) -> None:
        """Decode in tiles that keep the VAE's activations within 4 GiB; without, within 12 GiB."""
        self.vae.use_tiling = True

    def disable_vae_tiling(self) -> None:
        """Undo :meth:`enable_vae_tiling`."""
        self.vae.use_tiling = False

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Keep the blocks of transformer and MLLM on the host and bring each to the device for its turn.

        Args:
            gpu_id: Which GPU, where ``device`` does not say.
            device: Where they compute.
        """
        target = torch.device(device)
        if target.index is None and target.type == "cuda":
            target = torch.device("cuda", gpu_id or 0)
        self.remove_all_hooks()
        for module, blocks in (
            (self.transformer, self.transformer.blocks),
            (self.text_encoder, self.text_encoder.language_model.layers),
        ):
            module.requires_grad_(False)
            move_all_but(module, blocks, target)
            BlockStream(blocks, target)
        self.vae.to(target)

    def enable_group_offload(self, *arguments: Any, **options: Any) -> None:
        """Refused: blocks are brought to the device by :meth:`enable_sequential_cpu_offload` here."""
        raise UserError("enable_group_offload: use enable_sequential_cpu_offload, which copies the next block ahead")


def _meant(video: Any, image: Any, has_references: bool, num_frames: int) -> str:
    """The task that inputs stand for."""
    if video is not None:
        return "ref_edit" if has_references else "video_edit"
    if image is not None:
        return "image_edit"
    makes = "i" if num_frames == 1 else "v"
    return f"mi2{makes}" if has_references else f"t2{makes}"


def _each(given: Any, count: int, name: str) -> list[Any]:
    """One for each video: the same for all, or as many as there are."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise UserError(f"{name}: {len(given)} of them for {count} videos")
    return list(given)


def _noises(latents: Tensor | None, count: int) -> list[Tensor | None]:
    if latents is None or latents.ndim == 4:
        return [latents] * count
    return _each(list(latents), count, "latents")


def _noise(conditions: Conditions, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    return torch.randn(conditions.latent_shape, generator=generator, device=device)


def _as(output_type: str, frames: np.ndarray) -> Any:
    """Frames uint8 [frames, height, width, 3] as a caller wants them."""
    if output_type == "pil":
        return [Image.fromarray(frame) for frame in frames]
    values = frames.astype(np.float32) / 255
    return values if output_type == "np" else torch.from_numpy(values).permute(0, 3, 1, 2)
