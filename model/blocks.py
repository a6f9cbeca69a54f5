"""The blocks of the transformer: attention, feed-forward and modulation over packed samples.

Every parameter is used inside its own module's ``forward``, reached by ``__call__``: ZeRO-3 gathers parameters by
module hooks. Fused operations that read the parameters of two modules run inside both (see :class:`Lent`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loomvideo.model import kernels
from loomvideo.model.attention import AttentionPlan, segment_attention
from loomvideo.model.config import DiTConfig

Context = Tensor | tuple[Tensor, Tensor]
"""What a block attends to: embedded MLLM states [tokens, dim], or their keys and values [tokens, heads, head dim]."""


class Lent(nn.Module):
    """A weight (and bias) that a fused operation borrows while this module's ``forward`` runs."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def forward(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(weight, bias, *tensors)``; without a bias ``function(weight, *tensors)``."""
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return function(*parameters, *tensors)


class SelfAttention(nn.Module):
    """Attention inside each sample, over its video and reference tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.num_heads, self.eps, self.theta = config.num_attention_heads, config.eps, config.rope_theta
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = Lent(dim)
        self.norm_k = Lent(dim)

    def forward(self, x: Tensor, positions: Tensor, plan: AttentionPlan, attention: str) -> Tensor:
        """[tokens, dim] to [tokens, dim]."""

        def norm_rope(q_weight: Tensor, k_weight: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.qk_norm_rope(q, k, q_weight, k_weight, positions, self.num_heads, self.eps, self.theta)

        q, k = self.norm_q(
            lambda q_weight, q, k: self.norm_k(lambda k_weight, q, k: norm_rope(q_weight, k_weight, q, k), q, k),
            self.to_q(x),
            self.to_k(x),
        )
        heads = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (q, k, self.to_v(x)))
        return self.to_out[0](segment_attention(*heads, plan, attention).flatten(1))


class CrossAttention(nn.Module):
    """Attention of each sample's tokens to its own MLLM tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = Lent(dim)
        self.norm_k = Lent(dim)

    def forward(self, x: Tensor, context: Context, plan: AttentionPlan, attention: str) -> Tensor:
        """[tokens, dim] to [tokens, dim]."""
        key, value = self.keys_values(context) if isinstance(context, Tensor) else context
        query = self.norm_q(self._rms_norm, self.to_q(x)).unflatten(-1, (self.num_heads, -1))
        return self.to_out[0](segment_attention(query, key, value, plan, attention).flatten(1))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [MLLM tokens, heads, head dim] of embedded states; the same at every denoising step."""
        key, value = self.norm_k(self._rms_norm, self.to_k(context)), self.to_v(context)
        return key.unflatten(-1, (self.num_heads, -1)), value.unflatten(-1, (self.num_heads, -1))

    def _rms_norm(self, weight: Tensor, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, weight, self.eps)


class GELUProjection(nn.Module):
    """Linear layer and tanh-approximated GELU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers; ``net.1`` stands where the published model has a dropout of zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        up = GELUProjection(config.inner_dim, config.ffn_dim)
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(config.ffn_dim, config.inner_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, dim] to [tokens, dim]."""
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the timestep."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = Lent(config.inner_dim, bias=True)
        self.ffn = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.inner_dim))

    def forward(
        self,
        x: Tensor,
        context: Context,
        modulation: Tensor,
        row_ids: Tensor,
        positions: Tensor,
        self_plan: AttentionPlan,
        cross_plan: AttentionPlan,
        attention: str,
    ) -> Tensor:
        """One block.

        Args:
            x: [tokens, dim].
            context: See :data:`Context`.
            modulation: Timestep part of shift, scale and gate, before and after cross-attention:
                fp32 [6, samples + 1, dim], the last row zero for reference tokens.
            row_ids: int32 [tokens], each token's row of ``modulation``.
            positions: int32 [tokens, 3].
            self_plan: Segments of self-attention.
            cross_plan: Segments of cross-attention.
            attention: What computes it, see :data:`loomvideo.model.attention_choice.IMPLEMENTATIONS`.
        """
        rows = modulation + self.scale_shift_table.to(modulation.dtype).transpose(0, 1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(0)

        def residual_norm2(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.residual_norm(x, y, gate, bias, weight, row_ids, self.eps, affine=True)

        normed = kernels.layer_norm_modulate(x, shift, scale, row_ids, self.eps)
        attended = self.attn1(normed, positions, self_plan, attention)
        x, normed = self.norm2(residual_norm2, x, attended)
        attended = self.attn2(normed, context, cross_plan, attention)
        x, normed = kernels.residual_norm(x, attended, None, ffn_shift, ffn_scale, row_ids, self.eps)
        return kernels.gated_residual(x, self.ffn(normed), ffn_gate, row_ids)
