"""The components of a diffusers pipeline as the parts of the one pipeline that computes."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from loomvideo.model.codec import Codec, LatentGrid
from loomvideo.model.conditioning.config import ProcessorConfig
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.interchange.components import EmbeddedCodec
from loomvideo.model.parts import PartName

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

COMPONENTS: dict[PartName, str] = {"dit": "transformer", "codec": "vae", "mllm": "text_encoder"}
TILED_BYTES = 4 * 2**30
"""Activations that a tiled VAE may have."""


class ComponentParts:
    """Hands out a pipeline's components, which its offloading brings to the device first.

    Args:
        pipeline: The pipeline whose components they are; replaced ones are used from then on.
        processor: Patch geometry and picture sizes of the MLLM.
    """

    def __init__(self, pipeline: "DiffusionPipeline", processor: ProcessorConfig) -> None:
        self._pipeline, self._processor = pipeline, processor
        self._built: dict[PartName, tuple[tuple[Any, ...], Any]] = {}

    @property
    def device(self) -> torch.device:
        """Where components compute."""
        return self._pipeline._execution_device

    @property
    def config(self) -> Any:
        """The transformer's sizes."""
        return self._pipeline.transformer.config

    @property
    def latent_channels(self) -> int:
        """Of the codec."""
        return self.config.in_channels

    @property
    def grid(self) -> LatentGrid:
        """How the codec and the transformer's patches divide pixels and frames."""
        return LatentGrid.of(self._part("codec"), self.config.patch_size)

    @contextlib.contextmanager
    def use(self, name: PartName) -> Iterator[Any]:
        """The part, on the device."""
        component = getattr(self._pipeline, COMPONENTS[name])
        # Its parts are called one by one, not its forward pass, which is what the hook waits for.
        hook = getattr(component, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(component)
        yield self._part(name)

    def _part(self, name: PartName) -> Any:
        component = getattr(self._pipeline, COMPONENTS[name])
        if name == "dit":
            return component
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        made_of = (component, getattr(component, "device", None), getattr(component, "use_tiling", False), tokenizer)
        if name not in self._built or self._built[name][0] != made_of:
            self._built[name] = made_of, self._codec(component) if name == "codec" else self._mllm(component, tokenizer)
        return self._built[name][1]

    def _codec(self, component: Any) -> Codec:
        if isinstance(component, EmbeddedCodec):
            return component.codec
        from loomvideo.model.codec.wan import WanVAE

        codec = WanVAE(component, fingerprint="")
        if component.use_tiling:
            codec.memory_limit_bytes = TILED_BYTES
        return codec

    def _mllm(self, component: Any, tokenizer: Any) -> FrozenMLLM:
        states = self.config.num_layers
        text = tokenizer.backend_tokenizer.to_str()
        return FrozenMLLM(component, states, MLLMTokenizer.from_text(text, "tokenizer"), self._processor, "")


def processor_values(processor: ProcessorConfig) -> dict[str, Any]:
    """Plain values for ``model_index.json``."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(processor).items()
    }


def processor_of(values: dict[str, Any] | None) -> ProcessorConfig:
    """Read :func:`processor_values`; None stands for Qwen3-VL's own."""
    return ProcessorConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in (values or {}).items()}
    )
