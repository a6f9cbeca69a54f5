import dataclasses

import pytest
import torch
from fixtures.datasets import make_sample, write_dataset

from loomvideo.model.flow import EPS
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.training import dit_recipe
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom

MODEL = model_size("tiny")


def stored(key="a", task="ref_edit", windows=2, tokens=5):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    channels, layers, dim = MODEL.dit.in_channels, MODEL.dit.num_layers, MODEL.dit.mllm_dim
    clip = {f"mean.{w}": random(channels, 2, 4, 4) for w in range(windows)}
    return ShardSample(
        key,
        {"task": task, "num_windows": windows, "mllm_index": list(range(windows))},
        {
            "target": clip | {"std.0": torch.full((channels, 2, 4, 4), 0.5).bfloat16()},
            "source": {f"mean.{w}": random(channels, 2, 4, 4) for w in range(windows)},
            "refs": {"mean.0": random(channels, 1, 2, 4)},
            "mllm": {
                f"{variant}.{w}": random(layers, tokens, dim) for w in range(windows) for variant in ("full", "visual")
            },
        },
    )


@pytest.fixture
def recipe():
    null = torch.zeros(MODEL.dit.num_layers, 3, MODEL.dit.mllm_dim)
    return LoomVideoRecipe("tiny", ObjectiveConfig(drop_all=0.0, drop_text=0.0), [null])


def example(recipe, visit=0, **objective):
    recipe.objective = dataclasses.replace(recipe.objective, **objective)
    return recipe.load_example(0, {}, stored(), SampleRandom(0, "a", visit))


def test_a_visit_is_a_function_of_seed_key_and_visit(recipe):
    first, again, next_visit = example(recipe, 0), example(recipe, 0), example(recipe, 1)
    assert torch.equal(first.sample.latents, again.sample.latents)
    assert first.sample.timestep == again.sample.timestep != next_visit.sample.timestep


def test_source_and_target_come_from_the_same_window(recipe):
    shard_sample = stored()
    windows = set()
    for visit in range(12):
        one = recipe.load_example(0, {}, shard_sample, SampleRandom(0, "a", visit))
        sources = shard_sample.tensors["source"]
        w = next(w for w in range(2) if torch.equal(one.sample.source, sources[f"mean.{w}"].float()))
        windows.add(w)
        assert torch.equal(one.sample.mllm_states, shard_sample.tensors["mllm"][f"full.{w}"])
        t = one.sample.source_scale
        # z_t and the velocity lie on one straight path: x0 = z_t - (eps + (1 - eps) t) / (1 - eps) ... solved for x0.
        noise_share = EPS + (1 - EPS) * t
        clean = (one.sample.latents * (1 - EPS) - noise_share * one.target) / ((1 - t) * (1 - EPS) + noise_share)
        expected = shard_sample.tensors["target"][f"mean.{w}"].float()
        if w == 1:  # window 0 has a posterior deviation and is sampled
            torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)
        else:
            assert 0.3 < (clean - expected).std().item() < 0.7
    assert windows == {0, 1}


def test_what_has_no_source_has_a_shift_of_its_own(recipe):
    """Dropped conditioning changes no shift: an edit without its source is still one."""

    def times(**objective):
        recipe.objective = dataclasses.replace(recipe.objective, shift_base_tokens=1, **objective)
        found = {}
        for task, members in (("edit", ("source", "target", "mllm")), ("words", ("target", "mllm"))):
            sample = stored(task="video_edit" if task == "edit" else "t2v")
            sample = dataclasses.replace(sample, tensors={name: sample.tensors[name] for name in members})
            draws = [SampleRandom(0, "a", visit) for visit in range(3)]
            found[task] = [recipe.load_example(0, {}, sample, draw).sample.timestep for draw in draws]
        return found

    same = times(shift_scale=6.0, shift_limit=20.0)
    assert same["edit"] == same["words"]
    own = times(generate_shift_limit=2.0)
    assert own["edit"] == same["edit"]
    # A shift multiplies t / (1 - t).
    ratios = [a * (1000 - b) / (b * (1000 - a)) for a, b in zip(own["edit"], own["words"], strict=True)]
    assert ratios == pytest.approx([10.0] * 3)
    assert times(drop_all=1.0)["edit"] == same["edit"]
    assert ObjectiveConfig(generate_shift_scale=0.0).shift(has_source=False) == (0.0, 64, 8.0)


