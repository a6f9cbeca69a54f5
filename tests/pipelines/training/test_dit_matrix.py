"""The real transformer (tiny) under ZeRO on gloo ranks, nothing kept gathered, against a plain PyTorch loop."""

import dataclasses
import functools

import pytest
import torch
from fixtures.datasets import make_sample, write_dataset
from fixtures.dit_samples import random_model
from helpers.plain_loop import plain_training
from helpers.ranks import Scenario, run_ranks, steps_of, train_scenarios
from helpers.small_dit import DIT, SmallRecipe

from loomvideo.model.config import LoRAConfig
from loomvideo.model.weights import save_dit
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.beside import load_checkpoint_weights
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.gradients import PROBE_STEP
from loomvideo.platform.training.packing import planner_of
from loomvideo.platform.training.validation import Validator

# Twenty trainings of the real transformer share two processes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_STEPS, STOP_STEP = 4, 2
LORA = LoRAConfig(rank=2, alpha=4.0, dora=True, targets=["blocks.*"], unfreeze=["proj_out.*"])


def config(**changes):
    """Uneven packs in two micro-steps, clipping, weight decay and averaging; every parameter partitioned."""
    result = TrainingConfig(steps=NUM_STEPS, precision="fp32", seed=3, log_every=1)
    result.pack.tokens, result.pack.per_step = 40, 3
    result.optimizer = dataclasses.replace(
        result.optimizer, learning_rate=2e-3, warmup_steps=2, clip_norm=0.5, weight_decay=0.1
    )
    result.ema.decay = 0.9
    result.zero.persistence_elements = 0
    result.checkpoint = dataclasses.replace(result.checkpoint, every_steps=2, keep_last=10, wait_s=600.0)
    return dataclasses.replace(result, **changes)


def changed(section, **values):
    """The same with values of one section changed."""
    result = config()
    return dataclasses.replace(result, **{section: dataclasses.replace(getattr(result, section), **values)})


HPZ = dataclasses.replace(changed("zero", hpz_partition_size=2), precision="bf16")
HPZ.validation = dataclasses.replace(HPZ.validation, every_steps=2, samples_per_task=1, levels=2)
OFFLOAD = changed("zero", offload_optimizer=True)
OFFLOAD.pack.per_step = 6
SHARED = config(sequence_ranks=2)
SHARED.validation = dataclasses.replace(SHARED.validation, every_steps=2, samples_per_task=1, levels=2)
PROBED = config(steps=PROBE_STEP + 3)
PROBED.checkpoint.every_steps = PROBED.steps
STILL = dataclasses.replace(changed("optimizer", learning_rate=0.0, weight_decay=0.0), precision="bf16", steps=1)
CONFIGS = {
    "fp32": config(),
    "bf16": config(precision="bf16"),
    "gathered": changed("zero", persistence_elements=10**9),
    "stage_2": changed("zero", stage=2),
    "stage_2_bf16": dataclasses.replace(changed("zero", stage=2), precision="bf16"),
    "recompute_full": config(activation_checkpointing="full"),
    "recompute_selective": config(activation_checkpointing="selective"),
    "hpz": HPZ,
    "shared": SHARED,
    "shared_full": dataclasses.replace(SHARED, activation_checkpointing="full"),
    "offload": OFFLOAD,
}


@dataclasses.dataclass
class Runs:
    """What two ranks did: recipes, folders and outcomes by scenario."""

    root: object
    url: str
    recipes: dict
    outcomes: dict

    def checkpoint(self, name, step=None):
        return CheckpointFolder(self.root / name / "checkpoints").open(step)


