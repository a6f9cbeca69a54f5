"""The public operations over a back end's raw kernels, as custom ops of :mod:`torch.library`.

Every back end gives the same raw kernels (forward and explicit backward, no autograd). Here each becomes a custom op
``loomvideo::{backend}_{name}`` with a shape function and an autograd formula, so that ``torch.compile``, activation
checkpointing and ZeRO-3 see one opaque, differentiable operation. What is saved for the backward is each token's mean
and reciprocal deviation, not the normed rows. Row gradients are summed over the segments that share a row.
"""

from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from loomvideo.model.kernels.eager import compute_dtype

OPERATIONS = (
    "scale_and_add",
    "rms_norm",
    "qk_norm_rope",
    "layer_norm",
    "layer_norm_modulate",
    "gated_residual",
    "residual_norm",
)


def fused_operations(raw: ModuleType) -> SimpleNamespace:
    """Register the custom ops of a back end and return its :data:`OPERATIONS`.

    Args:
        raw: Module with ``NAME`` and the raw kernels of :mod:`loomvideo.model.kernels.cpp`.
    """
    norm_rope = _norm_rope_op(raw)
    rms = _rms_norm_op(raw)
    norm = _layer_norm_op(raw)
    residual = _residual_op(raw)
    residual_then_norm = _residual_norm_op(raw)
    join = _join_op(raw)

    def qk_norm_rope(q, k, q_weight, k_weight, positions, num_heads, eps, theta=10000.0, round_norm=True):
        dtype = compute_dtype(q.dtype)
        weights = q_weight.to(dtype), k_weight.to(dtype)
        return norm_rope(q, k, *weights, positions, num_heads, eps, theta, round_norm)[:2]

    def rms_norm(x, weight, eps):
        return rms(x, weight.to(compute_dtype(x.dtype)), eps)[0]

    def layer_norm(x, weight, bias, eps):
        dtype = compute_dtype(x.dtype)
        return norm(x, bias.to(dtype)[None], weight.to(dtype)[None], None, 0.0, eps)[0]

    def layer_norm_modulate(x, shift, scale, row_ids, eps):
        dtype = compute_dtype(x.dtype)
        return norm(x, shift.to(dtype), scale.to(dtype), row_ids.int(), 1.0, eps)[0]

    def gated_residual(x, y, gate, row_ids):
        return residual(x, y, gate.to(compute_dtype(x.dtype)), row_ids.int())

    def residual_norm(x, y, gate, shift, scale, row_ids, eps, affine=False):
        dtype = compute_dtype(x.dtype)
        gate = None if gate is None else gate.to(dtype)
        shift, scale = (shift[None], scale[None]) if affine else (shift, scale)
        offset = 0.0 if affine else 1.0
        rows = row_ids.int()
        return residual_then_norm(x, y, gate, shift.to(dtype), scale.to(dtype), rows, affine, offset, eps)[:2]

    def scale_and_add(patches, source_patches, source_scale, row_ids, weight, bias, source_weight, source_bias):
        # One product: [patches | t * source | 1 | t | 0] with [W | Ws | b | bs | 0]. In bfloat16 the scale is cut
        # in two parts, so that t * bs keeps 16 bits of t.
        patch = patches.shape[1]
        width = (2 * patch + 3 + 7) // 8 * 8
        scale = source_scale.to(compute_dtype(patches.dtype))
        joined = join(patches, source_patches.to(patches.dtype), scale, row_ids.int(), width)
        padding = weight.new_zeros(len(weight), width - 2 * patch - 3)
        columns = [weight, source_weight, bias[:, None], source_bias[:, None], source_bias[:, None], padding]
        return joined @ torch.cat(columns, dim=1).to(patches.dtype).T

    return SimpleNamespace(**{name: value for name, value in locals().items() if name in OPERATIONS})


