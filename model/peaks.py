"""How much memory a generation needs, from its sizes alone: weights, conditioning and activations of each stage.

Activations are counted in tensors of a token's width that are alive at once; a test holds the sums against the bytes
that the real code allocates on fake tensors at the published sizes. Not counted: what the CUDA context, its libraries
and the allocator's fragments take, for which :data:`OVERHEAD_BYTES` is set aside when a mode is chosen.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from loomvideo.model.conditioning.config import MLLMConfig
from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.parts import MODES
from loomvideo.model.quantize import stored_bytes
from loomvideo.model.sizes import ModelSize
from loomvideo.model.tasks import wording
from loomvideo.platform.errors import UserError

GIB = 2**30
OVERHEAD_BYTES = GIB
WAN_VAE_PARAMETERS = 704_687_000
"""Parameters of the published codec."""
CODEC_LEAST_BYTES = 4 * GIB
"""Activations that the codec is given at least; it cuts its work to what it has, see :func:`codec_limit`."""
_TEXT_TOKENS = 256
_STREAMED_BLOCKS = 2
"""Blocks on the device at once when they are streamed."""
_DIT_TENSORS, _MLLM_TENSORS = 9, 6
"""Tensors of the inner width alive at once in a block, beside the feed-forward's two."""
_MLLM_STATES = 3
"""Copies of a prompt's states while they are gathered."""


@dataclass(frozen=True)
class Work:
    """What is generated, as far as memory depends on it.

    Attributes:
        task: Its name.
        width: Pixels.
        height: Pixels.
        num_frames: Frames.
        references: Pixels of each reference picture.
    """

    task: str
    width: int
    height: int
    num_frames: int
    references: tuple[int, ...] = ()


@dataclass(frozen=True)
class Peak:
    """Bytes on the device at the worst moment of each stage.

    Attributes:
        mode: One of :data:`loomvideo.model.parts.MODES`.
        encode: While the MLLM reads.
        denoise: While the transformer runs.
        decode: While the codec decodes in its smallest share of memory; it takes more where there is more.
    """

    mode: str
    encode: int
    denoise: int
    decode: int

    @property
    def num_bytes(self) -> int:
        """The largest of the three."""
        return max(self.encode, self.denoise, self.decode)


def peaks(
    size: ModelSize, work: Work, mllm_bits: int = 16, dit_bits: int = 16, num_bytes: int = 2, beside: bool = False
) -> list[Peak]:
    """The peak of every mode, fastest mode first.

    Args:
        size: The size of the model.
        work: What is generated.
        mllm_bits: Bits of the MLLM's decoder weights.
        dit_bits: Bits of the transformer's block weights.
        num_bytes: Bytes of other weights and activations: 2 for bf16.
        beside: Whether a result is decoded while the next one is encoded and denoised, where all weights are resident.
    """
    dit, mllm = _dit_weights(size.dit), _mllm_weights(size.mllm)
    codec = num_bytes * WAN_VAE_PARAMETERS if size.codec.kind == "wan" else 0
    kept = conditions_bytes(size, work, num_bytes)
    encode = activations_of_encoding(size, work, num_bytes)
    denoise = kept + activations_of_denoising(size, work, num_bytes)
    pixels = work.num_frames * work.width * work.height * 3
    decode = pixels * (4 + num_bytes) + (CODEC_LEAST_BYTES if size.codec.kind == "wan" else 0)
    found = []
    for mode in MODES:
        dit_bytes = dit.on_device(mode, dit_bits, num_bytes)
        mllm_bytes = mllm.on_device(mode, mllm_bits, num_bytes)
        if mode == "resident":
            everything = dit_bytes + mllm_bytes + codec
            meanwhile = max(encode, denoise) if beside else 0
            found.append(Peak(mode, everything + encode, everything + denoise, everything + decode + meanwhile))
        else:
            found.append(Peak(mode, mllm_bytes + encode, dit_bytes + denoise, codec + decode))
    return found


def codec_limit(peak: Peak, available_bytes: int, most: int) -> int:
    """Activations that the codec may have: what is left beside the weights, at most its own limit."""
    return max(min(most, available_bytes - OVERHEAD_BYTES - peak.decode + CODEC_LEAST_BYTES), CODEC_LEAST_BYTES)


