"""Video codecs: the protocol, the embedded ones, computed and learned, and Wan's VAE."""

from loomvideo.model.codec.build import build_codec
from loomvideo.model.codec.embedded import COEFFICIENTS, DCTCodec
from loomvideo.model.codec.grid import LatentGrid
from loomvideo.model.codec.learned import LearnedCodec
from loomvideo.model.codec.protocol import (
    STREAM_FRAMES,
    Codec,
    CodecConfig,
    CodecExecution,
    LatentMoments,
    check_video_shape,
)

__all__ = [
    "COEFFICIENTS",
    "STREAM_FRAMES",
    "Codec",
    "CodecConfig",
    "CodecExecution",
    "DCTCodec",
    "LatentGrid",
    "LatentMoments",
    "LearnedCodec",
    "build_codec",
    "check_video_shape",
]
