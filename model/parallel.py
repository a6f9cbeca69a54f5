"""One generation or one training pack on several ranks: branches spread over them, the sequence split between them.

Guidance parallel gives every rank some of the branches; only velocities travel, once a step. Sequence parallel is
Ulysses (Jacobs et al., 2023): each rank holds a stretch of the tokens, and two all-to-alls a block trade tokens for
heads around self-attention, and gradients the way back. Cross-attention and everything else is local to a token. Both
give what one rank gives; in training each rank's gradients are those of its tokens, and their sum is the pack's.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from loomvideo.model.attention import AttentionPlan
from loomvideo.model.packing import PackedBatch
from loomvideo.platform.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a process group share one generation.

    Attributes:
        branches: Ranks that hold the same tokens and divide the branches; None where one has all.
        sequence: Ranks that run the same branches and divide the tokens; None where one has all.
    """

    branches: ProcessGroup | None = None
    sequence: ProcessGroup | None = None

    @classmethod
    def split(cls, sequence: int = 1) -> "Ranks":
        """Divide the default process group: ``sequence`` neighbouring ranks share tokens, the others branches.

        Raises:
            UserError: if the number of ranks is no multiple of ``sequence``.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        if sequence < 1 or world % sequence:
            raise UserError(f"sequence_ranks={sequence}: must divide the {world} ranks")
        neighbours = [list(range(start, start + sequence)) for start in range(0, world, sequence)]
        peers = [list(range(start, world, sequence)) for start in range(sequence)]
        # Every rank makes every group, in the same order.
        mine = [next(g for g, ranks in made if rank in ranks) for made in (_groups(neighbours), _groups(peers))]
        return cls(branches=mine[1] if world > sequence else None, sequence=mine[0] if sequence > 1 else None)

    def own_branches(self, names: Sequence[str]) -> list[str]:
        """The branches that this rank runs."""
        if self.branches is None:
            return list(names)
        return list(names)[dist.get_rank(self.branches) :: dist.get_world_size(self.branches)]

    def all_branches(self, own: Mapping[str, Tensor], names: Sequence[str], like: Tensor) -> dict[str, Tensor]:
        """Every branch's velocity on every rank, from each rank's own ones; ``like`` has a velocity's shape."""
        if self.branches is None:
            return dict(own)
        velocities = like.new_zeros(len(names), *like.shape)
        for index, name in enumerate(names):
            if name in own:
                velocities[index] = own[name]
        dist.all_reduce(velocities, group=self.branches)  # all others add zeros
        return dict(zip(names, velocities, strict=True))

    def total(self, values: Tensor) -> Tensor:
        """Sums over the ranks that share the sequence."""
        if self.sequence is not None:
            dist.all_reduce(values, group=self.sequence)
        return values

    def shard(self, batch: PackedBatch, num_heads: int) -> "Shard":
        """This rank's part of a pack.

        Raises:
            UserError: if the heads do not divide among the ranks.
        """
        if self.sequence is None:
            return Shard(batch, batch, slice(0, batch.num_tokens), slice(0, batch.num_video_tokens), None)
        world, rank = dist.get_world_size(self.sequence), dist.get_rank(self.sequence)
        if num_heads % world:
            raise UserError(f"sequence_ranks={world}: must divide the model's {num_heads} heads")
        bounds = [index * batch.num_tokens // world for index in range(world + 1)]
        tokens = slice(bounds[rank], bounds[rank + 1])
        exchange = HeadExchange(self.sequence, [stop - start for start, stop in itertools.pairwise(bounds)])
        offsets = [0, *itertools.accumulate(batch.cross_plan.query_lengths)]
        lengths = [
            max(min(stop, tokens.stop) - max(start, tokens.start), 0) for start, stop in itertools.pairwise(offsets)
        ]
        device = batch.patches.device
        video_index, video = None, tokens
        if batch.video_index is not None:
            first, stop = torch.searchsorted(
                batch.video_index, torch.tensor([tokens.start, tokens.stop], device=device)
            ).tolist()
            video = slice(first, stop)
            video_index = batch.video_index[video] - tokens.start
        local = dataclasses.replace(
            batch,
            patches=batch.patches[tokens],
            source_patches=batch.source_patches[tokens],
            positions=batch.positions[tokens],
            row_ids=batch.row_ids[tokens],
            video_index=video_index,
            video_row_ids=batch.video_row_ids[video],
            self_plan=dataclasses.replace(batch.self_plan, exchange=exchange),
            cross_plan=AttentionPlan.build(lengths, batch.cross_plan.key_lengths).to(device),
        )
        return Shard(batch, local, tokens, video, self.sequence)


@dataclass(frozen=True)
class Shard:
    """A rank's part of a pack, and how to join the parts' results."""

    whole: PackedBatch
    local: PackedBatch
    tokens: slice
    video_tokens: slice
    group: ProcessGroup | None

    @property
    def num_ranks(self) -> int:
        """Ranks that share the pack."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def join(self, velocity: Tensor) -> Tensor:
        """Velocities of this rank's video tokens to those of all: [video tokens, patch dim]."""
        if self.group is None:
            return velocity
        whole = velocity.new_zeros(self.whole.num_video_tokens, velocity.shape[1])
        whole[self.video_tokens] = velocity
        dist.all_reduce(whole, group=self.group)  # all others add zeros
        return whole


class HeadExchange:
    """Trades tokens for heads between ranks.

    Args:
        group: The ranks.
        lengths: Tokens of each.
    """

    def __init__(self, group: ProcessGroup, lengths: Sequence[int]) -> None:
        self.group, self.lengths = group, list(lengths)
        self.own = self.lengths[dist.get_rank(group)]

    def heads_of_all_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """``[own tokens, heads, dim]`` each to ``[all tokens, heads / ranks, dim]`` each, in one exchange."""
        joined = torch.cat(tensors, dim=-1)
        by_rank = joined.unflatten(1, (len(self.lengths), -1)).transpose(0, 1).flatten(0, 1).contiguous()
        received = _AllToAll.apply(by_rank, self.lengths, [self.own] * len(self.lengths), self.group)
        return list(received.split([tensor.shape[-1] for tensor in tensors], dim=-1))

    def tokens_of_all_heads(self, tensor: Tensor) -> Tensor:
        """``[all tokens, heads / ranks, dim]`` back to ``[own tokens, heads, dim]``."""
        world = len(self.lengths)
        received = _AllToAll.apply(tensor.contiguous(), [self.own] * world, self.lengths, self.group)
        return received.unflatten(0, (world, self.own)).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """An exchange of rows; its gradient is the exchange that sends them back."""

    @staticmethod
    def forward(context: Any, rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        context.received, context.sent, context.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient.contiguous(), context.sent, context.received, context.group), None, None, None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows, received, sent, group=group)
    return result


def _groups(all_ranks: Sequence[Sequence[int]]) -> list[tuple[ProcessGroup, Sequence[int]]]:
    return [(dist.new_group(list(ranks)), ranks) for ranks in all_ranks]
