"""Time the C++ kernels against eager, torch.compile and the published formulation, as a Markdown table.

    python benchmarks/kernels_cpu.py [--no-compile] [--dtype bfloat16] [--cpu-time]

With ``--cpu-time`` one thread is used and its processor time counts, so that other load on the machine does not.

The published formulation is what the official code computes: two Conv3d and a scaled sum for Scale-and-Add, rotary
embedding in float64, and modulation tables of one row a token.
"""

import argparse
import os
import time

import torch
import torch.nn.functional as F

from loomvideo.model.kernels import bench, eager, rope, set_backend

GRID = (16, 16, 16)  # frames, rows and columns of latent patches: 4096 tokens


def published_scale_and_add(patches, source_patches, source_scale, row_ids, weight, bias, source_weight, source_bias):
    """Two strided 3-D convolutions over latents, a scaled sum, then tokens."""
    channels = patches.shape[1] // 4
    f, h, w = GRID

    def embed(x, kernel, kernel_bias):
        x = x.view(f, h, w, 2, 2, channels).permute(5, 0, 1, 3, 2, 4).reshape(1, channels, f, 2 * h, 2 * w)
        kernel = kernel.view(-1, 2, 2, channels).permute(0, 3, 1, 2)[:, :, None].contiguous()
        return F.conv3d(x.contiguous(), kernel, kernel_bias, stride=(1, 2, 2))

    hidden = embed(patches, weight, bias) + embed(source_patches, source_weight, source_bias) * source_scale[0]
    return hidden.flatten(2).transpose(1, 2)


def published_qk_norm_rope(q, k, q_weight, k_weight, positions, num_heads, eps, theta=10000.0, round_norm=True):
    """RMSNorm in the activations' dtype, then the rotation in float64 with [L, head_dim] tables."""
    head_dim = q.shape[1] // num_heads
    cos, sin = rope.token_angles(positions, head_dim, theta, torch.float64)
    cos, sin = (t.repeat_interleave(2, dim=1)[:, None] for t in (cos, sin))

    def rotate(x, weight):
        x = F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(1, (num_heads, -1))
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = x1 * cos[..., 0::2] - x2 * sin[..., 1::2]
        out[..., 1::2] = x1 * sin[..., 1::2] + x2 * cos[..., 0::2]
        return out.type_as(x)

    return rotate(q, q_weight), rotate(k, k_weight)


def published_layer_norm_modulate(x, shift, scale, row_ids, eps):
    """Six modulation rows a token from an expanded table, in float32; two of them are used here."""
    table = torch.zeros(1, 1, 6, x.shape[1])
    temb = torch.stack([shift, scale] * 3, dim=1)[row_ids.long()][None].to(x.dtype)
    rows = (table + temb.float()).chunk(6, dim=2)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + rows[1][0, :, 0]) + rows[0][0, :, 0]).type_as(x)


PUBLISHED = {
    "scale_and_add": published_scale_and_add,
    "qk_norm_rope": published_qk_norm_rope,
    "layer_norm_modulate": published_layer_norm_modulate,
}


def main() -> None:
    """Print one row an operation, dtype and phase."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--operation", choices=bench.TIMED, action="append")
    options = parser.parse_args()
    tokens = GRID[0] * GRID[1] * GRID[2]
    dtypes = [getattr(torch, name) for name in options.dtype or ("float32", "bfloat16")]

    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    report = set_backend("cpp", required=True)
    bandwidth = bench.copy_bandwidth(clock=clock)
    print(
        f"L = {tokens}, D = {options.dim}, {torch.get_num_threads()} threads, {report['cpp']['isa']}, copy"
        f" {bandwidth / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}; "
        f" medians of {options.repeats} in ms of {'processor' if options.cpu_time else 'wall'} time\n"
    )
    print("| operation | dtype | phase | published | eager | compile | cpp | vs eager | vs compile | MB | of copy |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    operations = bench.load_operations("cpp")
    for dtype in dtypes:
        for name in options.operation or bench.TIMED:
            arguments, keywords = bench.model_arguments(name, tokens, options.dim, options.heads, 192, dtype)
            if name == "scale_and_add":  # one sample, as the convolutions of the published form have it
                rows = torch.zeros(tokens, dtype=torch.int32)
                arguments = (*arguments[:2], torch.tensor([0.7]), rows, *arguments[4:])
            definition = getattr(eager, name)
            compiled = None if options.no_compile else torch.compile(definition, dynamic=False)
            for phase, call in (("fwd", bench.forward), ("fwd+bwd", bench.forward_and_backward)):

                def measure(function, call=call, arguments=arguments, keywords=keywords):
                    if function is None:
                        return None
                    return bench.median_ms(lambda: call(function, arguments, keywords), options.repeats, clock)

                times = [measure(f) for f in (PUBLISHED.get(name), definition, compiled, getattr(operations, name))]
                published, plain, inductor, fused = times
                size = bench.floor_bytes(definition, arguments, keywords, backward=phase != "fwd")
                cells = [
                    name,
                    str(dtype).removeprefix("torch."),
                    phase,
                    _number(published),
                    _number(plain),
                    _number(inductor),
                    _number(fused),
                    f"{plain / fused:.1f}x",
                    "-" if inductor is None else f"{inductor / fused:.1f}x",
                    f"{size / 1e6:.0f}",
                    f"{size / fused * 1e3 / bandwidth:.0%}",
                ]
                print(f"| {' | '.join(cells)} |", flush=True)


def _number(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.1f}"


if __name__ == "__main__":
    main()
