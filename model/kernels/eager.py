"""The operations in plain PyTorch: the definition that every other back end is held to.

Sums, norms and products run in float32 (float64 for float64 inputs) and the result is rounded once to the dtype of
the activations. ``L`` is the number of packed tokens, ``D`` the model width, ``R`` the number of modulation rows,
``S`` the number of samples, ``P`` the number of values in a patch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from loomvideo.model.kernels.rope import token_angles


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operation on ``dtype`` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_and_add(
    patches: Tensor,
    source_patches: Tensor,
    source_scale: Tensor,
    row_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    source_weight: Tensor,
    source_bias: Tensor,
) -> Tensor:
    """Scale-and-Add: ``patches @ W.T + b + scale[row] * (source_patches @ Ws.T + bs)`` (LoomVideo, section 3).

    Args:
        patches: ``[L, P]`` noised latent patches, the references' patches among them.
        source_patches: ``[L, P]``; zeros where a sample has no source, since the source bias is added all the same.
        source_scale: ``[S]`` float32, the flow time of each sample in [0, 1].
        row_ids: ``[L]`` int32, the sample of each token, or ``S`` for a reference token, whose scale is 0.
        weight: ``[D, P]``.
        bias: ``[D]``.
        source_weight: ``[D, P]``.
        source_bias: ``[D]``.

    Returns:
        ``[L, D]`` in the dtype of ``patches``.
    """
    dtype = compute_dtype(patches.dtype)
    hidden = F.linear(patches, weight, bias)
    source = F.linear(source_patches, source_weight, source_bias)
    scale = F.pad(source_scale.to(dtype), (0, 1))[row_ids.long()]
    return (hidden.to(dtype) + scale[:, None] * source.to(dtype)).to(patches.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension: ``[L, D]`` with ``weight [D]``, result in ``x.dtype``."""
    return _rms_norm(x, weight, eps).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    num_heads: int,
    eps: float,
    theta: float = 10000.0,
    round_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Norm q and k over all heads together and rotate them by their tokens' (t, h, w) positions.

    Args:
        q: ``[L, num_heads * d]``.
        k: Like ``q``.
        q_weight: ``[num_heads * d]``.
        k_weight: Like ``q_weight``.
        positions: ``[L, 3]`` int32 (t, h, w), negative t allowed.
        num_heads: Heads in a row of ``q``.
        eps: The epsilon of the norm.
        theta: Base of the rotary frequencies.
        round_norm: Round the norm's result to the dtype of ``q`` before the rotation, as the published inference
            does; the published training (autocast) keeps it in float32. Equal in float32.

    Returns:
        The rotated q and k, shapes and dtype of the inputs.
    """
    dtype = compute_dtype(q.dtype)
    cos, sin = token_angles(positions, q.shape[-1] // num_heads, theta, dtype)

    def norm_and_rotate(x: Tensor, weight: Tensor) -> Tensor:
        normed = _rms_norm(x, weight, eps)
        if round_norm:
            normed = normed.to(x.dtype).to(dtype)
        even, odd = normed.unflatten(-1, (num_heads, -1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(1).to(x.dtype)

    return norm_and_rotate(q, q_weight), norm_and_rotate(k, k_weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension with ``weight [D]`` and ``bias [D]``, result in ``x.dtype``."""
    dtype = compute_dtype(x.dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, row_ids: Tensor, eps: float) -> Tensor:
    """Layer norm without affine, then ``* (1 + scale[row]) + shift[row]``.

    Args:
        x: ``[L, D]``.
        shift: ``[R, D]``, one row for each distinct modulation, not one for each token.
        scale: Like ``shift``.
        row_ids: ``[L]`` int32, the row of each token.
        eps: The epsilon of the norm.

    Returns:
        ``[L, D]`` in ``x.dtype``.
    """
    dtype = compute_dtype(x.dtype)
    rows = row_ids.long()
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(dtype)[rows]) + shift.to(dtype)[rows]).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, row_ids: Tensor) -> Tensor:
    """``x + y * gate[row]``: ``[L, D]`` with ``gate [R, D]`` and ``row_ids [L]``, result in ``x.dtype``."""
    dtype = compute_dtype(x.dtype)
    return (x.to(dtype) + y.to(dtype) * gate.to(dtype)[row_ids.long()]).to(x.dtype)


def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    row_ids: Tensor,
    eps: float,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """A residual and the layer norm that follows it, in one pass; equal to the two operations one after the other.

    Args:
        x: ``[L, D]`` residual stream.
        y: ``[L, D]`` what is added to it.
        gate: ``[R, D]``, or None for a plain residual.
        shift: ``[R, D]`` of the following modulation, or with ``affine`` the norm's ``[D]`` bias.
        scale: ``[R, D]``, or with ``affine`` the norm's ``[D]`` weight.
        row_ids: ``[L]`` int32, the row of each token.
        eps: The epsilon of the norm.
        affine: The norm has a weight and bias of its own and no modulation.

    Returns:
        The new residual stream and its norm, both ``[L, D]`` in ``x.dtype``.
    """
    hidden = x + y if gate is None else gated_residual(x, y, gate, row_ids)
    if affine:
        return hidden, layer_norm(hidden, scale, shift, eps)
    return hidden, layer_norm_modulate(hidden, shift, scale, row_ids, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(x.dtype)
    x = x.to(dtype)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
