"""One folder with everything people bring goes through one command: every row is written or has its reason."""

import collections
import contextlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fixtures.mixed_folder import everything
from fixtures.raw import without_ray
from typer.testing import CliRunner

from loomvideo.jobs.cli import app
from loomvideo.pipelines.prepare.reasons import MEANINGS
from loomvideo.platform.shards.reader import ShardDataset

REPO = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_mixed_folder_through_the_command_line(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    monkeypatch.setattr("loomvideo.platform.ray_session.ray_session", contextlib.nullcontext)
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = everything(folder)
    (folder / "._samples.jsonl").write_bytes(b"\0\5\26\7")
    lines = [json.dumps(row) for row, _ in rows] + ["{no json", "[" * 10_000]
    (folder / "samples.jsonl").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}", "limits.max_loss=1", "heldout_fraction=0", "runs="]
    done = CliRunner().invoke(app, ["data", "prepare", *arguments, "shards.max_samples=64"], catch_exceptions=False)
    assert done.exit_code == 0, done.output

    lost = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    expected = collections.Counter(reason for _, reason in rows if reason) + collections.Counter(invalid_json=2)
    assert collections.Counter(row["reason"] for row in lost) == expected, [(r["reason"], r["message"]) for r in lost]
    assert all("\n" not in row["message"] for row in lost)
    # Read, written and lost add up, in the data and in what is printed.
    dataset = ShardDataset.open(tmp_path / "out")
    assert len(dataset) == sum(reason is None for _, reason in rows) == len(rows) + 2 - len(lost)
    shown = {name: int(count) for name, count in re.findall(r"(inputs|written|quarantined)\D+(\d+)", done.output)}
    assert shown == {"inputs": len(rows) + 2, "written": len(dataset), "quarantined": len(lost)}
    # The report says what each reason means, and an example.
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for reason in expected:
        assert MEANINGS[reason].partition(",")[0].partition(":")[0] in page, reason
    assert "bomb.png" in page


def test_every_reason_of_reading_and_decoding_has_a_meaning():
    codes = set()
    for file in [*(REPO / "pipelines/media").rglob("*.py"), *(REPO / "pipelines/sources").rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        codes |= set(re.findall(r'DecodeError\(\s*"([a-z_]+)"', text))
        codes |= set(re.findall(r'(?:Rejected|FieldError)\([^"()]*(?:"[^"]*", )?[^"()]*"([a-z]+_[a-z_]+)"', text))
    assert len(codes) > 20
    columns = {"reference_image_paths", "front_seqs"}
    assert codes - columns <= set(MEANINGS), codes - columns - set(MEANINGS)
