"""The network and its mathematics; ``from loomvideo.model import LoomVideoPipeline`` loads a model for use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loomvideo.model.pipeline import LoomVideoPipeline

__all__ = ["LoomVideoPipeline"]


def __getattr__(name: str) -> Any:
    # Late, so that importing a small module of this room does not load the whole network and torch.
    if name == "LoomVideoPipeline":
        from loomvideo.model.pipeline import LoomVideoPipeline

        return LoomVideoPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
