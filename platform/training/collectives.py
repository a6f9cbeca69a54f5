"""What all workers of a run agree on, in small collectives outside the model."""

from typing import Any

import torch
import torch.distributed as dist


class AllRanks:
    """The ranks of a run, of which this is one.

    Args:
        device: This rank's.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64, the same on each of them."""
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return reduced.tolist()

    def from_rank_0(self, value: Any) -> Any:
        """What rank 0 gave; the values of others do not count."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered
