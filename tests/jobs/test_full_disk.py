"""A disk that is full, at every kind of write: one line that names the file or folder, and nothing half written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.namespaces import NAMESPACE, can_mount

HELPER = Path(__file__).parents[1] / "helpers/full_disk.py"
# Where no room is left for a result, what is said goes to somebody who cannot free any.
SERVED = "the server has no room left: nothing was kept, tell whoever runs it"
NAMED = {
    "film": "film.mp4",
    "picture": "picture.png",
    "weights": "weights",
    "adapter": "adapter.safetensors",
    "run_folder": "pretrain/one/result.json",
    "dataset": "shards/manifest.json",
    "table": "shards/plan.parquet",
    "evaluation": "store/generated/kk/" + "k" * 32,
    "samples": "samples.jsonl",
    "extracted": "extracted/",
    "answers": "answers/kk/" + "k" * 32 + ".json",
    "kernels": "kernels",
    "tracking": "mlflow.db",
    "command": "sample",
}


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")
def test_every_kind_of_write_names_what_a_full_disk_did_not_take(tmp_path):
    done = subprocess.run(
        [*NAMESPACE, sys.executable, str(HELPER), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {kind: (text, left) for kind, _, text, left in map(json.loads, done.stdout.splitlines())}
    assert set(said) == {*NAMED, "uploads", "served"}
    for kind, name in NAMED.items():
        text, left = said[kind]
        assert f"{tmp_path}/disk/{name}" in text, (kind, text)
        assert text.endswith("no space left; free some and run the same line again"), (kind, text)
        assert "\n" not in text
        assert not [file for file in left if "tmp" in file or "partial" in file], (kind, left)
    assert said["uploads"][0] == SERVED
    assert said["served"][0] == f"failed: {SERVED}"