def _norm_rope_op(raw: ModuleType):
    forward_schema = (
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor positions, int num_heads, float eps,"
        " float theta, bool round_norm) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor q_rstd,"
        " Tensor k_rstd, Tensor positions, int num_heads, float theta) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    @torch.library.custom_op(f"loomvideo::{raw.NAME}_qk_norm_rope", mutates_args=(), schema=forward_schema)
    def forward(q, k, q_weight, k_weight, positions, num_heads, eps, theta, round_norm):
        outs, rstds = raw.norm_rope_forward([q, k], [q_weight, k_weight], positions, num_heads, eps, theta, round_norm)
        return (*outs, *rstds)

    @forward.register_fake
    def _(q, k, q_weight, k_weight, positions, num_heads, eps, theta, round_norm):
        return *(_empty_rows(x) for x in (q, k)), *(_per_token(x) for x in (q, k))

    @torch.library.custom_op(f"loomvideo::{raw.NAME}_qk_norm_rope_backward", mutates_args=(), schema=backward_schema)
    def backward(grad_q, grad_k, q, k, q_weight, k_weight, q_rstd, k_rstd, positions, num_heads, theta):
        grads, weight_grads = raw.norm_rope_backward(
            [grad_q, grad_k], [q, k], [q_weight, k_weight], [q_rstd, k_rstd], positions, num_heads, theta
        )
        return (*grads, *weight_grads)

    @backward.register_fake
    def _(grad_q, grad_k, q, k, q_weight, k_weight, q_rstd, k_rstd, positions, num_heads, theta):
        return _empty_rows(q), _empty_rows(k), torch.empty_like(q_weight), torch.empty_like(k_weight)

    def setup_context(ctx, inputs, output):
        q, k, q_weight, k_weight, positions, ctx.num_heads, _, ctx.theta, _ = inputs
        ctx.save_for_backward(q, k, q_weight, k_weight, *output[2:], positions)
        ctx.mark_non_differentiable(*output[2:])

    def autograd(ctx, grad_q, grad_k, *_):
        grads = backward(grad_q, grad_k, *ctx.saved_tensors, ctx.num_heads, ctx.theta)
        return *grads, None, None, None, None, None

    forward.register_autograd(autograd, setup_context=setup_context)
    return forward


def _rms_norm_op(raw: ModuleType):
    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_rms_norm",
        mutates_args=(),
        schema="(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    )
    def forward(x, weight, eps):
        (out,), (rstd,) = raw.norm_rope_forward([x], [weight], None, 1, eps, 0.0, False)
        return out, rstd

    @forward.register_fake
    def _(x, weight, eps):
        return _empty_rows(x), _per_token(x)

    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_rms_norm_backward",
        mutates_args=(),
        schema="(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    )
    def backward(grad, x, weight, rstd):
        (grad_x,), (grad_weight,) = raw.norm_rope_backward([grad], [x], [weight], [rstd], None, 1, 0.0)
        return grad_x, grad_weight

    @backward.register_fake
    def _(grad, x, weight, rstd):
        return _empty_rows(x), torch.empty_like(weight)

    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    def autograd(ctx, grad, _):
        return *backward(grad, *ctx.saved_tensors), None

    forward.register_autograd(autograd, setup_context=setup_context)
    return forward


def _layer_norm_op(raw: ModuleType):
    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_layer_norm",
        mutates_args=(),
        schema="(Tensor x, Tensor shift, Tensor scale, Tensor? row_ids, float scale_offset, float eps)"
        " -> (Tensor, Tensor, Tensor)",
    )
    def forward(x, shift, scale, row_ids, scale_offset, eps):
        _, out, mean, rstd = raw.layer_norm_forward(x, None, None, None, shift, scale, row_ids, scale_offset, eps)
        return out, mean, rstd

    @forward.register_fake
    def _(x, shift, scale, row_ids, scale_offset, eps):
        return _empty_rows(x), _per_token(x), _per_token(x)

    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_layer_norm_backward",
        mutates_args=(),
        schema="(Tensor grad, Tensor x, Tensor scale, Tensor? row_ids, Tensor mean, Tensor rstd, float scale_offset)"
        " -> (Tensor, Tensor, Tensor)",
    )
    def backward(grad, x, scale, row_ids, mean, rstd, scale_offset):
        grad_x, _, _, grad_shift, grad_scale = raw.layer_norm_backward(
            None, grad, x, None, None, None, scale, row_ids, mean, rstd, scale_offset
        )
        return grad_x, grad_shift, grad_scale

    @backward.register_fake
    def _(grad, x, scale, row_ids, mean, rstd, scale_offset):
        return _empty_rows(x), torch.empty_like(scale), torch.empty_like(scale)

    def setup_context(ctx, inputs, output):
        x, _, scale, row_ids, ctx.scale_offset, _ = inputs
        ctx.save_for_backward(x, scale, row_ids, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def autograd(ctx, grad, *_):
        grads = backward(grad, *ctx.saved_tensors, ctx.scale_offset)
        return *grads, None, None, None

    forward.register_autograd(autograd, setup_context=setup_context)
    return forward


def _residual_op(raw: ModuleType):
    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_gated_residual",
        mutates_args=(),
        schema="(Tensor x, Tensor y, Tensor gate, Tensor row_ids) -> Tensor",
    )
    def forward(x, y, gate, row_ids):
        return raw.residual_forward(x, y, gate, row_ids)

    @forward.register_fake
    def _(x, y, gate, row_ids):
        return _empty_rows(x)

    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_gated_residual_backward",
        mutates_args=(),
        schema="(Tensor grad, Tensor y, Tensor gate, Tensor row_ids) -> (Tensor, Tensor)",
    )
    def backward(grad, y, gate, row_ids):
        return raw.residual_backward(grad, y, gate, row_ids)

    @backward.register_fake
    def _(grad, y, gate, row_ids):
        return _empty_rows(y), torch.empty_like(gate)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    def autograd(ctx, grad):
        return grad, *backward(grad, *ctx.saved_tensors), None

    forward.register_autograd(autograd, setup_context=setup_context)
    return forward


