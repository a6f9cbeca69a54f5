"""From a configuration to a codec."""

import torch

from loomvideo.model.codec.embedded import DCTCodec
from loomvideo.model.codec.learned import LearnedCodec
from loomvideo.model.codec.protocol import AS_WRITTEN, Codec, CodecConfig, CodecExecution
from loomvideo.platform.errors import UserError


def build_codec(
    config: CodecConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: CodecExecution = AS_WRITTEN,
) -> Codec:
    """The codec a configuration names, ready on ``device``; ``dtype`` and ``execution`` are of ``"wan"``.

    Raises:
        UserError: for an unknown kind, a folder that holds no such codec, or other strides than stated.
    """
    codec = _build(config, device, dtype, execution)
    stated = config.temporal_stride, config.spatial_stride
    if (codec.temporal_stride, codec.spatial_stride) != stated:
        raise UserError(
            f"codec kind={config.kind} {config.folder}: strides {codec.temporal_stride} in time and "
            f"{codec.spatial_stride} in space, the preset says {stated[0]} and {stated[1]}"
        )
    return codec


def _build(config: CodecConfig, device: torch.device | str, dtype: torch.dtype, execution: CodecExecution) -> Codec:
    if config.kind == "dct":
        return DCTCodec(config.latent_channels)
    if config.kind == "learned":
        codec = LearnedCodec(device=device)
        if codec.latent_channels != config.latent_channels:
            raise UserError(
                f"codec latent_channels={config.latent_channels}: the learned codec has {codec.latent_channels}"
            )
        return codec
    if config.kind == "wan":
        from loomvideo.model.codec.wan import WanVAE  # diffusers takes seconds to import

        if not config.folder:
            raise UserError("codec kind=wan: set its folder to the vae folder of Wan2.2-TI2V-5B-Diffusers")
        codec = WanVAE.from_pretrained(config.folder, device, dtype, config.memory_limit_bytes, execution)
        if codec.latent_channels != config.latent_channels:
            raise UserError(
                f"{config.folder}: a VAE of {codec.latent_channels} channels, the model takes {config.latent_channels}"
            )
        return codec
    raise UserError(f"codec kind={config.kind!r}: choose dct, learned or wan")
