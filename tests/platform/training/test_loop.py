"""The loop on gloo ranks without Ray, against a plain PyTorch loop and against itself after a resume."""

import dataclasses
import functools
import shutil

import pytest
import torch
from fixtures.object_store import s3_bucket
from helpers.plain_loop import plain_training
from helpers.ranks import Scenario, run_ranks, steps_of, train_scenarios
from helpers.toy_training import DeafRecipe, HungryRecipe, ToyDataset, ToyRecipe, UnheardRecipe, adapt_toy

from loomvideo.platform.training.beside import load_checkpoint_weights
from loomvideo.platform.training.checkpoint_folder import CheckpointFolder
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.validation import Validator

pytestmark = pytest.mark.slow

NUM_STEPS = 20
STOP_STEP = 6
ADAPTED = functools.partial(ToyRecipe, wrap=adapt_toy)


def config(packs_per_step, **changes):
    """Uneven packs, accumulation, cosine, clipping that bites, weight decay and averaging, all at once."""
    result = TrainingConfig(steps=NUM_STEPS, precision="fp32", seed=3, log_every=1)
    result.pack.tokens, result.pack.per_step = 100, packs_per_step
    result.optimizer = dataclasses.replace(
        result.optimizer, learning_rate=3e-3, warmup_steps=2, schedule="cosine", clip_norm=0.5, weight_decay=0.1
    )
    result.ema.decay = 0.9
    result.checkpoint = dataclasses.replace(result.checkpoint, every_steps=4, keep_last=10)
    return dataclasses.replace(result, **changes)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks did in one go: folder and outcomes of every scenario."""
    root = tmp_path_factory.mktemp("runs")
    stage_2 = config(3)
    stage_2.zero.stage = 2
    recomputed = config(3, activation_checkpointing="full")
    validated = config(3)
    validated.validation = dataclasses.replace(validated.validation, every_steps=4, samples_per_task=2, levels=3)
    partitioned = config(3)
    partitioned.zero = dataclasses.replace(partitioned.zero, persistence_elements=0)
    adapted_stage_2 = config(3)
    adapted_stage_2.zero.stage = 2
    rolled_back = config(3, steps=30)
    rolled_back.guard = dataclasses.replace(rolled_back.guard, max_skips=0, max_rollbacks=9)
    scenarios = {
        "adapted": Scenario(str(root / "adapted"), config(3), recipe=ADAPTED),
        "adapted_partitioned": Scenario(str(root / "adapted_partitioned"), partitioned, recipe=ADAPTED),
        "adapted_stage_2": Scenario(str(root / "adapted_stage_2"), adapted_stage_2, recipe=ADAPTED),
        "adapted_stopped": Scenario(str(root / "adapted_resumed"), config(3), recipe=ADAPTED, stop_after=STOP_STEP),
        "adapted_resumed": Scenario(str(root / "adapted_resumed"), config(3), recipe=ADAPTED),
        "partitioned": Scenario(str(root / "partitioned"), partitioned),
        "rolled_back": Scenario(str(root / "rolled_back"), rolled_back, url="toy://64/nan=22"),
        "deaf": Scenario(str(root / "deaf"), config(2), recipe=DeafRecipe),
        "unheard": Scenario(str(root / "unheard"), config(2, steps=40), recipe=UnheardRecipe),
        "hungry": Scenario(str(root / "hungry"), config(2), recipe=HungryRecipe),
        "whole": Scenario(str(root / "whole"), config(3)),
        "even": Scenario(str(root / "even"), config(2)),
        "stopped": Scenario(str(root / "resumed"), config(3), stop_after=STOP_STEP),
        "resumed": Scenario(str(root / "resumed"), config(3)),
        "stage_2": Scenario(str(root / "stage_2"), stage_2),
        "recomputed": Scenario(str(root / "recomputed"), recomputed),
        "validated": Scenario(str(root / "validated"), validated),
        "nan": Scenario(str(root / "nan"), config(3, steps=30), url="toy://64/nan=5"),
        "nan_stage_2": Scenario(
            str(root / "nan_stage_2"), dataclasses.replace(stage_2, steps=30), url="toy://64/nan=5"
        ),
        "missing": Scenario(str(root / "missing"), config(3), url="toy://64/missing=5"),
        "other_data": Scenario(str(root / "resumed"), config(3, steps=20), url="toy://56"),
    }
    with s3_bucket("training-test") as bucket:
        # Folders of their own: nothing but the bucket carries one over to the other.
        for name, stop in (("bucket_stopped", STOP_STEP), ("bucket_resumed", 0)):
            scenarios[name] = Scenario(
                str(root / name), config(3), stop_after=stop, checkpoints=f"{bucket}/checkpoints"
            )
        outcomes = run_ranks(train_scenarios, 2, list(scenarios.values()))
        kept = CheckpointFolder(f"{bucket}/checkpoints").steps()
    by_name = {name: [rank[number] for rank in outcomes] for number, name in enumerate(scenarios)}
    return root, by_name | {"kept in the bucket": kept}


def assert_close(records, others, relative):
    assert len(records) == len(others)
    for record, other in zip(records, others, strict=True):
        assert record["keys_digest"] == other["keys_digest"]
        assert record["loss"] == pytest.approx(other["loss"], rel=relative)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * relative)


@pytest.mark.parametrize(
    ("name", "packs_per_step", "recipe"),
    [
        ("whole", 3, ToyRecipe),
        ("even", 2, ToyRecipe),
        ("partitioned", 3, ToyRecipe),
        ("adapted", 3, ADAPTED),
        ("adapted_partitioned", 3, ADAPTED),
        ("adapted_stage_2", 3, ADAPTED),
    ],
)
def test_zero_equals_a_plain_loop(two_ranks, name, packs_per_step, recipe):
    root, outcomes = two_ranks
    expected, weights, average = plain_training(config(packs_per_step), recipe(), ToyDataset("toy://64"))
    reports, final = outcomes[name][0]
    assert final["steps"] == NUM_STEPS
    for record, (loss, norm) in zip(steps_of(reports), expected, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    checkpoint = CheckpointFolder(root / name / "checkpoints").open()
    assert checkpoint.step == NUM_STEPS
    for key, value in weights.items():
        torch.testing.assert_close(checkpoint.weights()[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(checkpoint.weights("ema")[key], average[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("prefix", "name"), [("", "whole"), ("adapted_", "adapted")])
def test_resume_on_the_same_world_size_is_bitwise(two_ranks, prefix, name):
    root, outcomes = two_ranks
    stopped, resumed = outcomes[f"{prefix}stopped"][0], outcomes[f"{prefix}resumed"][0]
    assert stopped[1] == {"steps": STOP_STEP, "first_step": 0, "stopped": "asked to stop"}
    assert resumed[1]["first_step"] == STOP_STEP
    # The checkpoint knows its steps, should the driver before have died with them.
    (known,) = (message["steps"] for message in resumed[0] if message["event"] == "recorded")
    assert [record["step"] for record in known] == list(range(1, STOP_STEP + 1))
    exact = ("step", "loss", "grad_norm", "keys_digest", "tokens", "learning_rate")
    whole = [[record[value] for value in exact] for record in steps_of(outcomes[name][0][0])]
    parts = [[record[value] for value in exact] for record in steps_of(stopped[0]) + steps_of(resumed[0])]
    assert parts == whole
    ends = [CheckpointFolder(root / run / "checkpoints").open(NUM_STEPS) for run in (name, f"{prefix}resumed")]
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        assert set(ends[0].slices[kind]) == set(ends[1].slices[kind])
        for parameter in ends[0].slices[kind]:
            assert torch.equal(ends[0].weights(kind)[parameter], ends[1].weights(kind)[parameter])


def test_a_bucket_is_all_that_a_run_needs_to_go_on(two_ranks):
    _, outcomes = two_ranks
    exact = ("step", "loss", "grad_norm", "keys_digest")
    whole, stopped, resumed = (
        [[record[value] for value in exact] for record in steps_of(outcomes[name][0][0])]
        for name in ("whole", "bucket_stopped", "bucket_resumed")
    )
    assert stopped + resumed == whole
    assert outcomes["kept in the bucket"] == [4, 6, 8, 12, 16, 20]


@pytest.mark.parametrize("name", ["stage_2", "recomputed"])
def test_other_ways_to_compute_give_the_same_losses(two_ranks, name):
    _, outcomes = two_ranks
    assert_close(steps_of(outcomes[name][0][0]), steps_of(outcomes["whole"][0][0]), 1e-5)


@pytest.mark.parametrize(("world_size", "stages"), [(1, (3, 2)), (3, (3,))])
def test_resume_on_another_world_size(two_ranks, tmp_path, world_size, stages):
    """Same samples and draws; losses differ by the order of sums only."""
    root, outcomes = two_ranks
    source = tmp_path / "from" / "checkpoints"
    shutil.copytree(root / "resumed" / "checkpoints" / f"step-{STOP_STEP:08d}", source / f"step-{STOP_STEP:08d}")
    scenarios = []
    for stage in stages:
        resumed = config(3)
        resumed.zero.stage = stage
        scenarios.append(Scenario(str(tmp_path / f"stage-{stage}"), resumed, copy_from=str(source.parent)))
    for reports, final in run_ranks(train_scenarios, world_size, scenarios)[0]:
        assert final["steps"] == NUM_STEPS
        assert_close(steps_of(reports), steps_of(outcomes["whole"][0][0])[STOP_STEP:], 1e-5)


@pytest.mark.parametrize("name", ["nan", "nan_stage_2"])
def test_a_sample_that_is_not_finite_is_skipped_and_quarantined(two_ranks, name):
    root, outcomes = two_ranks
    reports, final = outcomes[name][0]
    records = steps_of(reports)
    assert final["steps"] == 30
    assert next(message["keys"] for message in reports if message["event"] == "quarantine") == ["k5"]
    skipped = [record["step"] for record in records if not record["updated"]]
    assert skipped
    assert max(skipped) < 20
    assert records[-1]["loss"] < records[0]["loss"]
    weights = CheckpointFolder(root / name / "checkpoints").open().weights()
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_validation_repeats_itself_and_leaves_training_alone(two_ranks):
    _, outcomes = two_ranks
    reports, _ = outcomes["validated"][0]
    exact = ("step", "loss", "grad_norm", "keys_digest")
    whole, validated = (
        [[record[name] for name in exact] for record in steps_of(outcomes[name][0][0])]
        for name in ("whole", "validated")
    )
    assert validated == whole
    validations = [message for message in reports if message["event"] == "validation"]
    assert [message["step"] for message in validations] == [4, 8, 12, 16, 20]
    for message in validations:
        assert set(message["losses"]) == {"raw", "ema"}
        names = {"loss", "task/a", "task/b", "level/0.17", "level/0.50", "level/0.83", "each"}
        assert set(message["losses"]["raw"]) == names
    raw = [message["losses"]["raw"]["loss"] for message in validations]
    assert raw[2] < raw[0]


def test_validation_beside_training_finds_the_same_losses(two_ranks):
    root, outcomes = two_ranks
    settings = dataclasses.replace(config(3).validation, samples_per_task=2, levels=3)
    validator, model = Validator(ToyRecipe(), [ToyDataset("toy://64")], settings), ToyRecipe().build_model()
    messages = [message for message in outcomes["validated"][0][0] if message["event"] == "validation"]
    checkpoint = CheckpointFolder(root / "validated" / "checkpoints").open(8)
    for kind, name in (("master", "raw"), ("ema", "ema")):
        load_checkpoint_weights(model, checkpoint, kind)
        losses = validator.losses_alone(model, torch.device("cpu"), torch.float32)
        expected = messages[1]["losses"][name]
        assert losses.pop("each") == pytest.approx(expected.pop("each"), rel=1e-5)
        assert losses == pytest.approx(expected, rel=1e-5)


def test_too_many_bad_steps_return_to_the_last_checkpoint(two_ranks):
    _, outcomes = two_ranks
    reports, final = outcomes["rolled_back"][0]
    records = steps_of(reports)
    assert [record["step"] for record in records] == list(range(1, 31))
    skipped = [record["step"] for record in records if not record["updated"]]
    returns = [(message["step"], message["to_step"]) for message in reports if message["event"] == "rollback"]
    assert [step for step, _ in returns] == skipped
    # Checkpoints are written every four steps.
    assert all(0 < step - to_step <= 4 and to_step % 4 == 0 for step, to_step in returns)
    assert records[-1]["loss"] < records[0]["loss"]
    assert final["steps"] == 30


def test_out_of_memory_names_the_pack_and_a_budget(two_ranks):
    for _, final in two_ranks[1]["hungry"]:
        assert "out of memory in a pack of" in final["error"]
        assert "tokens passed): lower training.pack.tokens=100 to about 80" in final["error"]


def test_what_never_learns_is_named_at_the_start(two_ranks):
    for reports, final in two_ranks[1]["deaf"]:
        assert (
            "after 10 steps no gradient has reached lost.weight, lost.bias: what they read is cut off" in final["error"]
        )
        assert len(steps_of(reports)) < 10


def test_conditioning_that_one_rank_finds_dead_ends_the_run_on_all(two_ranks):
    for _, final in two_ranks[1]["unheard"]:
        assert "after 10 steps the loss does not depend on source: what reads them is cut off" in final["error"]
    assert len(steps_of(two_ranks[1]["unheard"][0][0])) >= 10


def test_an_unreadable_sample_is_one_clear_error_on_all_ranks(two_ranks):
    finals = [final for _, final in two_ranks[1]["missing"]]
    assert any(
        "sample k5 of toy: FileNotFoundError: shards/train-000005.tar is gone" in final["error"] for final in finals
    )
    assert all("error" in final for final in finals)


def test_a_run_refuses_other_data(two_ranks):
    for _, final in two_ranks[1]["other_data"]:
        assert "datasets of the run so far are missing (toy://64)" in final["error"]