def _residual_norm_op(raw: ModuleType):
    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_residual_norm",
        mutates_args=(),
        schema="(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, Tensor row_ids, bool affine,"
        " float scale_offset, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    def forward(x, y, gate, shift, scale, row_ids, affine, scale_offset, eps):
        norm_ids = None if affine else row_ids
        hidden, out, mean, rstd = raw.layer_norm_forward(x, y, gate, row_ids, shift, scale, norm_ids, scale_offset, eps)
        return hidden, out, mean, rstd

    @forward.register_fake
    def _(x, y, gate, shift, scale, row_ids, affine, scale_offset, eps):
        return _empty_rows(x), _empty_rows(x), _per_token(x), _per_token(x)

    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_residual_norm_backward",
        mutates_args=(),
        schema="(Tensor grad_hidden, Tensor grad_out, Tensor hidden, Tensor y, Tensor? gate, Tensor scale,"
        " Tensor row_ids, Tensor mean, Tensor rstd, bool affine, float scale_offset) -> Tensor[]",
    )
    def backward(grad_hidden, grad_out, hidden, y, gate, scale, row_ids, mean, rstd, affine, scale_offset):
        norm_ids = None if affine else row_ids
        grads = raw.layer_norm_backward(
            grad_hidden, grad_out, hidden, y, gate, row_ids, scale, norm_ids, mean, rstd, scale_offset
        )
        return [grad for grad in grads if grad is not None]

    @backward.register_fake
    def _(grad_hidden, grad_out, hidden, y, gate, scale, row_ids, mean, rstd, affine, scale_offset):
        gated = [] if gate is None else [_empty_rows(y), torch.empty_like(gate)]
        return [_empty_rows(hidden), *gated, torch.empty_like(scale), torch.empty_like(scale)]

    def setup_context(ctx, inputs, output):
        _, y, gate, _, scale, row_ids, ctx.affine, ctx.scale_offset, _ = inputs
        hidden, _, mean, rstd = output
        # Without a gate y's gradient is x's, so y itself need not be kept.
        ctx.save_for_backward(hidden, hidden if gate is None else y, gate, scale, row_ids, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)

    def autograd(ctx, grad_hidden, grad_out, *_):
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them for one reading
        gated = saved[2] is not None
        grads = backward(grad_hidden, grad_out, *saved, ctx.affine, ctx.scale_offset)
        grad_x, grad_y, grad_gate, grad_shift, grad_scale = grads if gated else (grads[0], grads[0], None, *grads[1:])
        return grad_x, grad_y, grad_gate, grad_shift, grad_scale, None, None, None, None

    forward.register_autograd(autograd, setup_context=setup_context)
    return forward


def _join_op(raw: ModuleType):
    @torch.library.custom_op(
        f"loomvideo::{raw.NAME}_join_patches",
        mutates_args=(),
        schema="(Tensor patches, Tensor source, Tensor scale, Tensor row_ids, SymInt width) -> Tensor",
    )
    def forward(patches, source, scale, row_ids, width):
        return raw.join_patches(patches, source, scale, row_ids, width)

    @forward.register_fake
    def _(patches, source, scale, row_ids, width):
        return patches.new_empty(len(patches), width)

    def setup_context(ctx, inputs, output):
        _, source, scale, row_ids, _ = inputs
        ctx.save_for_backward(source, scale, row_ids)

    def autograd(ctx, grad):
        # Patches are data and need no gradient in training, so plain PyTorch is enough here.
        source, scale, row_ids = ctx.saved_tensors
        patch = source.shape[1]
        grad_patches, grad_scaled = grad[:, :patch], grad[:, patch : 2 * patch].to(scale.dtype)
        rows = row_ids.long()
        padded = torch.cat([scale, scale.new_zeros(1)])
        per_token = (grad_scaled * source.to(scale.dtype)).sum(1) + grad[:, 2 * patch + 1].to(scale.dtype)
        grad_scale = torch.zeros_like(padded).index_add(0, rows, per_token)[:-1]
        return grad_patches, (grad_scaled * padded[rows, None]).to(grad.dtype), grad_scale, None, None

    forward.register_autograd(autograd, setup_context=setup_context)
    return forward


def _empty_rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _per_token(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:1], dtype=compute_dtype(x.dtype), device=x.device)
