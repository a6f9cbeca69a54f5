"""Run every Triton kernel through Triton's interpreter; prints ``{case: disagreement or null}`` as JSON.

A process of its own, because Triton decides at its import whether it interprets.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from fixtures.kernel_fuzz import random_calls
from fixtures.reference import (
    FOLDER,
    reference_config,
    reference_dit,
    reference_dit_config,
    reference_sample,
    reference_vectors,
)
from fixtures.reference import TOLERANCE as VELOCITY_TOLERANCE

from loomvideo.model import kernels
from loomvideo.model.kernels import eager
from loomvideo.model.kernels.selfcheck import TOLERANCE, relative_error, results_and_gradients, training_calls
from loomvideo.model.packing import pack


def worst_error(name, arguments, keywords):
    with kernels.use_backend("triton"):
        values = results_and_gradients(getattr(kernels, name), arguments, keywords)
    references = results_and_gradients(getattr(eager, name), arguments, keywords)
    return max(relative_error(v, r) for v, r in zip(values, references, strict=True))


def published_velocities():
    samples = [reference_sample(index) for index in range(len(reference_config()["samples"]))]
    batch = pack(samples, reference_dit_config().patch_size)
    with kernels.use_backend("triton"), torch.no_grad():
        velocities = batch.unpack(reference_dit()(batch))
    errors = [(v - reference_vectors()[f"{i}.velocity"][0]).abs().max().item() for i, v in enumerate(velocities)]
    return None if max(errors) <= VELOCITY_TOLERANCE["atol"] else max(errors)


def main():
    torch.set_num_threads(1)
    cases = {}
    # 2 heads of 30 channels: no power of two anywhere; 64 with one head: none of the masks.
    for dtype, width, num_heads, tokens in ((torch.float32, 60, 2, 19), (torch.bfloat16, 64, 1, 8)):
        calls = training_calls(width, num_heads, dtype, "cpu", tokens, patch=10)
        for index, (name, arguments, keywords) in enumerate(calls):
            error = worst_error(name, arguments, keywords)
            cases[f"{index}-{name}-{dtype}-{width}"] = None if error <= TOLERANCE[dtype] else error

    for case, name, arguments, keywords in random_calls(24, (torch.float32, torch.bfloat16), 12, 40):
        error = worst_error(name, arguments, keywords)
        cases[case] = None if error <= TOLERANCE[arguments[0].dtype] else error

    with kernels.use_backend("triton"):
        x = torch.randn(9, 3 * 24)
        q, k, _ = x.chunk(3, dim=1)
        weights = torch.randn(2, 24)
        positions = torch.zeros(9, 3, dtype=torch.int32)
        got = kernels.qk_norm_rope(q, k, *weights, positions, 2, 1e-6)
        expected = eager.qk_norm_rope(q, k, *weights, positions, 2, 1e-6)
        cases["strided rows"] = None if torch.allclose(got[0], expected[0], atol=1e-5) else "differs"
        positions[4, 1] = kernels.MAX_POSITION
        out, _ = kernels.qk_norm_rope(q, k, *weights, positions, 2, 1e-6)
        only_that_token = out[4].isnan().any() and not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
        cases["position outside the tables"] = None if only_that_token else "not marked by NaN"

        shift, scale = (torch.randn(5, 16, requires_grad=True) for _ in range(2))
        for tokens in (0, 1, 40):
            rows = torch.randint(0, 5, (tokens,)).int()  # unsorted: rows come back within a span
            call = (torch.randn(tokens, 16, requires_grad=True), shift, scale, rows, 1e-6), {}
            values = results_and_gradients(kernels.layer_norm_modulate, *call)
            references = results_and_gradients(eager.layer_norm_modulate, *call)
            close = all(torch.allclose(v, r, atol=1e-4) for v, r in zip(values, references, strict=True))
            cases[f"unsorted rows, {tokens} tokens"] = None if close else "differs"
        assert not kernels.report()["replaced"]
    if FOLDER.is_dir():
        cases["velocities of the published model"] = published_velocities()
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
