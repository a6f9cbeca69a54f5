"""From text and pictures to what Qwen3-VL reads: token ids, patches and grids.

The work of the published processor (Qwen3-VL's), without torchvision: frames are resampled to 2 a second, resized so
that both sides are multiples of a merged patch, normalised and cut into patches of 2 frames x 16 x 16, laid out in
blocks of 2 x 2 that the vision tower merges into one token.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from loomvideo.model.buckets import resize_frames
from loomvideo.model.clips import mllm_frame_indices
from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.config import ProcessorConfig
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.tasks import Medium, wording
from loomvideo.platform.errors import UserError

# What clips are assumed to run at when their frames are resampled and given timestamps, as published.
ASSUMED_FPS = 24.0
MAX_ASPECT_RATIO = 200


@dataclass
class MLLMInputs:
    """One prompt: ``input_ids`` ``[tokens]`` int64, patches ``[patches, 3 * 2 * 16 * 16]`` and grids ``[media, 3]``.

    A grid row is ``(frame pairs, rows, columns)`` of patches before merging.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the prompt, one token a merged patch."""
        return len(self.input_ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are set, by name; :meth:`from_tensors` reads them back."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "MLLMInputs":
        """The prompt that :meth:`tensors` described."""
        return cls(**{f.name: tensors[f.name] for f in fields(cls) if f.name in tensors})


def build_inputs(
    task: str,
    text: str,
    source_frames: torch.Tensor | None,
    references: list[torch.Tensor],
    variant: prompts.Variant,
    tokenizer: MLLMTokenizer,
    processor_config: ProcessorConfig,
) -> MLLMInputs:
    """Build the MLLM's inputs of one sample.

    Args:
        task: One of :data:`loomvideo.model.tasks.WORDINGS`.
        text: Instruction, caption or prompt.
        source_frames: uint8 ``[frames, height, width, 3]`` of the clip to edit (one frame for an image), else None. Of
            more than 15 frames those of :func:`mllm_frame_indices` are shown.
        references: uint8 ``[height, width, 3]`` each.
        variant: ``full``; ``visual``: all text empty, media as they are (guidance dropout in training); ``spans``: only
            the vision spans, without timestamps (the visual-only branch of generation); ``null``: nothing.
        tokenizer: The tokenizer of the MLLM.
        processor_config: The picture settings of the MLLM.

    Raises:
        UserError: if the task lacks its source or references, has ones it cannot use, or a picture is too narrow.
    """
    kind = wording(task)
    if (kind.source is None) != (source_frames is None):
        raise UserError(f"task {task} {'takes no source' if kind.source is None else 'needs a source'}")
    if kind.needs_references != bool(references):
        raise UserError(f"task {task} {'needs references' if kind.needs_references else 'takes no references'}")
    media = iter([source_frames, *references] if kind.source else references)
    content, images, videos = "", [], []
    for medium, words in prompts.compose(task, text, len(references), variant):
        if medium == "text":
            content += words
            continue
        frames = torch.as_tensor(next(media))
        if medium == "video":
            shown, times = _resample(len(frames), processor_config)
            videos.append(_patchify(frames[shown], "video", processor_config))
            content += _video_spans(videos[-1][1], None if variant == "spans" else times, processor_config)
        else:
            images.append(_patchify(frames if frames.ndim == 4 else frames[None], "image", processor_config))
            content += _span(prompts.IMAGE_PAD, images[-1][1], processor_config)
    inputs = text_inputs(content, tokenizer)
    if images:
        inputs.pixel_values, inputs.image_grid_thw = _join(images)
    if videos:
        inputs.pixel_values_videos, inputs.video_grid_thw = _join(videos)
    return inputs


def text_inputs(content: str, tokenizer: MLLMTokenizer) -> MLLMInputs:
    """A message of text alone, such as the negative prompt; the empty text is the null prompt."""
    return MLLMInputs(torch.tensor(tokenizer.encode(prompts.chat(content)), dtype=torch.int64))


def interleaved_inputs(
    parts: list[str | torch.Tensor], tokenizer: MLLMTokenizer, processor_config: ProcessorConfig
) -> MLLMInputs:
    """A message of texts and pictures in any order, as a chat would send it.

    Args:
        parts: Text, or a picture uint8 ``[height, width, 3]``.
        tokenizer: The tokenizer of the MLLM.
        processor_config: The picture settings of the MLLM.

    Raises:
        UserError: if a picture is too narrow.
    """
    content, images = "", []
    for part in parts:
        if isinstance(part, str):
            content += part
        else:
            images.append(_patchify(part[None], "image", processor_config))
            content += _span(prompts.IMAGE_PAD, images[-1][1], processor_config)
    inputs = text_inputs(content, tokenizer)
    if images:
        inputs.pixel_values, inputs.image_grid_thw = _join(images)
    return inputs


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, num_frames: int = 1
) -> tuple[int, int]:
    """The ``(height, width)`` nearest to the given one in multiples of ``factor`` within the limits on all pixels.

    Raises:
        UserError: if one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UserError(f"picture of {width}x{height}: one side is over {MAX_ASPECT_RATIO} times the other; crop it")
    resized = [round(side / factor) * factor for side in (height, width)]
    if num_frames * math.prod(resized) > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        resized = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif num_frames * math.prod(resized) < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        resized = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return resized[0], resized[1]


