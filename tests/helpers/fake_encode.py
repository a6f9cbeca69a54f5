"""The frozen encoders of the 5B model on fake CUDA tensors: ``python fake_encode.py LIBRARY JOBS``; prints JSON.

Nothing is computed and no memory is taken; what is found are devices and dtypes that do not fit each other, and the
peak of what is alive beside the weights.
"""

import ctypes
import json
import sys

# Before torch, which keeps the first hooks it finds.
if sys.argv[1]:
    assert ctypes.CDLL(sys.argv[1]).fake_cuda() == 1

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3VLModel

from loomvideo.model.codec import CodecExecution
from loomvideo.model.codec.live_bytes import PeakLiveBytes
from loomvideo.model.codec.wan import WanVAE
from loomvideo.model.conditioning import mllm as conditioning
from loomvideo.model.conditioning.inputs import MLLMInputs
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.random_weights import model_config
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.pixels import CopiedClips, PixelCopier

CUDA = torch.device("cuda:0")


def on_cuda(model: nn.Module) -> nn.Module:
    """The model with fake bf16 weights on the GPU; buffers as they are made, but there."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                weight = torch.empty(parameter.shape, device=CUDA, dtype=torch.bfloat16)
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device=CUDA, dtype=buffer.dtype)
    return model


def vae(job: dict) -> dict:
    """A batch of clips through Wan2.2's encoder: clips, frames, height, width, channels_last."""
    with FakeTensorMode():
        with torch.device("meta"):
            model = AutoencoderKLWan(**job["config"])
        codec = WanVAE(on_cuda(model), "fake", execution=CodecExecution(channels_last=job["channels_last"]))
        codec._bytes_per_cell = lambda part, chunk: job["bytes_per_cell"][str(chunk)]
        copier = PixelCopier.__new__(PixelCopier)
        shape = (job["clips"], job["frames"], job["height"], job["width"], 3)
        clips = CopiedClips([0], torch.empty(shape, dtype=torch.uint8, device=CUDA))
        video = copier.video(clips, torch.bfloat16)
        with torch.no_grad(), PeakLiveBytes() as live:
            moments = codec.encode(video)
        return {
            "devices": sorted({str(tensor.device) for tensor in moments}),
            "dtypes": sorted({str(tensor.dtype) for tensor in moments}),
            "shape": list(moments.mean.shape),
            "bytes": live.peak,
            "pixel_bytes": clips.frames.nbytes,
            "video_bytes": video.nbytes,
        }


def mllm(job: dict) -> dict:
    """Texts packed into rows of the 8B MLLM: lengths."""
    size, tokenizer = model_size("5b"), MLLMTokenizer()
    with FakeTensorMode():
        with torch.device("meta"):
            model = Qwen3VLModel(model_config(size.mllm, tokenizer))
        model = on_cuda(model)
        frozen = FrozenMLLM(model, size.dit.num_layers, tokenizer, size.mllm.processor, "fake")
        frozen.pack_prompts()
        # Positions are read from ids on the host, which fake tensors do not have.
        conditioning.prompt_positions = lambda ids, *rest: torch.zeros(3, len(ids), dtype=torch.int64)
        prompts = [MLLMInputs(torch.zeros(length, dtype=torch.int64)) for length in job["lengths"]]
        with PeakLiveBytes() as live:
            states = frozen.encode(prompts)
        return {
            "devices": sorted({str(one.device) for one in states}),
            "dtypes": sorted({str(one.dtype) for one in states}),
            "shapes": [list(one.shape) for one in states],
            "bytes": live.peak,
        }


if __name__ == "__main__":
    print(json.dumps([{"vae": vae, "mllm": mllm}[job["kind"]](job) for job in json.loads(sys.argv[2])]))
