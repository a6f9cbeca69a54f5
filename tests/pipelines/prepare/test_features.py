"""Features in eight bits and as MLLM inputs."""

import pytest
import torch
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.config import FeatureOptions
from loomvideo.pipelines.prepare.features import FeatureError, combined_error, stored_members, streamed_inputs
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.layers import expanded, nearest
from loomvideo.platform.shards.quantize import dequantize, quantize
from loomvideo.platform.shards.reader import ShardDataset

LAST = model_size("tiny").dit.num_layers - 1


@pytest.mark.parametrize(("dtype", "bound"), [("fp8", 0.04), ("int8", 0.02), ("bf16", 0.004)])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 3e3])
def test_error_does_not_depend_on_magnitude(dtype, bound, magnitude):
    states = torch.randn(3, 50, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    values, scale = quantize(states, dtype)
    assert values.element_size() == (2 if dtype == "bf16" else 1)
    error = (dequantize(values, scale, torch.float32) - states).norm(dim=-1) / states.norm(dim=-1)
    assert error.max() < bound


def test_rows_of_zeros_and_outliers_stay_finite():
    states = torch.zeros(1, 2, 4096)
    states[0, 1, 7] = 1e4  # all energy in one channel: 64 times the RMS
    for dtype in ("fp8", "int8"):
        restored = dequantize(*quantize(states, dtype), torch.float32)
        assert torch.isfinite(restored).all()
        assert restored[0, 1, 7] == pytest.approx(1e4, rel=0.01)
        assert not restored[0, 0].any()


def test_measured_error_is_the_mean_over_tokens():
    states = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1))
    parts = {"full.0": states[:, :3], "visual.0": states[:, 3:]}
    error = FeatureError(64)
    whole = error.measure({"full.0": states}, stored_members({"full.0": states}, "int8"))
    values, scale = quantize(states, "int8")
    expected = ((dequantize(values, scale) - states).norm(dim=-1) / states.norm(dim=-1)).mean(1)
    assert whole["layers"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert error.measure(parts, stored_members(parts, "int8")) == whole
    each = [error.measure({"full.0": part}, stored_members({"full.0": part}, "int8")) for part in parts.values()]
    combined = combined_error([*each, None])
    assert combined["tokens"] == 10
    assert combined["layers"] == pytest.approx(whole["layers"], abs=2e-6)
    assert combined["embedder"] == pytest.approx(whole["embedder"], abs=2e-6)


def test_layers_that_are_not_stored_are_read_as_the_nearest():
    assert nearest([0, 3], 4) == [0, 0, 1, 1]
    assert nearest([2], 4) == [0, 0, 0, 0]
    assert nearest([1, 3], 5) == [0, 0, 0, 1, 1]
    states = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(2))
    members = stored_members({"full.0": states}, "bf16", [0, 3])
    assert members["full.0"].shape == (2, 5, 64)
    read = expanded(members, [0, 3], 4)["full.0"]
    assert torch.equal(read, states[[0, 0, 3, 3]].bfloat16())
    error = FeatureError(64).measure({"full.0": states}, members, [0, 3])["layers"]
    assert error[0] < 0.01
    assert error[1] > 1.0
    assert error[3] < 0.01


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """One raw dataset prepared in several ways."""
    folder = tmp_path_factory.mktemp("features")
    raw_samples(folder / "raw", 6)
    opened = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        for mode, dtype in (("stored", "bf16"), ("stored", "fp8"), ("stored", "int8"), ("streamed", "bf16"),
                            ("text", "bf16")):  # fmt: skip
            output = folder / f"{mode}-{dtype}"
            prepare(prepare_config(folder / "raw", output, features=FeatureOptions(mode=mode, dtype=dtype)))
            opened[mode, dtype] = ShardDataset.open(output)
    return folder, opened


@pytest.mark.parametrize(("dtype", "bound"), [("fp8", 0.04), ("int8", 0.03)])
def test_eight_bits_in_shards(datasets, dtype, bound):
    _, opened = datasets
    exact, small = opened["stored", "bf16"], opened["stored", dtype]
    error = small.manifest.features["error"]
    assert 0 < max(error["layers"]) < bound
    assert 0 < error["embedder"] < 2 * bound
    for row in range(len(exact)):
        one, other = exact.read(row), small.read(row)
        assert set(one.tensors["mllm"]) == set(other.tensors["mllm"])
        full, restored = one.tensors["mllm"]["full.0"].float(), other.tensors["mllm"]["full.0"]
        assert restored.dtype == torch.bfloat16
        assert ((restored.float() - full).norm() / full.norm()) < bound
        chosen = small.read(row, select=lambda member, name: name == "full.0")
        assert torch.equal(chosen.tensors["mllm"]["full.0"], restored)


def test_streamed_inputs_give_the_stored_features(datasets):
    _, opened = datasets
    mllm = FrozenMLLM.of_size(model_size("tiny"))
    stored, streamed = opened["stored", "bf16"], opened["streamed", "bf16"]
    for row in range(len(stored)):
        one, other = stored.read(row), streamed.read(row)
        assert other.metadata["features"] == "streamed"
        assert all(t.dtype in (torch.uint8, torch.int64) for t in other.tensors["mllm"].values())
        names = sorted(one.tensors["mllm"])
        inputs = [
            streamed_inputs(other.tensors["mllm"], int(name.split(".")[1]), name.split(".")[0], mllm.processor)
            for name in names
        ]
        for name, states in zip(names, mllm.encode(inputs), strict=True):
            torch.testing.assert_close(states.bfloat16(), one.tensors["mllm"][name], atol=0.02, rtol=0.02)


def test_text_mode_stores_text_only(datasets):
    _, opened = datasets
    dataset = opened["text", "bf16"]
    for row in range(len(dataset)):
        sample = dataset.read(row)
        has_media = "source" in sample.tensors or "refs" in sample.tensors
        assert sample.metadata["features"] == ("streamed" if has_media else "stored")


def test_the_error_budget_stops_the_run(datasets, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    config = prepare_config(datasets[0] / "raw", tmp_path, features=FeatureOptions(dtype="fp8", max_error=0.001))
    with pytest.raises(UserError, match=r"features.dtype=fp8: relative error 0.0\d+ in a layer"):
        prepare(config)


def test_a_layer_subset_is_smaller_and_reads_as_all_layers(datasets, tmp_path, monkeypatch):
    folder, opened = datasets
    without_ray(monkeypatch)
    features = FeatureOptions(layers=[0, LAST], max_error=2.0)
    config = prepare_config(folder / "raw", tmp_path / "out", features=features)
    prepare(config)
    whole, some = opened["stored", "bf16"], ShardDataset.open(tmp_path / "out")
    assert some.manifest.features["layers"] == [0, LAST]
    assert some.manifest.features["error"]["tokens"] > 0
    nearest_stored = [0 if layer <= LAST - layer else LAST for layer in range(LAST + 1)]
    for row in range(len(whole)):
        one, other = whole.read(row).tensors["mllm"], some.read(row).tensors["mllm"]
        assert {name: tensor[nearest_stored].tolist() for name, tensor in one.items()} == {
            name: tensor.tolist() for name, tensor in other.items()
        }
    sizes = [sum(shard.num_bytes for shard in dataset.manifest.shards) for dataset in (whole, some)]
    assert sizes[1] < 0.85 * sizes[0]
    config.features.layers = [LAST, 0]
    with pytest.raises(UserError, match=rf"features\.layers=\[{LAST}, 0\]: .* ascending, from 0 to {LAST}"):
        prepare(config)
