import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from loomvideo.jobs.cli import app
from loomvideo.model.sizes import model_size
from loomvideo.model.weights import expected_shapes, load_dit
from loomvideo.platform.errors import UserError


def run(*arguments):
    result = CliRunner().invoke(app, ["weights", *map(str, arguments)], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture
def gen_model(tmp_path):
    state = {name: torch.randn(shape) for name, shape in expected_shapes(model_size("tiny").dit).items()}
    state["condition_embedder.text_embedder.linear_1.weight"] = torch.zeros(256, 16)
    torch.save(state, tmp_path / "gen_model.pth")
    return tmp_path / "gen_model.pth"


def test_inspect_tells_what_fits(gen_model):
    output = run("inspect", gen_model, "model=tiny")
    assert "published" in output
    assert "4,096 (text embedder, 1 tensors)" in output
    assert "keys        all fit" in output


def test_inspect_names_every_key_that_does_not_fit(gen_model):
    output = run("inspect", gen_model, "model=tiny", "source=false")
    assert "unexpected  source_patch_embedding.weight" in output
    assert "misshapen   proj_out.weight" in run("inspect", gen_model, "model=small")


def test_convert_writes_a_folder_that_loads_alone(gen_model, tmp_path):
    run("convert", gen_model, tmp_path / "weights", "model=tiny", "dtype=bfloat16")
    model = load_dit(tmp_path / "weights", dtype=None)
    assert model.config == model_size("tiny").dit
    expected = torch.load(gen_model, weights_only=True)["proj_out.weight"].bfloat16()
    assert torch.equal(model.proj_out.weight, expected)
    assert "num_layers" in run("inspect", tmp_path / "weights")


def test_convert_to_stage_1(gen_model, tmp_path):
    with pytest.raises(UserError, match="source_patch_embedding"):
        run("convert", gen_model, tmp_path / "a", "model=tiny", "source=false")
    run("convert", gen_model, tmp_path / "a", "model=tiny", "source=false", "allow=source_patch_embedding.*")
    assert load_dit(tmp_path / "a").config == dataclasses.replace(model_size("tiny").dit, use_source_embedding=False)


@pytest.mark.parametrize("argument", ["dtype=int8", "model=huge", "colour=red", "source=maybe"])
def test_mistakes_are_named(gen_model, tmp_path, argument):
    with pytest.raises(UserError, match=argument.split("=")[0]):
        run("convert", gen_model, tmp_path / "b", "model=tiny", argument)
