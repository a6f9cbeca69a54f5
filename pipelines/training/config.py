"""Configuration of what is learned from a sample, and of the actors that compute its MLLM states."""

from dataclasses import dataclass

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class ObjectiveConfig:
    """What is learned from a sample."""

    use_source_embedding: bool = option(True, "Scale-and-Add is on; off in stage 1")
    shift_scale: float = option(0.5, "timestep shift added per doubling of tokens over the base; 0.65 in stage 1")
    shift_base_tokens: int = option(64, "tokens up to which timesteps are not shifted; small videos need fewer")
    start_as_copy: bool = option(
        False, "from scratch: begin with velocities that copy the source, so that short runs need not learn that first"
    )
    drop_all: float = option(0.1, "share of visits trained without any conditioning, for guidance")
    drop_text: float = option(0.1, "share of visits trained without text, pictures kept, for guidance")

    def check(self) -> None:
        """Raise UserError for shares that are none."""
        if min(self.drop_all, self.drop_text) < 0 or self.drop_all + self.drop_text > 1:
            raise UserError("objective.drop_all and objective.drop_text: shares that add up to at most 1")


@dataclass
class FeaturePoolConfig:
    """The actors that compute MLLM states for datasets prepared with features.mode=streamed or text."""

    actors: int = option(1, "frozen MLLMs")
    gpus: float = option(0.0, "GPUs of each; 0 computes on CPUs")
    cpus: int = option(1, "CPUs of each, also its compute threads on CPU")
