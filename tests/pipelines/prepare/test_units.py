"""Where samples lie: what is added, removed or captioned anew moves nothing else and makes nothing else again."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.pipelines.prepare.inputs import SAMPLE_SCHEMA, Inputs
from loomvideo.pipelines.prepare.job import UP_TO_DATE, prepare
from loomvideo.pipelines.prepare.units import Dealing, UnitPlan, commit_plan, plan_units
from loomvideo.pipelines.sources.samples import write_jsonl
from loomvideo.platform.shards.commits import Commit
from loomvideo.platform.shards.plan import plan_shards
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage


def table(keys, text="a caption"):
    columns = {
        "key": keys,
        "dataset": ["set"] * len(keys),
        "split": ["train"] * len(keys),
        "num_bytes": [1000] * len(keys),
        "sample": [f'{{"key": "{key}", "caption": "{text}"}}' for key in keys],
        "media": [""] * len(keys),
        "assessed": ["{}"] * len(keys),
    }
    return Inputs(pa.table(columns, schema=SAMPLE_SCHEMA), [])


def planned(storage, inputs, **options) -> UnitPlan:
    return plan_units(storage, "encode", "records", inputs, Dealing("", 100), ("v1",), **options)


def committed(storage, plan):
    """Commit the plan and every unit of it."""
    commit_plan(storage, plan)
    for unit, recipe in zip(plan.units, plan.recipes, strict=True):
        storage.write_bytes(f"records/{Commit(unit.name, recipe).file}", b"")


def members(plan):
    keys = plan.table["key"].to_pylist()
    return {unit.name: [keys[row] for row in unit.rows] for unit in plan.units}


def test_what_is_added_and_removed_moves_nothing(tmp_path):
    storage = Storage(tmp_path)
    keys = [f"k{number}" for number in range(3000)]
    first = planned(storage, table(keys))
    committed(storage, first)
    assert planned(storage, table(list(reversed(keys)))).stale == []
    before = members(first)
    more = planned(storage, table(keys + [f"new{number}" for number in range(7)]))
    after = members(more)
    assert {name: after[name] for name in before} == before
    assert [more.units[number].name for number in more.stale] == sorted(set(after) - set(before))
    assert sum(len(after[name]) for name in set(after) - set(before)) == 7
    gone = {"k5", "k1700"}
    fewer = planned(storage, table([key for key in keys if key not in gone]))
    assert members(fewer) == {name: [k for k in found if k not in gone] for name, found in before.items()}
    assert len(fewer.stale) == len({name for name, found in before.items() if gone & set(found)})
    assert members(planned(storage, table(keys, "much longer words " * 50))) == before


def test_a_name_is_not_given_again_while_its_samples_may_lie_there(tmp_path):
    storage = Storage(tmp_path)
    committed(storage, planned(storage, table(["a", "b"])))
    other = planned(storage, table(["c"]))
    assert [unit.name for unit in other.units] == ["train-000001"]
    anew = planned(storage, table(["a", "b"]), redeal=True)
    assert [unit.name for unit in anew.units] == ["train-000001"]
    assert anew.was.to_pylist() == ["train-000000", "train-000000"]
    # Killed before the copy, the next run still knows where the samples lie.
    commit_plan(storage, anew)
    assert planned(storage, table(["a", "b"])).was.to_pylist() == ["train-000000", "train-000000"]


def test_dealing_is_by_hash_and_size():
    keys = [f"k{number}" for number in range(500)]
    shards = plan_shards(keys, ["train"] * 500, [10] * 500, 1000, 1000, seed=0)
    assert len(shards) == 5
    assert sorted(np.concatenate([shard.rows for shard in shards])) == list(range(500))


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    built = without_ray(monkeypatch)
    samples = raw_samples(tmp_path / "raw", 12)
    config = prepare_config(tmp_path / "raw", tmp_path / "out")
    write_jsonl(samples[:10], tmp_path / "raw" / "samples.jsonl")
    prepare(config)
    built.clear()
    return config, samples, built


def tars(config):
    folder = Path(config.output) / "shards"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_only_what_is_added_is_encoded(prepared):
    config, samples, built = prepared
    before = tars(config)
    write_jsonl(samples, Path(config.input))
    result = prepare(config)
    assert result.work["made.target"] == 2
    assert result.work["kept.target"] == 0
    after = tars(config)
    assert {name: after[name] for name in before} == before
    assert sorted(built) == sorted(name.removesuffix(".tar") for name in set(after) - set(before))
    assert prepare(config).reason == UP_TO_DATE


def test_only_the_shard_of_what_is_removed_is_copied(prepared):
    config, samples, built = prepared
    write_jsonl(samples[1:10], Path(config.input))
    result = prepare(config)
    assert len(built) <= 1
    assert result.work["made.target"] == result.work["made.mllm"] == 0
    assert len(ShardDataset.open(config.output)) == 9
    write_jsonl([dataclasses.replace(samples[1], caption="other"), *samples[2:10]], Path(config.input))
    result = prepare(config)
    assert (result.work["made.target"], result.work["made.mllm"]) == (0, 1)


def test_dealing_anew_copies_what_is_encoded(prepared, monkeypatch):
    config, samples, _ = prepared
    write_jsonl(samples, Path(config.input))
    prepare(config)
    before = ShardDataset.open(config.output)
    old = {key: before.read(row) for key, row in before.rows_by_key.items()}
    monkeypatch.setattr("loomvideo.pipelines.prepare.encode.SampleEncoder._moments", None)
    monkeypatch.setattr("loomvideo.pipelines.prepare.encode.SampleEncoder._mllm_inputs", None)
    result = prepare(config, redeal=True)
    assert result.reason == "dealt anew"
    assert result.work["made.target"] == 0
    after = ShardDataset.open(config.output)
    assert set(after.rows_by_key) == set(old)
    assert len(after.manifest.shards) < len(before.manifest.shards) + 1
    for key, row in after.rows_by_key.items():
        assert after.read(row).tensors["target"]["mean.0"].equal(old[key].tensors["target"]["mean.0"])
    assert {f"{shard.name}.tar" for shard in after.manifest.shards} == set(tars(config))
    assert prepare(config).reason == UP_TO_DATE
