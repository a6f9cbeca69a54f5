"""One loader: everything that generates computes with the kernels, codec, MLLM and negative prompt of its size."""

import json
import shutil

import pytest
import torch

from loomvideo.model import kernels
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.loading import ModelSource
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline, pipeline_around
from loomvideo.model.sizes import ENCODERS_KEY, PIPELINE_FILE, model_size
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.evaluation.pipeline_generator import (
    ModelGenerator,
    ModelOptions,
    SamplerSettings,
    model_fingerprint,
)
from loomvideo.platform.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = model_size("tiny").dit
    save_dit(LoomVideoDiT(config), config, folder)
    return folder


def test_from_pretrained_is_the_loader(weights):
    with kernels.use_backend("eager"):
        ours = LoomVideoPipeline.from_pretrained(weights, "tiny", kernels="eager", device="cpu")
        again = load_pipeline(ModelSource(str(weights), "tiny", kernels="", device="cpu"))
        around = pipeline_around(ours.dit, model_size("tiny"))
        made = [pipeline("a red dress", "t2i", size=(64, 64), steps=1) for pipeline in (ours, again, around)]
    assert (made[0] == made[1]).all()
    assert (made[0] == made[2]).all()


def test_evaluation_computes_with_the_kernels_it_is_told(weights):
    source = ModelSource(str(weights), "tiny", kernels="eager", device="cpu")
    options = ModelOptions(source)
    generator = ModelGenerator(options, model_fingerprint(options))
    with kernels.use_backend("eager"):
        kernels.set_backend("cpp")
        assert isinstance(generator.pipeline, LoomVideoPipeline)
        assert kernels.report()["requested"] == "eager"
    other = ModelOptions(ModelSource(str(weights), "tiny", kernels="cpp", device="cpu"))
    assert model_fingerprint(other) != generator.fingerprint
    assert model_fingerprint(ModelOptions(source, SamplerSettings(negative_prompt="blurry"))) != generator.fingerprint


def test_codec_and_mllm_are_told_apart_by_content_and_not_by_place(weights, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def found(codec_folder):
        return model_fingerprint(ModelOptions(ModelSource(str(weights), codec_folder=str(codec_folder))))

    first = found(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert found(moved) == first
    (moved / "config.json").write_text("[]")
    assert found(moved) != first
    with pytest.raises(UserError, match=r"generation\.codec_folder=.*vae: no such folder"):
        found(folder)


def test_a_folder_that_does_not_say_its_size(weights):
    with pytest.raises(UserError, match="name its size with model="):
        load_pipeline(ModelSource(str(weights)))


@pytest.mark.parametrize("memory", ["resident", "sequential"])
def test_another_mllm_than_in_training_is_said_once(weights, tmp_path, caplog, memory):
    folder = shutil.copytree(weights, tmp_path / "w")
    source = ModelSource(str(folder), "tiny", kernels="", device="cpu", memory=memory)
    with load_pipeline(source).parts.use("mllm") as mllm:
        own = mllm.fingerprint
    (folder / PIPELINE_FILE).write_text(json.dumps({"model": "tiny", ENCODERS_KEY: {"mllm": own}}))
    parts = load_pipeline(source).parts
    with parts.use("mllm"), parts.use("codec"):
        assert not caplog.records
    (folder / PIPELINE_FILE).write_text(json.dumps({"model": "tiny", ENCODERS_KEY: {"mllm": "another"}}))
    parts = load_pipeline(source).parts
    for name in ("mllm", "codec", "mllm"):
        with parts.use(name):
            pass
    (said,) = caplog.messages
    assert said.startswith(f"{folder}: trained with mllm another, and this one is {own}: results may be worse")


def test_a_source_for_other_folders_names_every_file_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    near = ModelSource("weights", codec_folder="vae", mllm_folder="", lora=("a.safetensors:0.5", "b.safetensors"))
    far = near.absolute()
    assert (far.weights, far.codec_folder, far.mllm_folder) == (f"{tmp_path}/weights", f"{tmp_path}/vae", "")
    assert far.lora == (f"{tmp_path}/a.safetensors:0.5", f"{tmp_path}/b.safetensors")
    assert far.absolute() == far
