"""`data import`: nothing is written unasked, and what is unclear ends it with the key that says it."""

import json

import pyarrow.parquet as pq
import pytest

from loomvideo.jobs.data.imports import ImportConfig, run
from loomvideo.platform.errors import UserError


@pytest.fixture
def config(tmp_path):
    rows = [{"video": f"{i}.mp4", "caption": f"take {i}"} for i in range(3)] + [{"caption": "none"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ImportConfig(input=str(tmp_path / "t.jsonl"), samples=2, rows=10)


def test_shown_first_and_written_when_asked_to(config, tmp_path, capsys):
    run(config)
    shown = capsys.readouterr().out
    for told in ("format table", "take 0", "missing_file", "missing_field", "nothing written"):
        assert told in shown
    config.output = str(tmp_path / "out")
    with pytest.raises(UserError, match="yes=true"):
        run(config)
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    config.yes = True
    run(config)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["target"] for sample in samples] == [f"{tmp_path}/{i}.mp4" for i in range(3)]
    (lost,) = pq.read_table(tmp_path / "out" / "import.parquet").to_pylist()
    assert lost["reason"] == "missing_field"


def test_what_is_unclear_ends_it(config, tmp_path):
    rows = [{"video": "a.mp4", "caption": "x", "prompt": "y"}]
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]))
    config.output, config.yes = str(tmp_path / "out"), True
    with pytest.raises(UserError, match=r"source_options\.columns\.caption=caption"):
        run(config)
    assert not (tmp_path / "out" / "samples.jsonl").exists()