def _resample(num_frames: int, config: ProcessorConfig) -> tuple[list[int], list[float]]:
    """Frames to show, filled up to whole temporal patches, and the mean time in seconds of each patch."""
    clip = mllm_frame_indices(num_frames)
    wanted = max(int(len(clip) / ASSUMED_FPS * config.fps), config.min_frames)
    wanted = min(wanted, config.max_frames, len(clip))
    # Positions within the frames shown, not within the clip: the published processor sees only those, at 24 fps.
    positions = [round(i * (len(clip) - 1) / max(wanted - 1, 1)) for i in range(wanted)]
    pair = config.temporal_patch_size
    positions += positions[-1:] * (-len(positions) % pair)
    times = [(positions[i] + positions[i + pair - 1]) / 2 / ASSUMED_FPS for i in range(0, len(positions), pair)]
    return [clip[position] for position in positions], times


def _patchify(frames: torch.Tensor, medium: Medium, config: ProcessorConfig) -> tuple[torch.Tensor, list[int]]:
    """uint8 ``[frames, height, width, 3]`` to patches in merge-block order and their grid."""
    patch, merge, pair = config.patch_size, config.merge_size, config.temporal_patch_size
    limits = (
        (config.image_min_pixels, config.image_max_pixels)
        if medium == "image"
        else (config.video_min_pixels, config.video_max_pixels)
    )
    height, width = smart_resize(*frames.shape[1:3], patch * merge, *limits, len(frames))
    frames = resize_frames(frames, height, width)
    if len(frames) % pair:
        frames = torch.cat([frames, frames[-1:].expand(pair - len(frames) % pair, -1, -1, -1)])
    pixels = (frames / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    grid = [len(frames) // pair, height // patch, width // patch]
    blocks = pixels.reshape(grid[0], pair, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(math.prod(grid), -1), grid


def _span(pad: str, grid: list[int], config: ProcessorConfig) -> str:
    return prompts.VISION_START + pad * (grid[1] * grid[2] // config.merge_size**2) + prompts.VISION_END


def _video_spans(grid: list[int], times: list[float] | None, config: ProcessorConfig) -> str:
    span = _span(prompts.VIDEO_PAD, grid, config)
    if times is None:
        return span * grid[0]
    return "".join(f"<{time:.1f} seconds>{span}" for time in times)


def _join(media: list[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([patches for patches, _ in media]), torch.tensor([grid for _, grid in media])


def read_processor_config(folder: Path | str) -> ProcessorConfig:
    """Read ``preprocessor_config.json`` and ``video_preprocessor_config.json`` of a Qwen3-VL folder.

    Raises:
        UserError: if the first is missing, or one is not JSON.
    """
    image = _read_json(Path(folder) / "preprocessor_config.json")
    video_file = Path(folder) / "video_preprocessor_config.json"
    video = _read_json(video_file) if video_file.is_file() else {}
    values = {key: image[key] for key in ("patch_size", "temporal_patch_size", "merge_size") if key in image}
    values |= {ours: tuple(image[key]) for ours, key in (("mean", "image_mean"), ("std", "image_std")) if key in image}
    for medium, settings in (("image", image), ("video", video)):
        size = settings.get("size", {})
        values |= {f"{medium}_min_pixels": size["shortest_edge"]} if "shortest_edge" in size else {}
        values |= {f"{medium}_max_pixels": size["longest_edge"]} if "longest_edge" in size else {}
    values |= {key: video[key] for key in ("fps", "min_frames", "max_frames") if key in video}
    return ProcessorConfig(**values)


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise UserError(f"{file}: not found; a Qwen3-VL folder holds its picture sizes there")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
