"""Triton kernels of the fused operations: one token's row a program forward, a span of tokens a program backward.

A row is kept in registers, read once and written once. Sums are float32. The kernels use no autotuning, so that a
first step never looks like a hang, do not specialise on counts that change from step to step, so that no later step
compiles, and use only what Triton 3.6 and later have in common.

Row gradients (modulation, gates) are reduced without races: a program walks over a contiguous span of tokens and
keeps the running sum of the current row in registers. Its first and last rows, which its neighbours may share, go
into slots of their own and are added in order by :func:`reduce_slots`; a row that lies wholly inside a span is added
atomically and, when the tokens of a row are contiguous, by this program alone. So results are reproducible.
"""

import triton
import triton.language as tl


@triton.jit
def _token_angles(positions, tables, token, TIME_PAIRS, SIDE_PAIRS, MAX_POSITION, BLOCK_PAIRS: tl.constexpr):
    """Cosines and sines of a token's channel pairs; not a number if a position is outside the tables."""
    pairs = tl.arange(0, BLOCK_PAIRS)
    num_pairs = TIME_PAIRS + 2 * SIDE_PAIRS
    t = tl.load(positions + token * 3)
    h = tl.load(positions + token * 3 + 1)
    w = tl.load(positions + token * 3 + 2)
    position = tl.where(pairs < TIME_PAIRS, t, tl.where(pairs < TIME_PAIRS + SIDE_PAIRS, h, w))
    index = tl.abs(position)
    inside = index < MAX_POSITION
    offsets = index * num_pairs + pairs
    mask = inside & (pairs < num_pairs)
    cos = tl.load(tables + offsets, mask=mask, other=0.0)
    sin = tl.load(tables + MAX_POSITION * num_pairs + offsets, mask=mask, other=0.0)
    cos = tl.where(inside, cos, float("nan"))
    sin = tl.where(position < 0, -sin, sin)
    return cos, sin


