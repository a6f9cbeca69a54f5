"""The same job on object storage: input, media and output on an S3 emulator, with the same result."""

import hashlib
from pathlib import Path

import fsspec
import pytest
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.pipelines.prepare.job import prepare
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.reading import ReadingConfig


@pytest.fixture
def bucket(monkeypatch):
    """URL of an empty bucket."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("shards-test")
    yield "s3://shards-test"
    server.stop()


def test_prepare_and_read_on_s3(bucket, tmp_path, monkeypatch):
    built = without_ray(monkeypatch)
    raw_samples(tmp_path / "raw", 6)
    fs, _ = fsspec.url_to_fs(bucket)
    fs.put(str(tmp_path / "raw"), "shards-test/raw", recursive=True)
    local = prepare_config(tmp_path / "raw", tmp_path / "out")
    prepare(local)
    remote = prepare_config(tmp_path / "raw", f"{bucket}/out")
    remote.input = f"{bucket}/raw/samples.jsonl"

    def interrupt(report, total):
        if report["unit"] != "shared":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(remote, on_progress=interrupt)
    assert prepare(remote).reused_shards == 1
    for path in sorted((tmp_path / "out").rglob("*")):
        name = path.relative_to(tmp_path / "out").as_posix()
        if path.is_file() and not name.startswith("work/"):
            data = fs.cat_file(f"shards-test/out/{name}")
            assert hashlib.sha256(data).digest() == hashlib.sha256(path.read_bytes()).digest(), name
    here, there = ShardDataset.open(tmp_path / "out"), ShardDataset.open(f"{bucket}/out")
    assert there.digest == here.digest
    for row in range(len(here)):
        chosen = there.read(row, select=lambda member, name: member == "target")
        assert chosen.tensors["target"]["mean.0"].equal(here.read(row).tensors["target"]["mean.0"])
    # Members lie beside each other: one request a sample.
    assert there.tally().requests == len(here)
    for requests in (len(here), 0):
        cached = ShardDataset.open(f"{bucket}/out", ReadingConfig(cache=str(tmp_path / "cache")))
        assert [cached.read(row).metadata for row in range(len(here))] == [
            here.read(r).metadata for r in range(len(here))
        ]
        assert cached.tally().requests == requests
    with pytest.raises(UserError, match="file gave 0"):
        there.ranges.read_ranges("manifest.json", [(10**9, 5)])
    built.clear()
    assert prepare(remote).reason == "up to date"
    assert built == []
    assert Path(tmp_path / "out/manifest.json").exists()
