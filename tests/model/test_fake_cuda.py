"""The 5B step, a generation step and the encoders on fake CUDA tensors: devices and dtypes fit, memory is planned."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loomvideo.model.dit import CHECKPOINTING
from loomvideo.model.memory import activation_bytes, states_bytes
from loomvideo.model.sizes import model_size

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).parents[1] / "helpers"
LAYERS = 3
PACKS = {
    # A 121-frame edit and a shorter clip; images and 33-frame clips of stage 1 with their captions.
    "stage 3": ([12_090, 4_294], [1_030, 250]),
    "stage 1": ([64] * 40 + [576] * 14, [150] * 54),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What a CPU build of torch lacks for fake CUDA tensors; nothing for a build with CUDA."""
    if torch.backends.cuda.is_built():
        return ""
    target = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(HELPERS / "fake_cuda.cpp")]
    command += ["-o", str(target), f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
    subprocess.run(command, check=True)
    return str(target)


def fake(library, jobs, script="fake_step.py"):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HELPERS / script), library, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("policy", CHECKPOINTING)
def test_a_5b_step_fits_together_and_takes_the_memory_planned(library, policy):
    jobs = [
        {"layers": LAYERS, "policy": policy, "lengths": lengths, "mllm_lengths": mllm, "references": 390, "generate": 0}
        for lengths, mllm in PACKS.values()
    ]
    config = dataclasses.replace(model_size("5b").dit, num_layers=LAYERS)
    for job, found in zip(jobs, fake(library, jobs), strict=True):
        assert found["gradients"] == ["('cuda', torch.bfloat16)"]
        assert found["without"] == []
        tokens, context = sum(job["lengths"]), sum(job["mllm_lengths"])
        planned = activation_bytes(config, tokens, context, policy) + states_bytes(config, context)
        assert planned == pytest.approx(found["bytes"], rel=0.15)


def test_a_5b_generation_step_fits_together(library):
    jobs = [
        {"layers": LAYERS, "policy": "none", "lengths": [9_750] * 3, "mllm_lengths": [820, 780, 30], "references": 0,
         "generate": 1},
    ]  # fmt: skip
    (found,) = fake(library, jobs)
    assert found["gradients"] == []
    # Keys and values of the three branches are kept; nothing else grows with the number of blocks.
    config = model_size("5b").dit
    kept = LAYERS * 2 * sum(jobs[0]["mllm_lengths"]) * config.inner_dim * 2
    assert found["bytes"] > kept
    assert found["bytes"] < kept + 9_750 * 3 * (2 * config.ffn_dim + 6 * config.inner_dim) * 2 + 2**30


def test_batches_of_the_real_encoders_fit_together(library):
    from diffusers import AutoencoderKLWan

    from loomvideo.model.codec.wan import CHUNKS, DEFAULT_MEMORY_LIMIT_BYTES, WAN_22_SIZES, WanVAE

    with torch.device("meta"):
        model = torch.nn.Module.to(AutoencoderKLWan(**WAN_22_SIZES), torch.bfloat16)
    planned = {chunk: WanVAE(model, "meta")._bytes_per_cell("encoder", chunk) for chunk in CHUNKS}
    clips = [
        {"kind": "vae", "config": WAN_22_SIZES, "bytes_per_cell": planned, "channels_last": channels_last,
         "clips": number, "frames": frames, "height": height, "width": width}
        for channels_last in (False, True)
        for number, frames, height, width in ((1, 121, 480, 832), (4, 17, 256, 256))
    ]  # fmt: skip
    texts = {"kind": "mllm", "lengths": [100] * 40 + [900] * 3}
    *found, packed = fake(library, [*clips, texts], "fake_encode.py")
    for job, batch in zip(clips, found, strict=True):
        cells = job["height"] * job["width"] // 256
        assert batch["devices"] == ["cuda:0"]
        assert batch["dtypes"] == ["torch.float32"]
        assert batch["shape"] == [job["clips"], 48, 1 + job["frames"] // 4, job["height"] // 16, job["width"] // 16]
        own = batch["bytes"] - 6 * 4 * batch["shape"][0] * 48 * batch["shape"][2] * cells
        assert own <= planned[4] * cells * job["clips"] * 1.05
        assert own <= DEFAULT_MEMORY_LIMIT_BYTES
    assert (packed["devices"], packed["dtypes"]) == (["cuda:0"], ["torch.bfloat16"])
    assert packed["shapes"] == [[30, length, 4096] for length in texts["lengths"]]