def test_dropout_removes_all_conditioning_or_only_the_text(recipe):
    dropped = example(recipe, drop_all=1.0)
    assert dropped.sample.source is None
    assert not dropped.sample.references
    assert torch.equal(dropped.sample.mllm_states, recipe.null_states[0].bfloat16())
    textless = example(recipe, drop_all=0.0, drop_text=1.0)
    assert textless.sample.source is not None
    visual = stored().tensors["mllm"]
    assert any(torch.equal(textless.sample.mllm_states, visual[f"visual.{w}"]) for w in range(2))


def test_loss_is_the_squared_error_of_every_element_once(recipe):
    torch.manual_seed(0)
    pack = recipe.collate([example(recipe, 0), example(recipe, 1)]).to(torch.device("cpu"), torch.float32)
    model = recipe.build_model()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    out = recipe.loss(model, pack)
    expected = (model(pack.batch) - pack.target).square()
    torch.testing.assert_close(out.sum, expected.sum())
    torch.testing.assert_close(out.per_sample_sum.sum(), out.sum.detach())
    assert out.per_sample_elements.sum().item() == pack.num_loss_elements == expected.numel()
    assert [tag["task"] for tag in out.tags] == ["ref_edit", "ref_edit"]


def test_the_model_starts_alike_on_every_rank(recipe):
    first, second = recipe.build_model(), recipe.build_model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_stage_with_source_embedding_starts_from_one_without(tmp_path):
    first = LoomVideoRecipe("tiny", ObjectiveConfig(use_source_embedding=False), [])
    before = first.build_model().state_dict()
    first.export(before, tmp_path / "weights")
    second = LoomVideoRecipe("tiny", ObjectiveConfig(), [], initial_weights=str(tmp_path / "weights"))
    after = second.build_model().state_dict()
    assert {name for name in after if name not in before} == {
        "source_patch_embedding.weight",
        "source_patch_embedding.bias",
    }
    assert not after["source_patch_embedding.weight"].any()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_of_a_large_sample_only_what_the_visit_needs_is_read(tmp_path, monkeypatch):
    dit = MODEL.dit
    sizes = {"channels": dit.in_channels, "num_layers": dit.num_layers, "mllm_dim": dit.mllm_dim, "num_windows": 3}
    samples = [make_sample("edit", "ref_edit", num_references=1, deterministic=False, **sizes)]
    samples += [make_sample("text", "t2v", **sizes)]
    dataset = write_dataset(tmp_path, samples)
    recipe = LoomVideoRecipe("tiny", ObjectiveConfig(drop_all=0.2, drop_text=0.4), [dataset.shared()["null"]])
    variants = set()
    for number, row in enumerate(dataset.index.to_pylist()):
        for visit in range(12):
            random = SampleRandom(0, row["key"], visit)
            whole = recipe.read(dataset, number, row, random)
            monkeypatch.setattr(dit_recipe, "WHOLE_READ_BYTES", 0)
            part = recipe.read(dataset, number, row, random)
            monkeypatch.undo()
            assert set(part.tensors["target"]) <= {f"{kind}.{w}" for kind in ("mean", "std") for w in range(3)}
            assert sum(name.startswith("mean.") for name in part.tensors["target"]) == 1
            variants.add(frozenset(name.split(".")[0] for name in part.tensors["mllm"]))
            one, other = (recipe.load_example(0, row, sample, random) for sample in (whole, part))
            assert torch.equal(one.sample.latents, other.sample.latents)
            assert torch.equal(one.sample.mllm_states, other.sample.mllm_states)
            assert len(one.sample.references) == len(other.sample.references)
            level = recipe.load_validation_example(0, row, part, random, 0.5)
            assert torch.equal(level.sample.mllm_states, whole.tensors["mllm"][next(iter(_full(part)))])
    assert variants == {frozenset({"full"}), frozenset({"full", "visual"})}


def _full(sample):
    return [name for name in sample.tensors["mllm"] if name.startswith("full.")]


def test_a_replaced_kernel_is_a_warning_of_the_run(monkeypatch):
    recipe = LoomVideoRecipe("tiny", ObjectiveConfig(), [])
    assert recipe.warnings() == []
    monkeypatch.setattr(dit_recipe.kernels_in_use, "report", lambda: {"replaced": {"cpp.rms_norm": "it is wrong"}})
    assert recipe.warnings() == ["kernel cpp.rms_norm is replaced by eager: it is wrong"]