@triton.jit
def _rotate(x, cos, sin, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """Turn the channel pairs of ``x [BLOCK_HEADS, 2 * BLOCK_PAIRS]``."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_PAIRS, 2)))
    turned = tl.join(even * cos[None, :] - odd * sin[None, :], even * sin[None, :] + odd * cos[None, :])
    return tl.reshape(turned, (BLOCK_HEADS, 2 * BLOCK_PAIRS))


@triton.jit
def _norm_rope_row(
    x, weight, out, rstd, token, x_stride, cos, sin, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    lanes = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    mask = (heads < HEADS) & (lanes < HEAD_DIM)
    columns = heads * HEAD_DIM + lanes
    row = tl.load(x + token * x_stride + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    w = tl.load(weight + columns, mask=mask, other=0.0, eviction_policy="evict_last")
    r = 1.0 / tl.sqrt(tl.sum(tl.sum(row * row, axis=1), axis=0) / (HEADS * HEAD_DIM) + eps)
    tl.store(rstd + token, r)
    normed = row * r * w
    if ROTATE:
        if ROUND:
            normed = normed.to(out.dtype.element_ty).to(tl.float32)
        normed = _rotate(normed, cos, sin, BLOCK_HEADS, BLOCK_PAIRS)
    tl.store(out + token * HEADS * HEAD_DIM + columns, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_rope_forward(
    x0, x1, weight0, weight1, out0, out1, rstd0, rstd1, positions, tables, stride0, stride1, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TIME_PAIRS: tl.constexpr, SIDE_PAIRS: tl.constexpr,
    MAX_POSITION: tl.constexpr, TWO: tl.constexpr, ROTATE: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """RMS norm and rotation of one token's rows in one tensor or in two (q and k). Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    if ROTATE:
        cos, sin = _token_angles(positions, tables, token, TIME_PAIRS, SIDE_PAIRS, MAX_POSITION, BLOCK_PAIRS)
    else:
        cos = tl.zeros((BLOCK_PAIRS,), tl.float32)
        sin = cos
    _norm_rope_row(
        x0, weight0, out0, rstd0, token, stride0, cos, sin, eps,
        HEADS, HEAD_DIM, ROTATE, ROUND, BLOCK_HEADS, BLOCK_PAIRS,
    )  # fmt: skip
    if TWO:
        _norm_rope_row(
            x1, weight1, out1, rstd1, token, stride1, cos, sin, eps,
            HEADS, HEAD_DIM, ROTATE, ROUND, BLOCK_HEADS, BLOCK_PAIRS,
        )  # fmt: skip


@triton.jit
def _norm_rope_backward_span(
    x, grad, weight, rstd, out, partial, positions, tables, x_stride, grad_stride, begin, end,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TIME_PAIRS: tl.constexpr, SIDE_PAIRS: tl.constexpr,
    MAX_POSITION: tl.constexpr, ROTATE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    lanes = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    mask = (heads < HEADS) & (lanes < HEAD_DIM)
    columns = heads * HEAD_DIM + lanes
    w = tl.load(weight + columns, mask=mask, other=0.0)
    weight_grad = tl.zeros((BLOCK_HEADS, 2 * BLOCK_PAIRS), tl.float32)
    for token in range(begin, end):
        row = tl.load(x + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + token * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + token)
        if ROTATE:
            cos, sin = _token_angles(positions, tables, token, TIME_PAIRS, SIDE_PAIRS, MAX_POSITION, BLOCK_PAIRS)
            g = _rotate(g, cos, -sin, BLOCK_HEADS, BLOCK_PAIRS)
        normed = row * r
        weight_grad += g * normed
        g = g * w
        mean = tl.sum(tl.sum(g * normed, axis=1), axis=0) / (HEADS * HEAD_DIM)
        tl.store(
            out + token * HEADS * HEAD_DIM + columns, (r * (g - normed * mean)).to(out.dtype.element_ty), mask=mask
        )
    tl.store(partial + tl.program_id(0) * HEADS * HEAD_DIM + columns, weight_grad, mask=mask)


@triton.jit(do_not_specialize=["tokens", "span"])
def norm_rope_backward(
    x0, x1, grad0, grad1, weight0, weight1, rstd0, rstd1, out0, out1, partial0, partial1, positions, tables,
    x_stride0, x_stride1, grad_stride0, grad_stride1, tokens, span,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TIME_PAIRS: tl.constexpr, SIDE_PAIRS: tl.constexpr,
    MAX_POSITION: tl.constexpr, ROTATE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of norm and rotation; each program's share of the weights' gradient. Grid: spans x tensors."""
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, tokens)
    if tl.program_id(1) == 0:
        _norm_rope_backward_span(
            x0, grad0, weight0, rstd0, out0, partial0, positions, tables, x_stride0, grad_stride0, begin, end,
            HEADS, HEAD_DIM, TIME_PAIRS, SIDE_PAIRS, MAX_POSITION, ROTATE, BLOCK_HEADS, BLOCK_PAIRS,
        )  # fmt: skip
    else:
        _norm_rope_backward_span(
            x1, grad1, weight1, rstd1, out1, partial1, positions, tables, x_stride1, grad_stride1, begin, end,
            HEADS, HEAD_DIM, TIME_PAIRS, SIDE_PAIRS, MAX_POSITION, ROTATE, BLOCK_HEADS, BLOCK_PAIRS,
        )  # fmt: skip


@triton.jit
def layer_norm_forward(
    x, y, gate, shift, scale, gate_ids, norm_ids, hidden, out, mean, rstd, x_stride, y_stride, scale_offset, eps,
    DIM: tl.constexpr, HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Optional residual, then layer norm times ``scale_offset + scale[row]`` plus ``shift[row]``. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < DIM
    row = tl.load(x + token * x_stride + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_Y:
        added = tl.load(y + token * y_stride + columns, mask=mask, other=0.0, eviction_policy="evict_first")
        added = added.to(tl.float32)
        if HAS_GATE:
            gate_row = tl.load(gate_ids + token).to(tl.int64)
            added = added * tl.load(gate + gate_row * DIM + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        rounded = (row + added).to(hidden.dtype.element_ty)
        tl.store(hidden + token * DIM + columns, rounded, mask=mask)
        row = rounded.to(tl.float32)
    norm_row = tl.zeros((), tl.int64)
    if HAS_IDS:
        norm_row = tl.load(norm_ids + token).to(tl.int64)
    factor = scale_offset + tl.load(
        scale + norm_row * DIM + columns, mask=mask, other=0.0, eviction_policy="evict_last"
    )
    offset = tl.load(shift + norm_row * DIM + columns, mask=mask, other=0.0, eviction_policy="evict_last")
    m = tl.sum(row, axis=0) / DIM
    centred = tl.where(mask, row - m, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / DIM + eps)
    tl.store(mean + token, m)
    tl.store(rstd + token, r)
    tl.store(out + token * DIM + columns, (centred * r * factor + offset).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _flush(
    sums, slots, atomics, program, is_first, is_last, row, columns, mask, PART: tl.constexpr, PARTS: tl.constexpr, DIM,
):  # fmt: skip
    """Put a row's sum into the program's first or last slot, or add it to the row itself."""
    if is_last:
        tl.store(slots + ((program * 2 + 1) * PARTS + PART) * DIM + columns, sums, mask=mask)
    else:
        if is_first:
            tl.store(slots + (program * 2 * PARTS + PART) * DIM + columns, sums, mask=mask)
        else:
            tl.atomic_add(atomics + row.to(tl.int64) * DIM + columns, sums, mask=mask)


@triton.jit(do_not_specialize=["tokens", "span"])
def layer_norm_backward(
    grad_hidden, grad_out, x, y, gate, scale, gate_ids, norm_ids, mean, rstd,
    grad_x, grad_y, grad_shift, grad_scale, grad_gate, slots, slot_norm_rows, slot_gate_rows,
    hidden_stride, out_stride, x_stride, y_stride, tokens, span, scale_offset,
    DIM: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_GATE: tl.constexpr, HAS_IDS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of :func:`layer_norm_forward` over a span of tokens. Grid: spans.

    ``slots [spans, 2, PARTS, DIM]`` (shift, scale, gate) and ``slot_*_rows [spans, 2]``, -1 where unused.
    """
    program = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, tokens)
    columns = tl.arange(0, BLOCK)
    mask = columns < DIM
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    norm_row = tl.zeros((), tl.int32)
    gate_row = tl.zeros((), tl.int32)
    if HAS_IDS:
        norm_row = tl.load(norm_ids + begin)
    if HAS_GATE:
        gate_row = tl.load(gate_ids + begin)
    factor = scale_offset + tl.load(scale + norm_row.to(tl.int64) * DIM + columns, mask=mask, other=0.0)
    gate_values = tl.zeros((BLOCK,), tl.float32)
    if HAS_GATE:
        gate_values = tl.load(gate + gate_row.to(tl.int64) * DIM + columns, mask=mask, other=0.0)
    is_first = True
    for token in range(begin, end):
        g = tl.load(grad_out + token * out_stride + columns, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(x + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(mean + token)
        r = tl.load(rstd + token)
        next_norm_row = norm_row
        next_gate_row = gate_row
        if HAS_IDS:
            next_norm_row = tl.load(norm_ids + token)
        if HAS_GATE:
            next_gate_row = tl.load(gate_ids + token)
        if (next_norm_row != norm_row) | (next_gate_row != gate_row):
            _flush(shift_sum, slots, grad_shift, program, is_first, False, norm_row, columns, mask, 0, PARTS, DIM)
            _flush(scale_sum, slots, grad_scale, program, is_first, False, norm_row, columns, mask, 1, PARTS, DIM)
            if HAS_GATE:
                _flush(gate_sum, slots, grad_gate, program, is_first, False, gate_row, columns, mask, 2, PARTS, DIM)
            if is_first:
                tl.store(slot_norm_rows + program * 2, norm_row)
                tl.store(slot_gate_rows + program * 2, gate_row)
            is_first = False
            shift_sum = tl.zeros((BLOCK,), tl.float32)
            scale_sum = tl.zeros((BLOCK,), tl.float32)
            gate_sum = tl.zeros((BLOCK,), tl.float32)
            norm_row = next_norm_row
            gate_row = next_gate_row
            factor = scale_offset + tl.load(scale + norm_row.to(tl.int64) * DIM + columns, mask=mask, other=0.0)
            if HAS_GATE:
                gate_values = tl.load(gate + gate_row.to(tl.int64) * DIM + columns, mask=mask, other=0.0)
        normed = tl.where(mask, (row - m) * r, 0.0)
        shift_sum += g
        scale_sum += g * normed
        g = g * factor
        mean_g = tl.sum(g, axis=0) / DIM
        mean_gn = tl.sum(g * normed, axis=0) / DIM
        dx = r * (g - mean_g - normed * mean_gn)
        if HAS_HIDDEN:
            dx += tl.load(grad_hidden + token * hidden_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + token * DIM + columns, dx.to(grad_x.dtype.element_ty), mask=mask)
        if HAS_GATE:
            added = tl.load(y + token * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
            gate_sum += dx * added
            tl.store(grad_y + token * DIM + columns, (dx * gate_values).to(grad_y.dtype.element_ty), mask=mask)
    _flush(shift_sum, slots, grad_shift, program, False, True, norm_row, columns, mask, 0, PARTS, DIM)
    _flush(scale_sum, slots, grad_scale, program, False, True, norm_row, columns, mask, 1, PARTS, DIM)
    if HAS_GATE:
        _flush(gate_sum, slots, grad_gate, program, False, True, gate_row, columns, mask, 2, PARTS, DIM)
    tl.store(slot_norm_rows + program * 2 + 1, norm_row)
    tl.store(slot_gate_rows + program * 2 + 1, gate_row)


@triton.jit
def residual_forward(x, y, gate, ids, out, x_stride, y_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """``x + y * gate[row]``. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < DIM
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(x + token * x_stride + columns, mask=mask, eviction_policy="evict_first").to(tl.float32)
    added = tl.load(y + token * y_stride + columns, mask=mask, eviction_policy="evict_first").to(tl.float32)
    factor = tl.load(gate + row * DIM + columns, mask=mask, eviction_policy="evict_last")
    tl.store(out + token * DIM + columns, (value + added * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "span"])
def residual_backward(
    grad, y, gate, ids, grad_y, grad_gate, slots, slot_rows, grad_stride, y_stride, tokens, span,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of y and of the gate over a span of tokens; slots as in :func:`layer_norm_backward`. Grid: spans."""
    program = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, tokens)
    columns = tl.arange(0, BLOCK)
    mask = columns < DIM
    sums = tl.zeros((BLOCK,), tl.float32)
    row = tl.load(ids + begin)
    factor = tl.load(gate + row.to(tl.int64) * DIM + columns, mask=mask, other=0.0)
    is_first = True
    for token in range(begin, end):
        g = tl.load(grad + token * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        added = tl.load(y + token * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        next_row = tl.load(ids + token)
        if next_row != row:
            _flush(sums, slots, grad_gate, program, is_first, False, row, columns, mask, 0, 1, DIM)
            if is_first:
                tl.store(slot_rows + program * 2, row)
            is_first = False
            sums = tl.zeros((BLOCK,), tl.float32)
            row = next_row
            factor = tl.load(gate + row.to(tl.int64) * DIM + columns, mask=mask, other=0.0)
        sums += g * added
        tl.store(grad_y + token * DIM + columns, (g * factor).to(grad_y.dtype.element_ty), mask=mask)
    _flush(sums, slots, grad_gate, program, False, True, row, columns, mask, 0, 1, DIM)
    tl.store(slot_rows + program * 2 + 1, row)


@triton.jit(do_not_specialize=["num_slots"])
def reduce_slots(
    slots, slot_rows, out, num_slots, stride, DIM: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to each row the slots that belong to it, in order. Grid: rows x column blocks."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, num_slots, BLOCK_SLOTS):
        index = begin + tl.arange(0, BLOCK_SLOTS)
        rows = tl.load(slot_rows + index, mask=index < num_slots, other=-1)
        mask = (rows == row)[:, None] & (columns < DIM)[None, :]
        values = tl.load(slots + index.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        sums += tl.sum(values, axis=0)
    to = out + row.to(tl.int64) * DIM + columns
    tl.store(to, tl.load(to, mask=columns < DIM) + sums, mask=columns < DIM)


@triton.jit(do_not_specialize=["tokens", "samples"])
def join_patches(
    patches, source, scale, ids, out, tokens, patches_stride, source_stride, samples,
    PATCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ``patches, scale * source, 1, scale in two parts, zeros``. Grid: token blocks."""
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    valid = token < tokens
    row = tl.load(ids + token, mask=valid, other=0)
    t = tl.load(scale + row, mask=valid & (row < samples), other=0.0)
    value = tl.load(patches + token * patches_stride + column, mask=valid & (column < PATCH), other=0.0).to(tl.float32)
    in_source = (column >= PATCH) & (column < 2 * PATCH)
    scaled = tl.load(source + token * source_stride + column - PATCH, mask=valid & in_source, other=0.0).to(tl.float32)
    value = tl.where(in_source, scaled * t, value)
    high = t.to(out.dtype.element_ty).to(tl.float32)
    value = tl.where(column == 2 * PATCH, 1.0, value)
    value = tl.where(column == 2 * PATCH + 1, high, value)
    value = tl.where(column == 2 * PATCH + 2, t - high, value)
    tl.store(out + token * WIDTH + column, value.to(out.dtype.element_ty), mask=valid & (column < WIDTH))
