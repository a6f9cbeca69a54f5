"""How large a sample becomes, from its description and the configuration alone."""

from loomvideo.model.conditioning.config import ProcessorConfig
from loomvideo.model.sizes import ModelSize, model_size
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.sources.samples import Sample

_LATENT_BYTES = 2
_FEATURE_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TOKENS = 16
# Of a text that a plan must not depend on: a new caption is no reason to deal samples anew.
_PLANNED_TEXT_TOKENS = 64
# Frames the MLLM is shown, in pairs, of a clip to edit.
_SHOWN_PAIRS = 2
_BYTES_PER_PIXEL = 3


def mllm_tokens(sample: Sample, pixels: int, processor: ProcessorConfig) -> tuple[int, int]:
    """Estimated tokens of the text and of the media."""
    text = len(sample.text) // _CHARACTERS_PER_TOKEN + _TEMPLATE_TOKENS
    pictures = len(sample.references)
    if sample.source:
        pictures += 1 if TASKS[sample.task].is_image else _SHOWN_PAIRS
    return text, pictures * pixels // _pixels_per_token(processor)


def estimated_tokens(sample: Sample, config: PrepareConfig) -> tuple[int, int]:
    """Estimated tokens of text and media at the largest bucket class."""
    return mllm_tokens(sample, max(config.clips.buckets) ** 2, model_size(config.model).mllm.processor)


def planned_bytes(sample: Sample, config: PrepareConfig, model: ModelSize) -> int:
    """Bytes that a plan assumes of a sample, whatever its text."""
    _, media = mllm_tokens(sample, max(config.clips.buckets) ** 2, model.mllm.processor)
    return _bytes(sample, config, model, _PLANNED_TEXT_TOKENS, media)


def estimated_bytes(sample: Sample, config: PrepareConfig, model: ModelSize) -> int:
    """Bytes of a sample in a shard; the largest bucket class is assumed."""
    return _bytes(sample, config, model, *estimated_tokens(sample, config))


def _bytes(sample: Sample, config: PrepareConfig, model: ModelSize, text: int, media: int) -> int:
    pixels = max(config.clips.buckets) ** 2
    is_image = TASKS[sample.task].is_image
    windows = 1 if is_image else config.clips.windows
    frames = 1 if is_image else model.grid.latent_frames(config.clips.num_frames)
    moments = 1 if model.codec.is_built_in else 2
    picture = model.codec.latent_channels * pixels // model.grid.spatial_stride**2 * _LATENT_BYTES * moments
    clips = (2 if sample.source else 1) * windows * frames
    latents = picture * (clips + len(sample.references))
    if config.features.mode == "stored" or (config.features.mode == "text" and not media):
        tokens = text + media + (media if media else 0)
        entries = windows if sample.source else 1
        layers = len(config.features.layers) or model.dit.num_layers
        width = layers * model.dit.mllm_dim * _FEATURE_BYTES[config.features.dtype]
        others = sum(len(other) // _CHARACTERS_PER_TOKEN + _TEMPLATE_TOKENS + media for other in sample.texts)
        return latents + entries * (tokens + others) * width
    shown_bytes = _pixels_per_token(model.mllm.processor) * model.mllm.processor.temporal_patch_size * _BYTES_PER_PIXEL
    return latents + media * shown_bytes + 8 * (text + media)


def _pixels_per_token(processor: ProcessorConfig) -> int:
    return (processor.patch_size * processor.merge_size) ** 2
