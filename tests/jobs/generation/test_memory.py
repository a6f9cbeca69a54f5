"""What --dry-run says of memory, and that requests are made in the way that is chosen."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from loomvideo.jobs.cli import app
from loomvideo.jobs.generation.config import GenerateConfig
from loomvideo.jobs.weights.model_choice import model_source
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.loading import fitted
from loomvideo.model.parts import ResidentParts, SequentialParts
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.memory import largest_work
from loomvideo.pipelines.generation.requests import Request
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = model_size("tiny").dit
    save_dit(LoomVideoDiT(config), config, folder)
    return folder


def config(weights, **changes):
    base = GenerateConfig(checkpoint=str(weights), model="tiny", kernels="eager", buckets=[64], num_frames=5, steps=1)
    return dataclasses.replace(base, default_size=[64, 64], **changes)


def test_dry_run_prints_every_mode_and_the_choice(weights):
    result = CliRunner().invoke(
        app, ["generate", "--dry-run", f"checkpoint={weights}", "model=tiny", "memory_gib=8", "task=t2v", "prompt=x",
              "out=x.mp4"], terminal_width=200)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output.count("sequential") == 4
    assert "memory=auto takes resident" in result.output


def test_the_largest_request_decides(weights):
    requests = [Request("t2i", "x", "a.png"), Request("ref_edit", "x", "b.mp4", "s.mp4", ["r.png"] * 2)]
    work = largest_work(model_size("5b"), config(weights, buckets=[640], num_frames=97), requests)
    assert (work.task, work.num_frames, len(work.references)) == ("ref_edit", 97, 2)
    with pytest.raises(UserError, match="bucket classes"):
        largest_work(model_size("5b"), config(weights, buckets=[641]), requests)


def test_published_sizes_take_what_fits(weights):
    work = largest_work(model_size("5b"), config(weights, buckets=[640], num_frames=97))
    source = dataclasses.replace(model_source(config(weights)), model="5b", device="cuda")
    modes = [fitted(dataclasses.replace(source, memory_bytes=gib * 2**30), work).memory for gib in (80, 23, 10)]
    assert modes == ["resident", "sequential", "offload"]


def test_little_memory_gives_the_same_frames(weights, tmp_path):
    frames = []
    for memory, kind in (("resident", ResidentParts), ("offload", SequentialParts)):
        settings = config(weights, memory=memory)
        generator = FileGenerator.load(model_source(settings), settings)
        try:
            assert type(generator.pipeline.parts) is kind
            frames.append(generator.generate(Request("t2i", "a red dress", str(tmp_path / f"{memory}.png"))))
        finally:
            generator.close()
    first, second = (np.asarray(Image.open(path)) for path in frames)
    assert np.array_equal(first, second)
