"""Video codecs: the protocol, the embedded one, and Wan's VAE."""

from loomvideo.model.codec.build import build_codec
from loomvideo.model.codec.embedded import COEFFICIENTS, DCTCodec
from loomvideo.model.codec.protocol import (
    SPATIAL_STRIDE,
    STREAM_FRAMES,
    TEMPORAL_STRIDE,
    Codec,
    CodecConfig,
    LatentMoments,
    check_video_shape,
)

__all__ = [
    "COEFFICIENTS",
    "SPATIAL_STRIDE",
    "STREAM_FRAMES",
    "TEMPORAL_STRIDE",
    "Codec",
    "CodecConfig",
    "DCTCodec",
    "LatentMoments",
    "build_codec",
    "check_video_shape",
]