def choose_mode(found: Iterable[Peak], available_bytes: int) -> Peak:
    """The fastest mode that fits.

    Raises:
        UserError: if none does, with what each needs.
    """
    found = list(found)
    for peak in found:
        if peak.num_bytes + OVERHEAD_BYTES <= available_bytes:
            return peak
    needed = ", ".join(f"{peak.mode} {peak.num_bytes / GIB:.1f}" for peak in found)
    raise UserError(
        f"memory=auto: no way fits into {available_bytes / GIB:.1f} GiB (GiB needed: {needed}, and "
        f"{OVERHEAD_BYTES / GIB:.0f} beside); set mllm_bits=4 or dit_bits=8, or lower num_frames, width or height"
    )


def mllm_tokens(size: ModelSize, work: Work) -> list[int]:
    """Estimated tokens of each branch's prompt."""
    processor, task = size.mllm.processor, wording(work.task)
    pixels_a_token = (processor.patch_size * processor.merge_size) ** 2
    pairs = 0 if not task.needs_source else 1 if task.is_image else math.ceil(processor.min_frames / 2)
    media = pairs * work.width * work.height // pixels_a_token
    media += sum(pixels // pixels_a_token for pixels in work.references)
    return [media + _TEXT_TOKENS, *([media] if media else []), _TEXT_TOKENS]


def conditions_bytes(size: ModelSize, work: Work, num_bytes: int = 2) -> int:
    """MLLM states and cross-attention keys and values of all branches, kept over the steps."""
    per_token = size.dit.num_layers * (size.dit.mllm_dim + 2 * size.dit.inner_dim) * num_bytes
    # Each branch's states are on the device once more in its pack while its keys and values are made.
    largest = max(mllm_tokens(size, work)) * size.dit.num_layers * size.dit.mllm_dim * num_bytes
    return sum(mllm_tokens(size, work)) * per_token + largest


def activations_of_encoding(size: ModelSize, work: Work, num_bytes: int = 2) -> int:
    """The MLLM's activations and the states it gathers."""
    tokens, config = mllm_tokens(size, work), size.mllm
    states = sum(tokens) * size.dit.num_layers * config.hidden_size * num_bytes
    layer = max(tokens) * (_MLLM_TENSORS * config.hidden_size + 3 * config.intermediate_size) * num_bytes
    vision = 4 * max(tokens) * (4 * config.vision.hidden_size + 2 * config.vision.intermediate_size) * num_bytes
    return _MLLM_STATES * states + layer + vision


def activations_of_denoising(size: ModelSize, work: Work, num_bytes: int = 2) -> int:
    """The transformer's activations for one branch, references counted."""
    dit, grid = size.dit, size.grid
    tokens = grid.num_tokens(work.num_frames, work.width, work.height)
    cell = grid.side_multiples[0] * grid.side_multiples[1]
    tokens += sum(pixels // cell for pixels in work.references)
    latents = tokens * dit.patch_dim * 4 * 8  # fp32: the solver's history, the branches' velocities
    return tokens * (_DIT_TENSORS * dit.inner_dim + 2 * dit.ffn_dim) * num_bytes + latents


@dataclass(frozen=True)
class _Weights:
    """Parameters of a network: linear weights of its blocks, the rest of the blocks, and what is beside them."""

    linear: int
    rest_of_blocks: int
    beside: int
    num_blocks: int

    def on_device(self, mode: str, bits: int, num_bytes: int) -> int:
        """Bytes on the device."""
        blocks = stored_bytes(self.linear, bits, num_bytes) + self.rest_of_blocks * num_bytes
        if mode == "offload":
            blocks = blocks * min(_STREAMED_BLOCKS, self.num_blocks) // self.num_blocks
        return blocks + self.beside * num_bytes


@functools.lru_cache
def _dit_weights(config: DiTConfig) -> _Weights:
    with torch.device("meta"):
        model = LoomVideoDiT(config)
    return _count(model, model.blocks)


@functools.lru_cache
def _mllm_weights(config: MLLMConfig) -> _Weights:
    from transformers import Qwen3VLModel

    from loomvideo.model.conditioning.random_weights import model_config
    from loomvideo.model.conditioning.tokenizer import MLLMTokenizer

    with torch.device("meta"):
        model = Qwen3VLModel(model_config(config, MLLMTokenizer()))
    return _count(model, model.language_model.layers)


def _count(model: nn.Module, blocks: nn.ModuleList) -> _Weights:
    linear = sum(m.weight.numel() for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    in_blocks = sum(p.numel() for p in blocks.parameters())
    return _Weights(linear, in_blocks - linear, sum(p.numel() for p in model.parameters()) - in_blocks, len(blocks))
