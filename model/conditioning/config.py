"""Sizes and sources of the MLLM, as plain data."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ProcessorConfig:
    """Patch geometry and size limits, in pixels; a video's limits count all its frames."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_min_pixels: int = 65_536
    image_max_pixels: int = 16_777_216
    video_min_pixels: int = 4_096
    video_max_pixels: int = 25_165_824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a Qwen3-VL vision tower; patch sizes are the processor's."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]


@dataclass(frozen=True)
class MLLMConfig:
    """A Qwen3-VL: its sizes, and where its weights come from.

    ``kind`` ``"qwen3_vl"`` reads weights, vocabulary and processor from ``folder``. ``"random"`` makes weights that are
    a fixed function of ``seed`` and uses the built-in vocabulary: enough for a small DiT to tell words and pictures
    apart.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mrope_section: tuple[int, int, int]
    vision: VisionConfig
    vocab_size: int = 151_936
    rope_theta: float = 5_000_000.0
    rms_norm_eps: float = 1e-6
    kind: Literal["random", "qwen3_vl"] = "random"
    folder: str = ""
    seed: int = 0
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