def _wanted(request):
    """The scenarios of the tests that were selected, so that one of them can be tried in seconds."""
    tests = [item for item in request.session.items if item.module is request.module]
    wanted = {name for item in tests for name in NEEDS.get(item.originalname, ())}
    wanted |= {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")}
    resumed = [item for item in tests if item.originalname == "test_resume_is_bitwise"]
    return wanted | {f"{item.callspec.params['name']}_resumed" for item in resumed}


NEEDS = {
    "test_validation_leaves_training_with_node_copies_alone": ("hpz", "bf16"),
    "test_ranks_that_share_packs_validate_as_others": ("shared", "shared_full"),
    "test_real_conditioning_passes_the_check_after_the_first_steps": ("probed",),
    "test_float32_weights_become_masters_without_rounding": ("still",),
    "test_checkpoints_of_adapters_name_their_base": ("adapted",),
    "test_three_ranks_continue_what_two_began": ("offload", "adapted"),
}
"""Scenarios that a test reads beside the one it is named for."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("runs")
    sizes = {"channels": DIT.in_channels, "num_layers": DIT.num_layers, "mllm_dim": DIT.mllm_dim}
    samples = [
        make_sample(
            f"s{number}",
            task=("video_edit", "t2v", "ref_edit")[number % 3],
            latent_shape=(1 + number % 2, 4, 4),
            num_references=number % 3 // 2,
            split="heldout" if number < 3 else "train",
            seed=number,
            **sizes,
        )
        for number in range(48)
    ]
    dataset = write_dataset(root / "data", samples)
    save_dit(random_model(DIT), DIT, root / "weights")
    null = [torch.zeros(DIT.num_layers, 3, DIT.mllm_dim)]
    full = functools.partial(SmallRecipe, ObjectiveConfig(), null, str(root / "weights"), 5)
    adapted = functools.partial(full, lora=LORA)
    # A sample that is drawn first in step 3, when there is a checkpoint to return to.
    planner = planner_of(full(), [dataset], config(), 3)
    steps = [{draw.key for pack in planner.next_step() for draw in pack} for _ in range(3)]
    bad_key = min(steps[2] - steps[0] - steps[1])
    next(s for s in samples if s.key == bad_key).tensors["target"]["mean.0"].fill_(float("nan"))
    write_dataset(root / "nan", samples)
    recipes = dict.fromkeys(CONFIGS, full) | {"adapted": adapted, "adapted_bf16": adapted}
    configs = CONFIGS | {"adapted": config(), "adapted_bf16": config(precision="bf16")}

    def scenario(name, config, recipe=full, data="data", **options):
        return Scenario(
            str(root / name), config, str(root / data), recipe=recipe, open_dataset=ShardDataset.open, **options
        )

    def resumed(name):
        return scenario(
            f"{name}_resumed", configs[name], recipes[name], copy_from=str(root / name), from_step=STOP_STEP
        )

    scenarios = {name: scenario(name, configs[name], recipes[name]) for name in configs if name != "hpz"}
    scenarios |= {f"{name}_resumed": resumed(name) for name in ("offload", "adapted")}
    scenarios["still"] = scenario("still", STILL)
    scenarios["probed"] = scenario("probed", PROBED)
    for name, zero in (("nan", config().zero), ("nan_offload", OFFLOAD.zero), ("nan_stage_2", CONFIGS["stage_2"].zero)):
        bad = config(zero=zero)
        bad.guard = dataclasses.replace(bad.guard, max_skips=0, max_rollbacks=9)
        scenarios[name] = scenario(name, bad, data="nan")
    wanted = _wanted(request)
    # DeepSpeed makes groups for hpZ once a process, and then uses them for every engine: it comes last in each.
    first = {name: scenarios[name] for name in scenarios if name in wanted}
    first |= {"hpz": scenario("hpz", HPZ)} if "hpz" in wanted else {}
    second = {"hpz_resumed": resumed("hpz")} if "hpz_resumed" in wanted else {}
    by_name = {}
    for part in filter(None, (first, second)):
        together = run_ranks(train_scenarios, 2, list(part.values()))
        by_name |= {name: [rank[number] for rank in together] for number, name in enumerate(part)}
    return Runs(root, str(root / "data"), recipes, by_name), configs


@pytest.mark.parametrize("name", [*CONFIGS, "adapted", "adapted_bf16"])
def test_equals_a_plain_loop(runs, name):
    runs, configs = runs
    exact = configs[name].precision == "fp32"
    recipe = runs.recipes[name]()
    expected, weights, average = plain_training(configs[name], recipe, ShardDataset.open(runs.url))
    reports, final = runs.outcomes[name][0]
    assert final["steps"] == NUM_STEPS
    for record, (loss, norm) in zip(steps_of(reports), expected, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4 if exact else 1e-2)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-3 if exact else 5e-2)
    checkpoint = runs.checkpoint(name)
    # Adam's first steps are the learning rate times a sign: where a gradient is almost zero, bf16 may turn it.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if exact else {"rtol": 0.0, "atol": 2.5 * NUM_STEPS * 2e-3}
    for kind, values in (("master", weights), ("ema", average)):
        stored = checkpoint.weights(kind, recipe.open_base(checkpoint.base))
        for key, value in values.items():
            torch.testing.assert_close(stored[key], value, **tolerance)
            if not exact:
                assert (stored[key] - value).square().mean().sqrt() < 2e-3


@pytest.mark.parametrize("name", ["hpz", "offload", "adapted"])
def test_resume_is_bitwise(runs, name):
    """With hpZ too: the copies inside a node are of the weights read, not of those the model began with."""
    runs, _ = runs
    whole, resumed = (steps_of(runs.outcomes[run][0][0]) for run in (name, f"{name}_resumed"))
    exact = ("step", "loss", "grad_norm", "keys_digest")
    assert [[r[e] for e in exact] for r in resumed] == [[r[e] for e in exact] for r in whole[STOP_STEP:]]
    ends = [runs.checkpoint(run, NUM_STEPS) for run in (name, f"{name}_resumed")]
    for kind in ends[0].kinds:
        for parameter in ends[0].slices[kind]:
            assert torch.equal(ends[0].weights(kind)[parameter], ends[1].weights(kind)[parameter])


def test_validation_leaves_training_with_node_copies_alone(runs):
    """EMA and weights change places and back; bf16 losses of the step after are those without validation."""
    runs, _ = runs
    hpz, plain = (steps_of(runs.outcomes[name][0][0]) for name in ("hpz", "bf16"))
    assert [r["loss"] for r in hpz] == [r["loss"] for r in plain]
    losses = [m["losses"] for m in runs.outcomes["hpz"][0][0] if m["event"] == "validation"]
    assert losses[-1]["raw"]["loss"] != losses[-1]["ema"]["loss"]


def test_ranks_that_share_packs_validate_as_others(runs):
    runs, _ = runs
    (first, *_), (other, *_) = (
        [m["losses"]["raw"] for m in runs.outcomes[name][0][0] if m["event"] == "validation"]
        for name in ("shared", "shared_full")
    )
    recipe = runs.recipes["shared"]()
    validator = Validator(recipe, [ShardDataset.open(runs.url)], SHARED.validation)
    model = recipe.build_model()
    load_checkpoint_weights(model, runs.checkpoint("shared", 2), "master")
    alone = validator.losses_alone(model, torch.device("cpu"), torch.float32)
    assert first["each"] == pytest.approx(alone["each"], rel=1e-4)
    assert other["each"] == pytest.approx(first["each"], rel=1e-4)


def test_real_conditioning_passes_the_check_after_the_first_steps(runs):
    """Sources, references and states of partitioned weights get gradients on both ranks."""
    runs, _ = runs
    for _, final in runs.outcomes["probed"]:
        assert final.get("steps") == PROBED.steps, final
    assert len(steps_of(runs.outcomes["probed"][0][0])) == PROBED.steps


def test_float32_weights_become_masters_without_rounding(runs):
    runs, _ = runs
    _, initial = runs.recipes["fp32"]().start()
    stored = runs.checkpoint("still").weights()
    for name in initial:
        assert torch.equal(stored[name], initial[name])
    assert any(not torch.equal(initial[name].bfloat16().float(), initial[name]) for name in initial)


def test_checkpoints_of_adapters_name_their_base(runs):
    runs, _ = runs
    checkpoint = runs.checkpoint("adapted")
    recipe = runs.recipes["adapted"]()
    assert checkpoint.base == recipe.base()
    assert {name.rpartition(".")[2] for name in checkpoint.slices["master"] if name.startswith("blocks.")} == {
        "lora_A",
        "lora_B",
        "lora_magnitude",
    }
    weights = checkpoint.weights()
    with pytest.raises(UserError, match="is kept in the weights that the run started from"):
        weights["blocks.0.attn1.to_q.weight"]
    _, initial = recipe.start()
    base = recipe.open_base(checkpoint.base)
    assert torch.equal(
        checkpoint.weights("ema", base)["blocks.0.attn1.to_q.weight"], initial["blocks.0.attn1.to_q.weight"]
    )
    with pytest.raises(UserError, match="not the weights that the run started from"):
        recipe.open_base(checkpoint.base | {"digest": "0"})


@pytest.mark.parametrize("name", ["nan", "nan_offload", "nan_stage_2"])
def test_a_bad_step_is_dropped_and_rolled_back(runs, name):
    runs, _ = runs
    reports, final = runs.outcomes[name][0]
    assert final.get("steps") == NUM_STEPS
    assert [record["step"] for record in steps_of(reports) if not record["updated"]] == [3]
    assert [(m["step"], m["to_step"]) for m in reports if m["event"] == "rollback"] == [(3, 2)]
    checkpoint = runs.checkpoint(name)
    for kind in checkpoint.kinds:
        assert all(torch.isfinite(checkpoint.weights(kind)[key]).all() for key in checkpoint.slices[kind])


def test_three_ranks_continue_what_two_began(runs, tmp_path):
    runs, configs = runs
    scenarios = [
        Scenario(
            str(tmp_path / name),
            configs[name],
            runs.url,
            recipe=runs.recipes[name],
            open_dataset=ShardDataset.open,
            copy_from=str(runs.root / name),
            from_step=STOP_STEP,
        )
        for name in ("offload", "adapted")
    ]
    for name, (reports, final) in zip(("offload", "adapted"), run_ranks(train_scenarios, 3, scenarios)[0], strict=True):
        assert final["steps"] == NUM_STEPS
        for record, other in zip(steps_of(reports), steps_of(runs.outcomes[name][0][0])[STOP_STEP:], strict=True):
            assert record["keys_digest"] == other["keys_digest"]
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
