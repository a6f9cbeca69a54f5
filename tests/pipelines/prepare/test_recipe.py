"""What a dataset depends on: weights by content, the kind of device, and the input as it was read last."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.model.sizes import model_size, with_folders
from loomvideo.pipelines.prepare import inputs
from loomvideo.pipelines.prepare.encode import encoder_identity
from loomvideo.pipelines.prepare.job import UP_TO_DATE, prepare
from loomvideo.pipelines.sources.samples import write_jsonl


def test_weights_count_by_content_and_not_by_path(tmp_path, caplog):
    def identity(codec, on_gpu=True):
        return encoder_identity(with_folders(model_size("5b"), str(codec), ""), on_gpu)

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    assert identity(tmp_path / "a") != identity(tmp_path / "a", on_gpu=False)
    (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")
    assert identity(tmp_path / "a") != identity(tmp_path / "b")
    assert caplog.text == ""
    identity(tmp_path / "nowhere")
    assert "not on this machine" in caplog.text


def test_the_patch_counts():
    tiny = model_size("tiny")
    other = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, patch_size=(1, 2, 2)))
    assert encoder_identity(tiny, False) != encoder_identity(other, False)


def test_the_version_of_made_weights_counts(monkeypatch):
    tiny, published = model_size("tiny"), model_size("5b")
    before = encoder_identity(tiny, False), encoder_identity(published, False)
    monkeypatch.setattr("loomvideo.pipelines.prepare.encode.RECIPE_VERSION", "another")
    assert encoder_identity(tiny, False) != before[0]
    assert encoder_identity(published, False) == before[1]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    samples = raw_samples(tmp_path / "raw", 4)
    config = prepare_config(tmp_path / "raw", tmp_path / "out")
    prepare(config)
    return config, samples


def test_a_sample_file_that_has_not_changed_is_not_read_again(prepared, monkeypatch):
    config, samples = prepared
    with monkeypatch.context() as patched:
        patched.setattr(inputs, "open_source", None)
        assert prepare(config).reason == UP_TO_DATE
    write_jsonl(samples[:3], Path(config.input))
    assert prepare(config).summary()["written"] == 3


def test_media_are_looked_at_though_the_sample_file_is_not(prepared):
    config, samples = prepared
    target = Path(config.input).parent / samples[1].target
    target.write_bytes(target.read_bytes() + b" ")
    assert "media files changed" in prepare(config).reason
