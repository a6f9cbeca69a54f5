"""What a model for use is made of: weights, what its size needs beside them, kernels, compilation and device.

:func:`loomvideo.model.pipeline.load_pipeline` makes it ready.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from loomvideo.model.adapters import parse_choice
from loomvideo.model.codec import LatentGrid, build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.float8 import float8_blocks
from loomvideo.model.parts import MODES, BlockStream, ResidentParts, SequentialParts, move_all_but
from loomvideo.model.peaks import GIB, Peak, Work, choose_mode, codec_limit, peaks
from loomvideo.model.quantize import check_bits, quantize_linears
from loomvideo.model.sizes import (
    ENCODERS_KEY,
    PIPELINE_FILE,
    ModelSize,
    model_size,
    stated_note,
    stated_size,
    with_folders,
)
from loomvideo.model.stored_weights import open_checkpoint
from loomvideo.model.weights import load_dit
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import absolute
from loomvideo.platform.nodes.devices import check_device, device_of

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint, what its size needs beside it, and how it computes.

    Attributes:
        weights: The ``weights`` folder of a run, an exported folder, or the published ``gen_model.pth``.
        model: Its size; empty takes what the folder states.
        codec_folder: The codec's weights, for sizes that need them.
        mllm_folder: The MLLM, for sizes that need one.
        kernels: Back end of the fused operations; empty leaves the one in use.
        compile: Compile the transformer's blocks.
        drop_exact: Turn the blocks' products to 8-bit floats for good, so that the exact weights free their memory.
        device: Where everything runs; empty takes what :func:`loomvideo.platform.nodes.devices.device_of` does.
        memory: One of :data:`loomvideo.model.parts.MODES`, or ``auto`` for the fastest that fits.
        mllm_bits: Bits of the weights of the MLLM's decoder layers: 16, 8 or 4.
        dit_bits: Bits of the weights of the transformer's blocks: 16, 8 or 4.
        memory_bytes: What ``auto`` may use; 0 takes what is free.
        lora: Adapters, ``FILE`` or ``FILE:STRENGTH`` each.
        codec_limit_bytes: Activations that the codec may have; 0 for its own limit.
        decode_beside: A result is decoded while the next one is denoised, which needs memory for both.
    """

    weights: str
    model: str = ""
    codec_folder: str = ""
    mllm_folder: str = ""
    kernels: str = "auto"
    compile: bool = False
    drop_exact: bool = False
    device: str = ""
    memory: str = "resident"
    mllm_bits: int = 16
    dit_bits: int = 16
    memory_bytes: int = 0
    codec_limit_bytes: int = 0
    lora: tuple[str, ...] = ()
    decode_beside: bool = False

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UserError: naming the key and the fix.
        """
        if self.memory not in (AUTO, *MODES):
            raise UserError(f"memory={self.memory}: choose one of {', '.join((AUTO, *MODES))}")
        if self.memory_bytes < 0:
            raise UserError(f"memory_gib={self.memory_bytes / GIB:g}: must be at least 0")
        check_bits("mllm_bits", self.mllm_bits)
        check_bits("dit_bits", self.dit_bits)
        if self.drop_exact and (self.dit_bits != 16 or self.memory == "offload"):
            raise UserError("shortcuts.fp8: turns exact weights on the device; use it with dit_bits=16 and no offload")
        for choice in self.lora:
            parse_choice(choice)
        if self.compile and self.memory not in (AUTO, "resident"):
            raise UserError(f"compile=true: blocks would be compiled at every load; use it with memory=resident, "
                            f"not {self.memory}")  # fmt: skip
        if self.decode_beside and self.memory not in (AUTO, "resident"):
            raise UserError(f"decode_beside=true: codec and transformer work at once; use it with memory=resident, "
                            f"not {self.memory}")  # fmt: skip

    def absolute(self) -> "ModelSource":
        """The same for processes in other folders."""
        lora = []
        for choice in self.lora:
            path, _ = parse_choice(choice)
            lora.append(absolute(path) + choice[len(path) :])
        return dataclasses.replace(
            self,
            weights=absolute(self.weights),
            codec_folder=absolute(self.codec_folder),
            mllm_folder=absolute(self.mllm_folder),
            lora=tuple(lora),
        )

    @property
    def size(self) -> ModelSize:
        """The model's size, its folders filled in.

        Raises:
            UserError: if the checkpoint does not say its size and nothing else does.
        """
        name = self.model or stated_size(self.weights)
        if not name:
            raise UserError(f"{self.weights}: has no {PIPELINE_FILE}; name its size with model=")
        size = with_folders(
            model_size(name), self.codec_folder or self._beside("vae"), self.mllm_folder or self._beside("text_encoder")
        )
        if not self.codec_limit_bytes:
            return size
        return dataclasses.replace(
            size, codec=dataclasses.replace(size.codec, memory_limit_bytes=self.codec_limit_bytes)
        )

    def _beside(self, component: str) -> str:
        """A component of the diffusers folder that the weights are in; empty where they are in none."""
        folder = Path(self.weights) / component
        return str(folder) if (folder / "config.json").is_file() else ""


def fitted(source: ModelSource, work: Work) -> ModelSource:
    """The source with ``memory=auto`` decided for what is to be generated; others as they are.

    Raises:
        UserError: if no way fits, saying what each needs.
    """
    source.check()
    if source.memory != AUTO:
        return source
    available = source.memory_bytes or available_bytes(device_of(source.device))
    peak = choose_mode(source_peaks(source, work), available)
    for key in ("compile", "decode_beside"):
        if getattr(source, key) and peak.mode != "resident":
            raise UserError(f"{key}=true: needs memory=resident, and only memory={peak.mode} fits; set {key}=false")
    limit = codec_limit(peak, available, source.size.codec.memory_limit_bytes)
    return dataclasses.replace(source, memory=peak.mode, codec_limit_bytes=limit)


def source_peaks(source: ModelSource, work: Work) -> list[Peak]:
    """What each way of using memory would need at most for this work."""
    num_bytes = dtype_on(device_of(source.device)).itemsize
    return peaks(source.size, work, source.mllm_bits, source.dit_bits, num_bytes, source.decode_beside)


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def load_parts(source: ModelSource, dtype: torch.dtype | None = None) -> ResidentParts | SequentialParts:
    """Load transformer, codec and MLLM, or make ready to load each when it is needed.

    Args:
        source: What to load; ``memory=auto`` counts as ``resident`` here, see :func:`fitted`.
        dtype: The type of the transformer and the MLLM; None takes bf16 on CUDA, fp32 elsewhere.

    Raises:
        UserError: if the checkpoint, a folder or the way of using memory cannot be used.
    """
    source.check()
    source = dataclasses.replace(source, memory="resident") if source.memory == AUTO else source
    size, device = source.size, device_of(source.device)
    check_device(device)
    dtype = dtype or dtype_on(device)
    trained_with = dict(stated_note(source.weights).get(ENCODERS_KEY, {}))
    loaders = {
        "dit": lambda: load_transformer(source, size, device, dtype),
        "codec": lambda: _compared(source, trained_with, "codec", build_codec(size.codec, device, dtype)),
        "mllm": lambda: _compared(source, trained_with, "mllm", load_mllm(source, size, device, dtype)),
    }
    if source.memory == "resident":
        return ResidentParts(**{name: load() for name, load in loaders.items()})
    config = open_checkpoint(source.weights).config or size.dit
    grid = LatentGrid.of(size.codec, config.patch_size)
    return SequentialParts(loaders, device, config, size.codec.latent_channels, grid)


def _compared(source: ModelSource, trained_with: dict[str, str], name: str, part: Any) -> Any:
    """The part; a warning, once, when the checkpoint says that it was trained with another.

    No error as for training: a fingerprint is of files, and another copy of the same weights may have others.
    """
    trained = trained_with.pop(name, part.fingerprint)
    if trained != part.fingerprint:
        fix = f"set {name}_folder to what `data prepare` had"
        if not getattr(source.size, name).folder:
            fix = "it is built in: take the version of this package that trained them, or train again"
        logger.warning(
            "%s: trained with %s %s, and this one is %s: results may be worse than it can do; %s",
            source.weights, name, trained, part.fingerprint, fix,
        )  # fmt: skip
    return part


def load_transformer(source: ModelSource, size: ModelSize, device: torch.device, dtype: torch.dtype) -> LoomVideoDiT:
    """The transformer, its blocks' weights in the bits and the place that the source says."""
    config = open_checkpoint(source.weights).config or size.dit
    staged = source.dit_bits != 16 or source.memory == "offload"
    dit = load_dit(source.weights, config, "cpu" if staged else device, dtype).eval()
    if staged:
        _settle(dit, dit.blocks, source.dit_bits, source.memory == "offload", device)
    if source.drop_exact:
        dit = float8_blocks(dit)
    if source.compile:
        dit.compile_blocks()
    return dit


def load_mllm(source: ModelSource, size: ModelSize, device: torch.device, dtype: torch.dtype) -> FrozenMLLM:
    """The MLLM, its decoder's weights in the bits and the place that the source says."""
    staged = source.mllm_bits != 16 or source.memory == "offload"
    mllm = FrozenMLLM.of_size(size, "cpu" if staged else device, dtype)
    if staged:
        layers = mllm.model.language_model.layers
        _settle(mllm.model, layers, source.mllm_bits, source.memory == "offload", device)
    return mllm


def _settle(module: nn.Module, blocks: nn.ModuleList, bits: int, stream: bool, device: torch.device) -> None:
    """Put weights that are on the host where they belong."""
    for block in blocks:
        quantize_linears(block, bits)
    module.requires_grad_(False)
    if stream:
        move_all_but(module, blocks, device)
        BlockStream(blocks, device)
    else:
        module.to(device)


def dtype_on(device: torch.device) -> torch.dtype:
    """What models compute in: bf16 on CUDA, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
