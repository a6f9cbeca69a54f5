"""Pruning keeps what a run refers to and what was paid for."""

import json

from typer.testing import CliRunner

from loomvideo.jobs.cli import app
from loomvideo.pipelines.evaluation.prune import prune
from loomvideo.pipelines.evaluation.store import Store


def fill(folder):
    (folder / "video.mkv").write_bytes(b"x" * 1000)
    return {}


def test_only_entries_that_no_run_refers_to_go(tmp_path):
    store = Store(tmp_path / "evaluation-store")
    for kind, keys in {"inputs": "ab", "results": "cd", "media": "ef", "metrics": "gh"}.items():
        for key in keys:
            store.make(kind, key * 4, fill)
    answer = store.folder / "answers/00/00.json"
    answer.parent.mkdir(parents=True)
    answer.write_text("{}")
    rows = tmp_path / "evaluate/one/suites/s/rows.jsonl"
    rows.parent.mkdir(parents=True)
    row = {"inputs": "aaaa", "result": "cccc", "media": "eeee", "measured": "gggg", "features": ""}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({"inputs": "aaaa", "result": "identity"}) + "\n")

    counted = {u.kind: u for u in prune(store.folder, tmp_path, remove=False)}
    assert [(u.entries, u.unused) for u in counted.values()] == [(2, 1)] * 4 + [(1, 0)]
    assert counted["results"].unused_bytes > 1000
    assert store.record("results", "dddd") is not None
    assert {u.unused for u in prune(store.folder, tmp_path, days=1.0)} == {0}

    done = CliRunner().invoke(app, ["evaluate", "prune", "--runs", str(tmp_path), "--days", "0"])
    assert done.exit_code == 0, done.output
    assert "MB are in use" in done.output
    kept = [store.record(kind, key * 4) is not None for kind, key in zip(
        ("inputs", "inputs", "results", "results", "media", "media"), "abcdef", strict=True)]  # fmt: skip
    assert kept == [True, False] * 3
    assert answer.is_file()


def test_evaluate_takes_its_keys_without_a_word_before_them():
    done = CliRunner().invoke(app, ["evaluate", "suites=[openve]", "limit=3", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "limit: 3" in done.output
    assert "judge.budget_usd" in CliRunner().invoke(app, ["evaluate", "--help"]).output
