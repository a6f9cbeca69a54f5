"""SIGKILL at random moments: the next run finishes the dataset with the bytes of an uninterrupted one."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.raw import raw_samples

TESTS = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import pytest
from pathlib import Path
from fixtures.raw import prepare_config, without_ray
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.config import ShardOptions
with pytest.MonkeyPatch.context() as monkeypatch:
    without_ray(monkeypatch)
    config = prepare_config(Path(sys.argv[1]), sys.argv[2], shards=ShardOptions(max_samples=2))
    print("ready", flush=True)
    prepare(config)
"""


def start(raw, output):
    command = [sys.executable, "-c", SCRIPT.format(tests=str(TESTS)), str(raw), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def checksums(folder):
    files = [*folder.glob("shards/*"), folder / "index.parquet", folder / "manifest.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_killed_anywhere_resumes_to_the_same_bytes(tmp_path):
    raw_samples(tmp_path / "raw", 12)
    process = start(tmp_path / "raw", tmp_path / "whole")
    began = time.monotonic()
    assert process.wait() == 0
    duration_s = time.monotonic() - began
    expected = checksums(tmp_path / "whole")
    generator = random.Random(7)
    kills = 0
    for _ in range(3):
        process = start(tmp_path / "raw", tmp_path / "killed")
        try:
            process.wait(generator.uniform(0.1, 0.6) * duration_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
    assert kills >= 1
    assert start(tmp_path / "raw", tmp_path / "killed").wait() == 0
    assert checksums(tmp_path / "killed") == expected
    left = [path.name for path in (tmp_path / "killed").rglob("*") if ".tmp-" in path.name]
    assert left == []
