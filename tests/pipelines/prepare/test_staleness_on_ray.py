"""`data diff` on a cluster says what it says in one process, and holds no more of it than it shows."""

import json
import shutil

import pyarrow as pa
import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.pipelines.prepare.inputs import input_rows
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.stages import reached_by_workers
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.pipelines.prepare.staleness_on_ray import (
    differences,
    input_batches,
    planned_batches,
    stale_parts_on_ray,
    stamped,
)
from loomvideo.platform.shards.storage import Storage


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Raw files, and what was prepared of them with and without curation."""
    folder = tmp_path_factory.mktemp("diff")
    raw_samples(folder / "raw", 12)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        for name, curate in (("plain", False), ("curated", True)):
            prepare(prepare_config(folder / "raw", folder / name, curate=curate))
    return folder


@pytest.fixture
def copied(origin, tmp_path):
    """Copies to change; the files' times are kept, so that they count as unchanged."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)

    def config(name: str, **changes):
        return prepare_config(tmp_path / "raw", tmp_path / name, curate=name == "curated", **changes)

    return tmp_path, config


def in_this_process(config, stage, files, workers):
    """The tasks of the cluster one after the other, their partitions in an order of their own."""
    tables = [stamped(config, table) for table in input_batches(config, {})]
    tables += list(planned_batches(config, {"file": files}))
    table = pa.concat_tables(tables)
    for partition in sorted(set(table["partition"].to_pylist()), reverse=True):
        mask = pa.compute.equal(table["partition"], partition)
        yield from differences(table.filter(mask)).to_pylist()


def on_cluster(config, most=200, compare=in_this_process):
    return stale_parts_on_ray(reached_by_workers(config), 2, most, compare)


def change_input(folder):
    """One sample leaves, one comes, one gets other words, and a file of another is touched."""
    lines = [json.loads(line) for line in (folder / "raw/samples.jsonl").read_text().splitlines()]
    lines[5]["caption"] = lines[5]["instruction"] = "new words"
    if lines[5].get("source") is None:
        del lines[5]["instruction"]
    lines.append({**lines[7], "key": "sample-new"})
    (folder / "raw/samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    (folder / "raw" / lines[9]["target"]).touch()


def test_nothing_is_stale(copied):
    _, config = copied
    for name in ("plain", "curated"):
        assert stale_parts(config(name)) == []
        assert on_cluster(config(name)).first == []


def test_the_same_parts_in_the_same_order(copied):
    folder, config = copied
    change_input(folder)
    sorted(folder.glob("plain/shards/*.tar"))[0].unlink()
    changed = config("plain", seed=3)
    expected = stale_parts(changed)
    assert {part.what for part in expected} == {"config", "sample", "shard"}
    assert len({part.why for part in expected}) >= 6
    assert on_cluster(changed).first == expected
    few = on_cluster(changed, most=3)
    assert (few.first, few.count) == (expected[:3], len(expected))


def test_with_curation_the_chunks_to_assess_again_and_what_changed_on_disk(copied):
    folder, config = copied
    change_input(folder)
    expected = stale_parts(config("curated"))
    found = on_cluster(config("curated")).first
    assert [part for part in found if part.name != "new samples"] == [
        part for part in expected if part.what == "sample" or part.name == "assess-000000"
    ]
    (new,) = [part for part in found if part.name == "new samples"]
    assert new.why == "1 that are in no chunk yet"
    # Another option of assessing makes all chunks stale.
    changed = config("curated")
    changed.stages.quality.min_sharpness = 1.0
    names = {(part.what, part.name) for part in on_cluster(changed).first}
    assert names >= {("config", "stages.quality.min_sharpness"), ("assess", "assess-000000")}


def test_a_dataset_that_is_not_there(tmp_path):
    raw_samples(tmp_path / "raw", 2)
    config = prepare_config(tmp_path / "raw", tmp_path / "none")
    assert on_cluster(config).first == stale_parts(config)


def test_the_input_is_read_in_rows_from_its_file_or_its_last_reading(copied):
    folder, config = copied
    plain = config("plain")
    cached = list(input_rows(plain, Storage(plain.output)))
    shutil.rmtree(folder / "plain/work/inputs")
    assert list(input_rows(plain, Storage(plain.output))) == cached
    assert len(cached) == 12


@pytest.mark.slow
def test_on_a_ray_cluster(copied, ray_cluster):
    from loomvideo.pipelines.prepare.staleness_on_ray import compare_on_ray

    folder, config = copied
    change_input(folder)
    assert on_cluster(config("plain"), compare=compare_on_ray).first == stale_parts(config("plain"))
