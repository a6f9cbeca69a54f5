"""Exported weights open with diffusers, in a process that knows nothing of this package, and make the same frames."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from fixtures.published import write_qwen3_vl, write_wan_vae

from loomvideo.model.codec import build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.interchange.folder import write_folder
from loomvideo.model.interchange.parts import TILED_BYTES
from loomvideo.model.interchange.pipeline import LoomVideoDiffusionPipeline
from loomvideo.model.kernels import set_backend
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.model.sizes import PIPELINE_FILE, model_size, stated_left_out
from loomvideo.model.weights import load_dit, save_dit
from loomvideo.platform.errors import UserError

SIZE = model_size("tiny")
SIDE = 2 * max(SIZE.grid.side_multiples)
NUM_FRAMES = 1 + SIZE.codec.temporal_stride
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Our weights folder and the diffusers folder made of it."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    dit = LoomVideoDiT(SIZE.dit)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.02)
    save_dit(dit, SIZE.dit, folder / "weights")
    (folder / "weights" / PIPELINE_FILE).write_text(json.dumps({"model": "tiny"}))
    write_folder(folder / "weights", SIZE, folder / "diffusers")
    return folder


@pytest.fixture(scope="module")
def ours(exported):
    return load_pipeline(ModelSource(str(exported / "weights"), kernels="eager"))


@pytest.fixture
def theirs(exported):
    pipeline = LoomVideoDiffusionPipeline.from_pretrained(exported / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    set_backend("eager")
    return pipeline


def clip():
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, SIDE, SIDE, 3), np.uint8)


def as_uint8(frames):
    return np.round(np.asarray(frames) * 255).astype(np.uint8)


@pytest.mark.slow
def test_a_fresh_process_opens_it_with_diffusers_alone(exported, ours):
    """No import of ours: what the folder says must be enough."""
    script = (
        "import sys, numpy, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        f"made = pipeline('a red dress', height={SIDE}, width={SIDE}, num_frames=1, num_inference_steps=2,\n"
        "                generator=torch.Generator().manual_seed(3))\n"
        "numpy.save(sys.argv[2], made.frames[0])\n"
    )
    out = exported / "frames.npy"
    environment = {**os.environ, "HF_MODULES_CACHE": str(exported / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(exported / "diffusers"), str(out)],
        capture_output=True, text=True, env=environment, cwd=exported, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = ours("a red dress", "t2i", size=(SIDE, SIDE), num_frames=1, steps=2, seed=3)
    difference = as_uint8(np.load(out)).astype(int) - expected
    assert np.abs(difference).max() <= 1  # another back end of the kernels


def test_an_edit_is_the_same_as_ours(ours, theirs):
    made = theirs("make it red", video=clip(), num_inference_steps=2, generator=torch.Generator().manual_seed(1))
    expected = ours("make it red", "video_edit", source=clip(), steps=2, seed=1)
    assert np.array_equal(as_uint8(made.frames[0]), expected)


def test_a_picture_from_words_takes_the_sizes_own_scale_and_shift(ours, theirs):
    options = {"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 3}
    made = theirs("a coat", generator=torch.Generator().manual_seed(1), **options)
    expected = ours("a coat", "t2i", size=(SIDE, SIDE), num_frames=1, steps=3, seed=1)
    assert np.array_equal(as_uint8(made.frames[0]), expected)


def test_several_videos_of_several_prompts_in_every_type(theirs):
    options = {"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 1}
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    arrays = theirs(["a dress", "a coat"], num_videos_per_prompt=2, generator=generators, **options).frames
    assert arrays.shape == (4, 1, SIDE, SIDE, 3)
    again = theirs("a coat", generator=torch.Generator().manual_seed(3), output_type="pil", **options).frames
    assert np.array_equal(np.asarray(again[0][0]), as_uint8(arrays[3, 0]))
    (tensors,) = theirs("a coat", generator=torch.Generator().manual_seed(3), output_type="pt", return_dict=False,
                        **options)  # fmt: skip
    assert np.array_equal(as_uint8(tensors[0].permute(0, 2, 3, 1)), as_uint8(arrays[3]))
    latents = theirs("a coat", output_type="latent", **options).frames
    assert latents.shape == (1, SIZE.dit.in_channels, *SIZE.grid.latent_shape(1, SIDE, SIDE))


def test_callbacks_change_and_stop(theirs):
    options = {"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 3, "output_type": "latent"}
    seen = []

    def stop(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep)))
        pipeline._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else {}

    theirs("a coat", callback_on_step_end=stop, **options)
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] > seen[1][1]
    zeroed = theirs("a coat", callback_on_step_end=lambda *call: {"latents": 0 * call[3]["latents"]}, **options)
    assert not zeroed.frames.any()


def test_the_negative_prompt_and_another_scheduler_change_the_result(theirs):
    options = {"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 2, "output_type": "latent"}

    def made(**changes):
        return theirs("a coat", generator=torch.Generator().manual_seed(0), **{**options, **changes}).frames

    first = made()
    assert not torch.equal(first, made(negative_prompt="blurry"))
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert not torch.equal(first, made())
    theirs.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler: integrates no flow"):
        made()


def test_saved_again_it_is_the_same_folder(exported, theirs, ours, tmp_path):
    theirs.save_pretrained(tmp_path / "again")
    indices = [json.loads((folder / "model_index.json").read_text())
               for folder in (tmp_path / "again", exported / "diffusers")]  # fmt: skip
    for index in indices:
        index.pop("tokenizer")  # its class has another name in transformers 5
    assert indices[0] == indices[1]
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for name, tensor in theirs.text_encoder.state_dict().items():
        assert torch.equal(tensor, again.text_encoder.state_dict()[name]), name


def test_a_distilled_model_stays_one(exported, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(exported / "weights", weights)
    stated = {"timesteps": [1000.0, 500.0]}
    (weights / PIPELINE_FILE).write_text(json.dumps({"model": "tiny", "few_steps": stated, "left_out": ["t2v"]}))
    write_folder(weights, SIZE, tmp_path / "diffusers")
    assert stated_left_out(tmp_path / "diffusers") == {"t2v"}
    options = {"height": SIDE, "width": SIDE, "num_frames": 1, "output_type": "latent"}
    seen = []
    theirs = LoomVideoDiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    theirs.set_progress_bar_config(disable=True)
    theirs("a coat", callback_on_step_end=lambda *call: seen.append(float(call[2])), **options)
    assert seen == stated["timesteps"]
    assert load_pipeline(ModelSource(str(tmp_path / "diffusers"))).num_steps(50) == 2


def test_our_commands_read_the_folder(exported):
    read = load_dit(exported / "diffusers")
    written = load_dit(exported / "weights")
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), written.parameters(), strict=True))
    assert ModelSource(str(exported / "diffusers")).size.name == "tiny"


def test_offloading_brings_parts_to_the_device(theirs, ours):
    """On the CPU both hooks run as on a GPU, to the device that is there."""
    options = {"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 1}
    expected = theirs("a coat", generator=torch.Generator().manual_seed(0), **options).frames
    theirs.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(theirs("a coat", generator=torch.Generator().manual_seed(0), **options).frames, expected)
    theirs.enable_sequential_cpu_offload(device="cpu")
    assert np.array_equal(theirs("a coat", generator=torch.Generator().manual_seed(0), **options).frames, expected)


def test_a_folder_that_holds_something_is_kept(exported):
    with pytest.raises(UserError, match="already holds files"):
        write_folder(exported / "weights", SIZE, Path(exported / "diffusers"))


@pytest.mark.slow
def test_published_parts_come_along_as_files(exported, tmp_path):
    """With a VAE of Wan and a Qwen3-VL in folders: linked, opened by their own libraries, tiled where asked."""
    published = dataclasses.replace(
        SIZE,
        codec=dataclasses.replace(
            SIZE.codec, kind="wan", spatial_stride=16, temporal_stride=4,
            folder=str(write_wan_vae(tmp_path / "vae", SIZE.dit.in_channels)),
        ),
        mllm=dataclasses.replace(
            SIZE.mllm, kind="qwen3_vl", folder=str(write_qwen3_vl(tmp_path / "qwen", SIZE.mllm))
        ),
    )  # fmt: skip
    write_folder(exported / "weights", published, tmp_path / "whole")
    assert (tmp_path / "whole/text_encoder/model.safetensors").samefile(tmp_path / "qwen/model.safetensors")
    pipeline = LoomVideoDiffusionPipeline.from_pretrained(tmp_path / "whole")
    pipeline.set_progress_bar_config(disable=True)
    set_backend("eager")
    options = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": 1}
    made = pipeline("a coat", generator=torch.Generator().manual_seed(0), **options).frames
    ours = LoomVideoPipeline(
        load_dit(exported / "weights"), build_codec(published.codec), FrozenMLLM.of_size(published), SIZE.scheduler,
        generate_scheduler=SIZE.generate_scheduler, default_guidance=SIZE.guidance,
    )  # fmt: skip
    assert np.array_equal(as_uint8(made[0]), ours("a coat", "t2i", size=(64, 64), steps=1))
    pipeline.enable_vae_tiling()
    with pipeline._pipeline.parts.use("codec") as codec:
        assert codec.memory_limit_bytes == TILED_BYTES
    with pytest.raises(UserError, match="codec_folder=: format=diffusers writes the whole model"):
        write_folder(exported / "weights", model_size("5b"), tmp_path / "no", allow=["*"])
