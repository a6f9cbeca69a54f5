"""Before and after a prepare: plan, diff, verify, report, quarantine, take-downs, other readers' files."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from fixtures.raw import prepare_config, raw_samples, without_ray
from typer.testing import CliRunner

from loomvideo.jobs.data.commands import app
from loomvideo.pipelines.prepare.config import ClipOptions, LimitOptions
from loomvideo.pipelines.prepare.cost import estimate_cost
from loomvideo.pipelines.prepare.identities import planned_identities
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.pools import Pool
from loomvideo.pipelines.prepare.quarantine import ReasonCount, by_reason, export, ledger, retriable_work, saved_config
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.pipelines.prepare.verify import verify, verify_on_actors
from loomvideo.pipelines.sources.samples import read_jsonl
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.index import IDENTITY_COLUMNS
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.storage import Storage
from loomvideo.platform.shards.takedown import _named, compact, identities, remove


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Raw files and a finished dataset with one sample lost."""
    folder = tmp_path_factory.mktemp("tools")
    samples = raw_samples(folder / "raw", 12)
    (folder / "raw" / samples[3].target).rename(folder / "hidden.mp4")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        prepare(prepare_config(folder / "raw", folder / "out", limits=LimitOptions(max_loss=0.5)))
    return folder, samples


@pytest.fixture
def copied(origin, tmp_path, monkeypatch):
    """A copy to change: its folder, configuration, and what prepare builds."""
    built = without_ray(monkeypatch)
    shutil.copytree(origin[0] / "out", tmp_path / "out")
    config = prepare_config(origin[0] / "raw", tmp_path / "out", limits=LimitOptions(max_loss=0.5))
    return tmp_path / "out", config, built


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_verify_finds_nothing_wrong_with_a_good_dataset(copied):
    assert list(verify(ShardDataset.open(copied[0]))) == []
    assert run("verify", copied[0]).exit_code == 0


