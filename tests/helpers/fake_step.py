"""The 5B step on fake CUDA tensors, in a process of its own: ``python fake_step.py LIBRARY JOB``; prints JSON.

Nothing is computed and no memory is taken; what is found are devices and dtypes that do not fit each other, and the
peak that torch's memory tracker counts. Blocks are alike, so a few of them stand for thirty.
"""

import ctypes
import dataclasses
import json
import sys

# Before torch, which keeps the first hooks it finds.
if sys.argv[1]:
    assert ctypes.CDLL(sys.argv[1]).fake_cuda() == 1

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from loomvideo.model.attention import AttentionPlan
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.kernels import backends, triton_backend
from loomvideo.model.kernels.fused import fused_operations
from loomvideo.model.packing import PackedBatch
from loomvideo.model.sizes import model_size


class _Checked(dict):
    """Every operation counts as checked: the check computes, which fake tensors cannot."""

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return True


def use_triton_operations():
    """The operations a GPU runs, by their shape functions."""
    backends._state.operations["triton"] = fused_operations(triton_backend)
    backends._state.by_device["cuda"] = "triton"
    backends._state.checked = _Checked()


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="cuda", dtype=dtype)


def fake_batch(config, lengths, mllm_lengths, num_references):
    """A pack; the first ``num_references`` tokens count as references'."""
    tokens, context, samples, index = sum(lengths), sum(mllm_lengths), len(lengths), torch.int32

    def plan(queries, keys):
        offsets = {name: empty(samples + 1, dtype=index) for name in ("query_offsets", "key_offsets")}
        return dataclasses.replace(AttentionPlan.build(queries, keys), **offsets)

    video = tokens - num_references
    return PackedBatch(
        patches=empty(tokens, config.patch_dim),
        source_patches=empty(tokens, config.patch_dim),
        source_scale=empty(samples, dtype=torch.float32),
        timesteps=empty(samples, dtype=torch.float32),
        positions=empty(tokens, 3, dtype=index),
        row_ids=empty(tokens, dtype=index),
        video_index=empty(video, dtype=torch.int64) if num_references else None,
        video_row_ids=empty(video, dtype=index),
        mllm_states=empty(config.num_layers, context, config.mllm_dim),
        self_plan=plan(lengths, None),
        cross_plan=plan(lengths, mllm_lengths),
        grids=[(1, 1, length) for length in lengths],
        patch_size=(1, 2, 2),
    )


def run(job):
    """Peak bytes beside weights and gradients of a job: layers, policy, lengths, mllm_lengths, references, generate."""
    config = dataclasses.replace(model_size("5b").dit, num_layers=job["layers"])
    with FakeTensorMode():
        with torch.device("meta"):
            model = LoomVideoDiT(config)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(empty(*parameter.shape))
        model.set_activation_checkpointing(job["policy"])
        batch = fake_batch(config, job["lengths"], job["mllm_lengths"], job["references"])
        tracker = MemTracker()
        kept = []
        if job["generate"]:
            # Once a generation, and kept over its steps.
            with torch.no_grad():
                time = model.embed_time(batch.timesteps, torch.bfloat16)
                contexts = model.keys_values(batch.mllm_states)
            kept = [*time, *(tensor for pair in contexts for tensor in pair)]
        tracker.track_external(model, batch.patches, batch.source_patches, batch.mllm_states, *kept)
        with tracker:
            if job["generate"]:
                with torch.no_grad():
                    velocity = model(batch, contexts=contexts, time=time)
            else:
                velocity = model(batch)
                (velocity.float() - empty(*velocity.shape, dtype=torch.float32)).square().sum().backward()
        assert velocity.is_cuda
        assert velocity.dtype == torch.bfloat16
        gradients = {(p.grad.device.type, p.grad.dtype) for p in model.parameters() if p.grad is not None}
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]
        named = {getattr(kind, "name", kind): value for kind, value in peak.items()}
        own = named["Total"] - named["PARAM"] - named["GRAD"]
        return {"bytes": own, "gradients": sorted(map(str, gradients)), "without": [
            name for name, p in model.named_parameters() if p.grad is None and not job["generate"]]}  # fmt: skip


if __name__ == "__main__":
    use_triton_operations()
    print(json.dumps([run(job) for job in json.loads(sys.argv[2])]))
