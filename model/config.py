"""Sizes of the LoomVideo diffusion transformer, and its adapters."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan-style transformer with Deepstack conditioning and Scale-and-Add.

    The defaults are what every published size has in common; the 5B sizes are ``sizes.model_size("5b").dit``.
    """

    num_layers: int
    """Transformer blocks; each attends to one MLLM layer."""
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    """Channels of the latents."""
    mllm_dim: int
    """Width of the MLLM's hidden states."""
    out_channels: int = 0
    """Channels of the velocity; 0 means ``in_channels``."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    eps: float = 1e-6
    rope_theta: float = 10000.0
    use_source_embedding: bool = True
    """Whether Scale-and-Add is on (it is off in alignment, stage 1)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_channels", self.out_channels or self.in_channels)
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.attention_head_dim % 2 or self.attention_head_dim < 8:
            raise UserError(f"dit.attention_head_dim={self.attention_head_dim}: use an even number of at least 8")
        if self.freq_dim % 2:
            raise UserError(f"dit.freq_dim={self.freq_dim}: use an even number")
        if self.patch_size[0] != 1:
            raise UserError(f"dit.patch_size={self.patch_size}: the first entry must be 1 (references are one frame)")

    @property
    def inner_dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mllm_hidden_dim(self) -> int:
        """Width of the MLLM embedder's hidden layer."""
        return 4 * self.inner_dim

    @property
    def patch_dim(self) -> int:
        """Values of one patch of latents."""
        return self.in_channels * math.prod(self.patch_size)

    @property
    def out_patch_dim(self) -> int:
        """Values of one patch of velocity."""
        return self.out_channels * math.prod(self.patch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> "DiTConfig":
        """Read :meth:`to_dict`'s values.

        Raises:
            UserError: naming ``source`` and the unknown or missing keys.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if unknown or missing:
            raise UserError(f"{source}: unknown keys {unknown}, missing keys {missing}; valid keys: {sorted(fields)}")
        return cls(**values)


@dataclass
class LoRAConfig:
    """Which layers are adapted, and how."""

    rank: int = option(0, "rank of the adapters of linear layers; 0 trains the weights themselves")
    alpha: float = option(0.0, "adapters are scaled by alpha / rank; 0 takes the rank")
    dora: bool = option(False, "also learn the length of every row (DoRA)")
    targets: list[str] = option(["blocks.*"], "patterns (shell style) of the names of the linear layers to adapt")
    unfreeze: list[str] = option([], "patterns of other parameters to train beside the adapters, e.g. mllm_embedder.*")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (self.alpha or self.rank) / self.rank