def test_verify_finds_changed_bytes(copied):
    tar = sorted(copied[0].glob("shards/*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    problems = list(verify(ShardDataset.open(copied[0])))
    assert [p.what for p in problems] == ["checksum differs from the manifest's"]
    result = run("verify", copied[0])
    assert result.exit_code == 1
    assert "1 problems" in result.output


def test_verify_finds_a_wrong_offset_and_a_lost_count(copied):
    table = pq.read_table(copied[0] / "index.parquet")
    rows = table.to_pylist()
    rows[0]["member_offsets"][0] += 512
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copied[0] / "index.parquet")
    manifest = json.loads((copied[0] / "manifest.json").read_text())
    manifest["counts"]["bars"]["inputs"] += 1
    with pytest.raises(UserError, match=r"index.parquet: checksum differs from the manifest's; delete manifest.json"):
        ShardDataset.open(copied[0])
    manifest["index_sha256"] = ""  # as if the writer had been wrong, and not the disk
    (copied[0] / "manifest.json").write_text(json.dumps(manifest))
    found = [problem.what for problem in verify(ShardDataset.open(copied[0]))]
    assert any("inputs but" in what for what in found)
    assert any("is not where the index says" in what for what in found)


def test_verify_makes_samples_again(copied):
    result = run("verify", copied[0], "--samples", 2)
    assert result.exit_code == 0, result.output
    assert result.output.count("features cosine") == 2


def test_inspect(copied):
    assert "11 samples" in run("inspect", copied[0]).output


def test_quarantine(copied, origin, tmp_path):
    folder, _, built = copied
    assert by_reason(ledger(folder)) == [ReasonCount("quarantined", "decode", "missing_file", 1)]
    listed = run("quarantine", "ls", folder, "--reason", "missing_file").output
    assert "sample-003" in listed
    assert export(folder, tmp_path / "lost.jsonl") == 1
    (lost,) = read_jsonl(tmp_path / "lost.jsonl")
    assert lost == origin[1][3]
    (shard,) = retriable_work(folder)
    config = saved_config(folder)
    assert config.clips.num_frames == 9
    assert config.output == str(folder)
    prepare(config, again=[shard])
    assert built == [shard]


def test_diff(copied, origin, tmp_path):
    folder, config, _ = copied
    assert stale_parts(config) == []
    config.clips.num_frames = 5
    assert [(p.what, p.name, p.why) for p in stale_parts(config)] == [("config", "clips.num_frames", "9 -> 5")]
    config.clips.num_frames = 9
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "media").symlink_to(origin[0] / "raw" / "media")
    lines = [json.loads(sample.to_json()) for sample in origin[1][1:]]
    lines[4]["caption"] = "new words"
    (raw / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config.input = str(raw / "samples.jsonl")
    found = {(p.name, p.members, p.why) for p in stale_parts(config)}
    assert ("sample-005", "mllm", "text changed") in found
    assert ("sample-000", "removed", "no longer in the input") in found
    sorted(folder.glob("shards/*.tar"))[0].unlink()
    assert any(p.what == "shard" for p in stale_parts(config))


def test_plan(origin):
    config = prepare_config(origin[0] / "raw", origin[0] / "out")
    cost = estimate_cost(config, num_probes=4, read_gb_per_s=1.0, recompute_us_per_token=55.0)
    sizes = {mode.mode: mode.bytes_per_sample for mode in cost.modes}
    assert sizes["stored int8"] < sizes["stored bf16"]
    assert cost.measured["encode_s"] > 0
    assert cost.hours(2) == pytest.approx(cost.hours(1) / 2)
    stored = ShardDataset.open(origin[0] / "out")
    actual = sum(stored.index.column("num_bytes").to_pylist()) / len(stored)
    assert sizes["stored bf16"] == pytest.approx(actual, rel=0.6)
    config.model, config.clips = "5b", ClipOptions(num_frames=121, buckets=[640])
    slow = estimate_cost(config, 4, read_gb_per_s=0.5, recompute_us_per_token=55.0)
    fast = estimate_cost(config, 0, read_gb_per_s=100.0, recompute_us_per_token=55.0)
    assert (slow.recommended, fast.recommended) == ("text bf16", "stored bf16")
    assert slow.measured == {}  # the 5b encoders' weights are not here


def test_tars_are_verified_by_actors_as_by_this_process(copied, monkeypatch):
    folder, _, _ = copied
    first, second = sorted(folder.glob("shards/*.tar"))[:2]
    first.write_bytes(first.read_bytes()[:-1024])
    content = bytearray(second.read_bytes())
    content[700] ^= 1
    second.write_bytes(content)
    dataset = ShardDataset.open(folder)

    def in_any_order(worker, arguments, work, pool):
        made = worker(*arguments)
        yield from map(made, reversed(work))

    monkeypatch.setattr("loomvideo.pipelines.prepare.verify.map_on_actors", in_any_order)
    found = list(verify_on_actors(dataset, str(folder), Pool(2, 1.0)))
    assert found == list(verify(dataset))
    assert [problem.where for problem in found] == [f"shards/{first.name}", f"shards/{second.name}"]


def forget_identities(folder):
    """Make index and records what they were before they held media paths and source ids."""
    for file in [folder / "index.parquet", *(folder / "work/records").iterdir()]:
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(list(IDENTITY_COLUMNS)), file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_index_says_what_a_sample_can_be_asked_for_by(copied):
    folder, _, _ = copied
    dataset = ShardDataset.open(folder)
    # Training holds the index of all samples: without texts that it never looks at.
    assert not set(IDENTITY_COLUMNS) & set(dataset.index.column_names)
    whole = dataset.whole_index()
    assert whole.drop_columns(list(IDENTITY_COLUMNS)).equals(dataset.index)
    for row, entry in enumerate(whole.to_pylist()):
        media = dataset.read(row).metadata["media"]
        named = {"target": entry["media_target"], "source": entry["media_source"]}
        assert media == named | {"references": entry["media_references"]}
    for tar in folder.glob("shards/*.tar"):
        tar.unlink()

    def never():
        raise AssertionError("the plan is not needed")
        yield

    picture = next(row for row in whole.to_pylist() if row["media_references"])
    assert remove(folder, [picture["media_references"][0]], never()) == [picture["key"]]
    with pytest.raises(UserError, match="no sample has key, group, media path, source_id or sku ''"):
        remove(folder, [""])


def test_source_ids_are_found_in_the_index():
    names, texts = ["key", "shard", "group", "media_target", "media_source"], [pa.string()] * 5
    lists = dict.fromkeys(("media_references", "source_ids"), pa.list_(pa.string()))
    index = pa.Table.from_pylist(
        [
            {"key": "a", "group": "", "media_target": "a.mp4", "media_references": [], "source_ids": ["17"]},
            {"key": "b", "group": "g", "media_target": "b.mp4", "media_references": ["r.png", "s.png"]},
            {"key": "c", "group": "g", "media_target": None, "media_references": [], "source_ids": ["x", "17"]},
        ],
        schema=pa.schema({**dict(zip(names, texts, strict=True)), **lists}),
    )
    wanted = {"17": ["a", "c"], "g": ["b", "c"], "s.png": ["b"], "b.mp4": ["b"], "c": ["c"], "": [], "q": []}
    for name, keys in wanted.items():
        found, matched = _named(index, {name})
        assert found.column("key").to_pylist() == keys, name
        assert matched == ({name} if keys else set())


def test_an_index_from_before_opens_and_the_next_change_fills_it_in(copied):
    folder, config, _ = copied
    whole = ShardDataset.open(folder).whole_index()
    before, tars = ShardDataset.open(folder), {tar: tar.read_bytes() for tar in folder.glob("shards/*.tar")}
    forget_identities(folder)
    old = ShardDataset.open(folder)
    assert old.index.equals(before.index)
    assert old.digest == before.digest
    assert old.whole_index()["media_target"].null_count == len(old)
    assert list(verify(old)) == []
    shard = before.manifest.shards[0].name
    prepare(config, again=[shard])
    filled = ShardDataset.open(folder)
    assert filled.whole_index().equals(whole)
    assert filled.digest == before.digest
    assert {tar: tar.read_bytes() for tar in folder.glob("shards/*.tar")} == tars


def test_a_take_down_from_an_index_of_before_looks_at_the_plan_then_at_shards(copied):
    folder, _, _ = copied
    known = dict(planned_identities(Storage(folder)))
    dataset = ShardDataset.open(folder)
    assert set(known) >= set(dataset.rows_by_key)
    metadata = dataset.read(0).metadata
    media = metadata["media"]
    paths = [media["target"], media["source"], *media["references"]]
    assert known[metadata["key"]] == identities(metadata["key"], metadata["group"], paths, metadata["extra"])
    forget_identities(folder)
    other = dataset.read(1).metadata
    assert remove(folder, [other["media"]["target"]]) == [other["key"]]
    for tar in folder.glob("shards/*.tar"):
        tar.unlink()
    assert remove(folder, [media["target"]], known.items()) == [metadata["key"]]


def test_take_down_and_compact(copied):
    folder, config, _ = copied
    before = ShardDataset.open(folder)
    with pytest.raises(UserError, match="no sample has key, group, media path, source_id or sku 'nobody'"):
        remove(folder, ["nobody"])
    assert remove(folder, ["group-0"]) == ["sample-000", "sample-001"]
    hidden = ShardDataset.open(folder)
    assert len(hidden) == len(before) - 2
    assert hidden.digest != before.digest
    assert hidden.manifest.counts["stripes"]["removed"] == 1
    exclude = json.loads((folder / ".nv-meta/split.yaml").read_text())["exclude"]
    assert len(exclude) == 2
    assert list(verify(hidden)) == []
    shards = compact(folder)
    assert shards
    assert compact(folder) == []
    after = ShardDataset.open(folder)
    assert list(verify(after)) == []
    for tar in folder.glob("shards/*.tar"):
        with tarfile.open(tar) as opened:
            assert not [name for name in opened.getnames() if name.startswith(("sample-000.", "sample-001."))]
    for key, row in after.rows_by_key.items():
        assert after.read(row).key == key
    # A later prepare does not bring them back.
    result = prepare(config)
    assert set(ShardDataset.open(folder).rows_by_key) == set(after.rows_by_key)
    assert result.summary()["removed"] == 2


def test_files_for_other_readers(copied, tmp_path):
    folder = copied[0]
    dataset = ShardDataset.open(folder)
    listed = json.loads((folder / "wids.json").read_text())
    assert sum(shard["nsamples"] for shard in listed["shardlist"]) == len(dataset)
    assert all((folder / shard["url"]).stat().st_size == shard["filesize"] for shard in listed["shardlist"])
    split = json.loads((folder / ".nv-meta/split.yaml").read_text())
    assert {Path(path).name[:5] for path in split["split_parts"]["train"]} == {"train"}
    info = json.loads((folder / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert sorted(info) == sorted(path for paths in split["split_parts"].values() for path in paths)
    assert sum(info.values()) == len(dataset)
    wids = pytest.importorskip("wids")
    shards = [{**shard, "url": str(folder / shard["url"])} for shard in listed["shardlist"]]
    # Its default decoding hands safetensors a stream where the library wants a path.
    opened = wids.ShardListDataset(shards, cache_dir=str(tmp_path / "cache"), transformations=[])
    found = {opened[i]["__key__"]: opened[i] for i in range(len(opened))}
    assert set(found) == set(dataset.rows_by_key)
    for key, row in dataset.rows_by_key.items():
        latents = safetensors.torch.load(found[key][".target.safetensors"].read())
        assert torch.equal(latents["mean.0"], dataset.read(row).tensors["target"]["mean.0"])


def test_diff_command_exit_codes(copied, origin):
    folder, config, _ = copied
    arguments = [f"input={config.input}", f"output={folder}", "preset=tiny", "clips.num_frames=9", "clips.buckets=[64]",
                 "shards.max_samples=4", "heldout_fraction=0.4", "workers.decode_timeout_s=30"]  # fmt: skip
    assert run("diff", *arguments).output.strip() == "up to date"
    changed = run("diff", *arguments, "seed=3")
    assert changed.exit_code == 1
    assert "0 -> 3" in changed.output
