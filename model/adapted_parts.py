"""The three parts of a model that is loaded, with adapters beside the layers of its transformer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from loomvideo.model.adapters import Adapter, parse_choice, read_adapter, set_adapters
from loomvideo.model.codec import Codec, LatentGrid
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.float8 import float8_blocks
from loomvideo.model.parts import ResidentParts, SequentialParts
from loomvideo.platform.errors import UserError


class AdaptedParts:
    """Transformer, codec and MLLM, and the adapters that are loaded.

    Args:
        parts: The three.
        lora: Adapters, ``FILE`` or ``FILE:STRENGTH`` each.
    """

    def __init__(self, parts: ResidentParts | SequentialParts, lora: Sequence[str] = ()):
        self.parts = parts
        self._float8: LoomVideoDiT | None = None
        self._adapters: dict[str, Adapter] = {}
        for choice in lora:
            self.load_lora(*parse_choice(choice))

    @property
    def grid(self) -> LatentGrid:
        """How the codec and the transformer's patches divide pixels and frames."""
        return self.parts.grid

    @property
    def dit(self) -> LoomVideoDiT:
        """The transformer, with its adapters."""
        with self.parts.use("dit") as dit:
            if getattr(dit, "adapters", ()) != tuple(self._adapters.values()):
                set_adapters(dit, tuple(self._adapters.values()))
                self._float8 = None
            return dit

    def load_lora(self, path: str | Path, strength: float = 1.0, name: str | None = None) -> None:
        """Add an adapter beside the transformer's layers; several add up.

        Args:
            path: A safetensors file of any dialect of :mod:`loomvideo.model.adapters`, or PEFT's folder.
            strength: What its contribution is multiplied by.
            name: To unload it by; None for the path. A name that is loaded already is replaced.

        Raises:
            UserError: if it cannot be read, or naming the keys that belong to no layer.
        """
        self._adapters[name or str(path)] = read_adapter(path, self.dit, strength)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._adapters)

    def set_lora_strengths(self, strengths: Mapping[str, float]) -> None:
        """Use these of the loaded adapters, by name, with these strengths; the others have none.

        Raises:
            UserError: if one is not loaded.
        """
        for name in strengths:
            self._check_loaded(name)
        for name, adapter in self._adapters.items():
            self._adapters[name] = dataclasses.replace(adapter, strength=strengths.get(name, 0.0))

    def unload_lora(self, name: str | None = None) -> None:
        """Take off an adapter, or all: the transformer is then exactly what it was before.

        Raises:
            UserError: if none of that name is loaded.
        """
        if name is None:
            self._adapters.clear()
        else:
            self._check_loaded(name)
            del self._adapters[name]

    def _check_loaded(self, name: str) -> None:
        if name not in self._adapters:
            raise UserError(f"lora {name}: not loaded; loaded are {', '.join(self._adapters) or 'none'}")

    @property
    def codec(self) -> Codec:
        """Pixels to latents and back."""
        with self.parts.use("codec") as codec:
            return codec

    @property
    def mllm(self) -> FrozenMLLM:
        """Prompts to hidden states."""
        with self.parts.use("mllm") as mllm:
            return mllm

    def float8_dit(self) -> LoomVideoDiT:
        """The transformer with its blocks' matrices in float8, made once and kept."""
        dit = self.dit  # which forgets the copy of one with other adapters
        if self._float8 is None:
            self._float8 = float8_blocks(dit)
        return self._float8
