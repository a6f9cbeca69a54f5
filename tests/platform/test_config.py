import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from fixtures.texts import AS_TYPED

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


@dataclasses.dataclass
class Texts:
    prompt: str = option("", "text")
    note: str | None = option(None, "text or none")
    refs: list[str] = option([], "texts")
    numbers: list[int] = option([], "numbers")
    rate: float = option(1.0, "number")
    flag: bool = option(True, "boolean")
    data: dict[str, str] = option({}, "name to text")
    anything: dict[str, Any] = option({}, "whatever")


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_arrives_exactly_as_typed_and_survives_its_file(text, tmp_path):
    config = load_config(Texts, [f"prompt={text}", f"data.suite={text}", *([] if text == "null" else [f"note={text}"])])
    assert config.prompt == text
    assert config.data == {"suite": text}
    assert config.note == (None if text == "null" else text)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(Texts, [], file) == config
    assert flatten(config)["prompt"] == text


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[]", []),
        ("", []),
        ("photo.png", ["photo.png"]),
        ("[a.png,b #3.png , @c.png]", ["a.png", "b #3.png", "@c.png"]),
        ("[12:30,off,007,&co.png,*x]", ["12:30", "off", "007", "&co.png", "*x"]),
        ("[\"a,b.png\", 'it''s']", ["a,b.png", "it's"]),
    ],
)
def test_lists_of_text_are_taken_as_typed(text, items):
    assert load_config(Texts, [f"refs={text}"]).refs == items


def test_other_values_follow_their_declared_type():
    config = load_config(
        Texts, ["numbers=[1, 2]", "rate=1e-3", "flag=off", "anything.a=12:30", "anything.b=[1, x]", "anything.c.d='7'"]
    )
    assert (config.numbers, config.rate, config.flag) == ([1, 2], 1e-3, False)
    assert config.anything == {"a": "12:30", "b": [1, "x"], "c": {"d": "7"}}
    assert load_config(Texts, ["numbers=5"]).numbers == [5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refs=[a.png", "does not end in ]"),
        ("anything.a={x", "anything.a="),
        ("rate=12:30", "rate='12:30' has the wrong type"),
        ("prompt=???", "stands for a value that is missing"),
        ("prompt=\udce4", "is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_line(override, message):
    with pytest.raises(UserError) as caught:
        load_config(Texts, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["prompt: sale: x", "prompt: 'open", "- a", "{", "prompt: a\nprompt: b", b"\xff\xfe\x00"]
)
def test_a_preset_that_is_no_yaml_is_one_line(text, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"preset file .*p\.yaml") as caught:
        load_config(Texts, [], file)
    assert "\n" not in str(caught.value)


def test_text_in_a_preset_keeps_what_was_written(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("prompt: 007\nrefs: [off, 12:30]\ndata: {a: 1.50}\nrate: 1e-4\nnote: ~\n")
    assert load_config(Texts, [], file) == Texts("007", None, ["off", "12:30"], [], 1e-4, True, {"a": "1.50"})


@dataclass
class Labels:
    selector: dict[str, str] = option({}, "labels")


@dataclass
class WithLabels:
    head: Labels = option(Labels, "")


def test_names_with_dots_are_one_key_of_a_mapping(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("head:\n  selector: {cloud.google.com/gke-nodepool: gpu, plain: '7'}\n")
    overrides = ["head.selector.eks.amazonaws.com/role-arn=arn:aws:iam::1:role/r"]
    expected = {"cloud.google.com/gke-nodepool": "gpu", "plain": "7"}
    expected |= {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/r"}
    assert load_config(WithLabels, overrides, file).head.selector == expected
