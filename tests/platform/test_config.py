import dataclasses

import pytest

from loomvideo.platform.config import document_keys, flatten, load_config, option, to_yaml
from loomvideo.platform.errors import UserError


@dataclasses.dataclass
class Train:
    lr: float = option(1e-4, "learning rate")
    weights: dict[str, float] = option({}, "task weights")
    sizes: list[int] = option([1, 2], "sizes")
    limit: int | None = option(None, "limit")


@dataclasses.dataclass
class Job:
    out: str = option("???", "output folder")
    train: Train = option(Train, "training")


def test_values_come_from_defaults_then_preset_then_command_line(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("train:\n  lr: 0.5\n  sizes: [3]\n")
    config = load_config(Job, ["out=x", "train.lr=1e-3", "train.weights.t2v=2"], preset)
    assert config == Job(out="x", train=Train(lr=1e-3, weights={"t2v": 2.0}, sizes=[3]))
    assert flatten(config)["train.lr"] == 1e-3
    assert "lr: 0.001" in to_yaml(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=x", "train.rl=1"], "unknown key train.rl; did you mean train.lr"),
        (["out=x", "tarin.lr=1"], "unknown key tarin.lr; did you mean train.lr"),
        (["out=x", "train.lr=fast"], "train.lr='fast' has the wrong type, expected float"),
        (["out=x", "train.limit=[1]"], "train.limit"),
        (["train.lr=1"], "set out="),
        (["verbose"], "expected section.key=value"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(Job, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_preset_names_the_file(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("train: {lrr: 1}\n")
    with pytest.raises(UserError, match=r"p\.yaml: unknown key train\.lrr"):
        load_config(Job, ["out=x"], preset)
    with pytest.raises(UserError, match="not found"):
        load_config(Job, ["out=x"], tmp_path / "absent.yaml")


def test_every_key_is_documented():
    assert document_keys(Job)[0] == ("out", "required", "output folder")
    assert ("train.lr", "0.0001", "learning rate") in document_keys(Job)
