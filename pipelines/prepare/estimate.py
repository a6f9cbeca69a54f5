"""How large a sample becomes, from its description and the configuration alone."""

from loomvideo.model.codec import SPATIAL_STRIDE, TEMPORAL_STRIDE
from loomvideo.model.sizes import ModelSize
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.geometry import IMAGE_TASKS
from loomvideo.pipelines.sources.samples import Sample

_LATENT_BYTES = 2
_FEATURE_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TOKENS = 16
# Frames the MLLM is shown, in pairs, of a clip to edit; a pair of 32x32 pixels is one token.
_SHOWN_PAIRS = 2
_PIXELS_PER_TOKEN = 32 * 32


def mllm_tokens(sample: Sample, pixels: int) -> tuple[int, int]:
    """Estimated tokens of the text and of the media."""
    text = len(sample.text) // _CHARACTERS_PER_TOKEN + _TEMPLATE_TOKENS
    pictures = len(sample.references)
    if sample.source:
        pictures += 1 if sample.task in IMAGE_TASKS else _SHOWN_PAIRS
    return text, pictures * pixels // _PIXELS_PER_TOKEN


def estimated_tokens(sample: Sample, config: PrepareConfig) -> tuple[int, int]:
    """Estimated tokens of text and media at the largest bucket class."""
    return mllm_tokens(sample, max(config.clips.buckets) ** 2)


def estimated_bytes(sample: Sample, config: PrepareConfig, model: ModelSize) -> int:
    """Bytes of a sample in a shard; the largest bucket class is assumed."""
    pixels = max(config.clips.buckets) ** 2
    is_image = sample.task in IMAGE_TASKS
    windows = 1 if is_image else config.clips.windows
    frames = 1 if is_image else (config.clips.num_frames - 1) // TEMPORAL_STRIDE + 1
    moments = 1 if model.codec.kind == "dct" else 2
    picture = model.codec.latent_channels * pixels // SPATIAL_STRIDE**2 * _LATENT_BYTES * moments
    clips = (2 if sample.source else 1) * windows * frames
    latents = picture * (clips + len(sample.references))
    text, media = mllm_tokens(sample, pixels)
    if config.features.mode == "stored" or (config.features.mode == "text" and not media):
        tokens = text + media + (media if media else 0)
        entries = windows if sample.source else 1
        layers = len(config.features.layers) or model.dit.num_layers
        width = layers * model.dit.mllm_dim * _FEATURE_BYTES[config.features.dtype]
        return latents + entries * tokens * width
    return latents + media * _PIXELS_PER_TOKEN * 2 * 3 + 8 * (text + media)
