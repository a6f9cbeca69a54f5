"""What a generation is conditioned on: texts, pictures and clips, encoded by the codec and the MLLM."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.codec import Codec
from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.inputs import build_inputs, text_inputs
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL
from loomvideo.model.parts import ResidentParts, SequentialParts
from loomvideo.model.sampler import Branch
from loomvideo.model.tasks import wording
from loomvideo.platform.errors import UserError


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


@torch.inference_mode()
def encode_conditions(
    parts: ResidentParts | SequentialParts,
    task: str,
    prompt: str,
    source: np.ndarray | None,
    references: Sequence[np.ndarray],
    size: tuple[int, int] | None,
    num_frames: int,
    negative_prompt: str | None,
) -> Conditions:
    """Encode everything that does not change over the steps.

    Args:
        parts: Codec and MLLM.
        task, prompt, source, references, size, num_frames: What
            :meth:`loomvideo.model.pipeline.LoomVideoPipeline.encode` takes.
        negative_prompt: What the unconditional branch is told; None for an empty message.

    Raises:
        UserError: if the task lacks its source or references or the size is none the codec can make.
    """
    if wording(task).needs_source != (source is not None):
        raise UserError(f"task={task}: {'source is missing' if source is None else 'takes no source'}")
    if source is not None:
        num_frames, size = len(source), (source.shape[2], source.shape[1])
    if size is None:
        raise UserError(f"size: task={task} has no source to take it from; give width and height")
    parts.grid.check_frames("num_frames", num_frames)
    parts.grid.check_size("size", *size)
    source_latents, reference_latents = None, []
    if source is not None or references:
        with parts.use("codec") as codec:
            source_latents = None if source is None else latents_of(codec, source, parts.device)
            reference_latents = [latents_of(codec, image[None], parts.device) for image in references]
    frames = None if source is None else torch.from_numpy(source)
    pictures = [torch.from_numpy(image) for image in references]
    with parts.use("mllm") as mllm:
        build = functools.partial(build_inputs, tokenizer=mllm.tokenizer, processor_config=mllm.processor)
        inputs = {
            FULL: build(task, prompt, frames, pictures, "full"),
            UNCONDITIONAL: text_inputs(prompts.negative(negative_prompt), mllm.tokenizer),
        }
        if wording(task).has_media:
            inputs[VISUAL] = build(task, "", frames, pictures, "spans")
        states = dict(zip(inputs, mllm.encode(list(inputs.values())), strict=True))
    branches = {
        name: Branch(states[name]) if name == UNCONDITIONAL else Branch(states[name], source_latents, reference_latents)
        for name in inputs
    }
    shape = (parts.latent_channels, *parts.grid.latent_shape(num_frames, *size))
    return Conditions(task, branches, shape)


def latents_of(codec: Codec, frames: np.ndarray, device: torch.device) -> Tensor:
    """Frames uint8 [frames, height, width, 3] as the codec encodes them: [channels, frames, height, width]."""
    video = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return codec.encode(video).mean[0]


def without_source(conditions: Conditions) -> Conditions:
    """The same conditions with a source of zeros: what the transformer does from the MLLM alone."""
    branches = {name: dataclasses.replace(branch, source=None) for name, branch in conditions.branches.items()}
    return dataclasses.replace(conditions, branches=branches)
