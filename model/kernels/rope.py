"""Angles of the three-dimensional rotary embedding, shared by every back end.

A head of size ``d`` is split over the axes (t, h, w): h and w take ``2 * (d // 6)`` channels each, t takes the rest
(44/42/42 of 128). Channel pairs ``(x[2i], x[2i+1])`` turn by ``position * theta ** (-2i / axis_size)``. Positions are
integers, so the angles are looked up in one table per axis; the cosine is even and the sine odd in the position, so
the tables hold non-negative positions alone and negative ones (reference images sit at t = -10, -20, ...) take the
sine's sign.
"""

from functools import lru_cache

import torch
from torch import Tensor

MAX_POSITION = 1024
"""Positions lie in ``(-MAX_POSITION, MAX_POSITION)`` on every axis; the published model has the same limit."""


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that belong to t, h and w."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_tables(head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of every position and channel pair, computed in float64 and rounded once.

    Returns:
        ``[2, MAX_POSITION, head_dim // 2]`` of ``dtype``: cosines, then sines; the pairs of t, h and w side by side.
    """
    return _tables(head_dim, theta, device, dtype)


def keep_tables_out_of_programs() -> None:
    """Let ``torch.compile`` take :func:`rope_tables` as constants; call it before compiling what turns by them.

    Not a decorator: it would import the compiler, more than half of the start of a decoder that never compiles.
    """
    torch.compiler.assume_constant_result(rope_tables)


@lru_cache(maxsize=32)
def _tables(head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    positions = torch.arange(MAX_POSITION, dtype=torch.float64)
    angles = torch.cat(
        [
            positions[:, None] * theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
            for size in axis_sizes(head_dim)
        ],
        dim=1,
    )
    return torch.stack([angles.cos(), angles.sin()]).to(device=device, dtype=dtype)


def token_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's channel pairs.

    Args:
        positions: ``[L, 3]`` integers (t, h, w).
        head_dim: Even size of a head.
        theta: Base of the frequencies.
        dtype: The type of the result.

    Returns:
        Two tensors ``[L, head_dim // 2]``.
    """
    cos, sin = rope_tables(head_dim, theta, positions.device, dtype)
    # Filled on the device: a tensor made from a list would make the host wait for its copy.
    pair = torch.arange(head_dim // 2, device=positions.device)
    t_pairs, h_pairs, _ = (size // 2 for size in axis_sizes(head_dim))
    axis = (pair >= t_pairs).long() + (pair >= t_pairs + h_pairs).long()
    by_pair = positions.long()[:, axis]
    index = by_pair.abs()
    return cos[index, pair], sin[index, pair] * by_pair.sign()


def check_positions(positions: Tensor) -> None:
    """Raise if a position is outside the tables; call it on the host, where it costs no synchronisation.

    Raises:
        ValueError: naming the largest position and the limit.
    """
    if positions.numel() and int(positions.abs().max()) >= MAX_POSITION:
        raise ValueError(
            f"position {int(positions.abs().max())} is outside the rotary tables: frames, rows and columns of latent "
            f"patches are limited to {MAX_POSITION - 1}; use shorter or smaller clips"
        )
