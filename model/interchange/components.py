"""The transformer and the embedded codec as components that diffusers loads, moves and saves."""

import dataclasses
import os
from typing import Any

import torch

# Candidates for "what can be loaded" are looked up in the module of a component: ModelMixin must be a name here.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from loomvideo.model.blocks import Block
from loomvideo.model.codec import Codec, CodecConfig, build_codec
from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.stored_weights import DIFFUSERS_CLASS


class LoomVideoTransformer3DModel(ModelMixin, LoomVideoDiT, ConfigMixin):
    """The transformer, its sizes in ``config.json`` and its weights under the published names.

    The arguments are those of :class:`~loomvideo.model.config.DiTConfig`.
    """

    _no_split_modules = [Block.__name__]  # noqa: RUF012 - the library's own declaration

    @register_to_config
    def __init__(
        self,
        num_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
        ffn_dim: int,
        in_channels: int,
        mllm_dim: int,
        out_channels: int = 0,
        freq_dim: int = 256,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        eps: float = 1e-6,
        rope_theta: float = 10000.0,
        use_source_embedding: bool = True,
    ) -> None:
        sizes = {field.name: self._internal_dict[field.name] for field in dataclasses.fields(DiTConfig)}
        LoomVideoDiT.__init__(self, DiTConfig(**sizes))
        self._gradient_checkpointing_func = None  # as ModelMixin starts, whose own start takes no sizes

    @property
    def config(self) -> DiTConfig:
        """The sizes."""
        return self.__dict__["_sizes"]

    @config.setter
    def config(self, sizes: DiTConfig) -> None:
        self.__dict__["_sizes"] = sizes

    @classmethod
    def from_dit(cls, dit: LoomVideoDiT) -> "LoomVideoTransformer3DModel":
        """The same weights, not copied."""
        with torch.device("meta"):
            model = cls(**dit.config.to_dict())
        model.load_state_dict(dit.state_dict(), assign=True)
        return model.eval()


assert LoomVideoTransformer3DModel.__name__ == DIFFUSERS_CLASS


class EmbeddedCodec(ModelMixin, ConfigMixin):
    """A codec that comes with this package, which its settings alone make again.

    Args:
        codec: The values of :class:`~loomvideo.model.codec.CodecConfig`.
    """

    @register_to_config
    def __init__(self, codec: dict[str, Any]) -> None:
        super().__init__()
        self._codec = build_codec(CodecConfig(**codec))
        # Programs ask a component's first weight where it is; this one has no other.
        self._place = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    @property
    def codec(self) -> Codec:
        """Pixels to latents and back."""
        return self._codec

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> "EmbeddedCodec":
        """Read the settings; ``options`` of components with weights do nothing here."""
        return cls.from_config(cls.load_config(pretrained_model_name_or_path))

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Write the settings; ``options`` of components with weights do nothing here."""
        self.save_config(save_directory)
