"""What outside scorers are given: whole prompts, k samples, every file accounted for."""

import contextlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.pipelines.evaluation.rows import MODEL
from loomvideo.pipelines.evaluation.stages import FILM, VIDEO
from loomvideo.pipelines.evaluation.store import Store, write_lossless
from loomvideo.pipelines.evaluation.suites import runners
from loomvideo.pipelines.evaluation.suites.external import export_results, import_scores, manifest_file
from loomvideo.pipelines.evaluation.suites.items import EvalItem, SuiteManifest
from loomvideo.pipelines.evaluation.suites.registry import suite
from loomvideo.platform.errors import UserError

LONG = "a wide shot of " + "very " * 36 + "blue"


def rows_of(manifest, store):
    rows = []
    for number, item in enumerate(manifest.items):
        for kind, name in (("media", FILM), ("results", VIDEO)):

            def fill(folder, name=name, number=number):
                if name == VIDEO:
                    write_lossless(folder / VIDEO, np.full((1, 16, 16, 3), number, np.uint8), 24)
                else:
                    (folder / FILM).write_bytes(b"film %d" % number)
                return {}

            store.make(kind, item.key, fill)
        base = {"suite": "s", "series": MODEL, "failure": "", "seed": number, "result": item.key, "media": item.key}
        rows.append(base | {"key": item.key, "item": json.loads(item.to_json())})
    return rows


def vbench(tmp_path, texts, dimension="color"):
    items = [
        EvalItem("v", f"{n:04d}", "t2v", dimension, t, extra={"dimensions": [dimension]}) for n, t in enumerate(texts)
    ]
    return SuiteManifest("v", tmp_path, tuple(items))


def test_long_prompts_that_begin_alike_keep_their_names_and_k_samples_each(tmp_path):
    prompts = [LONG + " sky", LONG + " sea"]
    assert prompts[0][:180] == prompts[1][:180]
    manifest = vbench(tmp_path, prompts).repeated(suite("vbench_full").samples_of)
    assert len({item.key for item in manifest.items}) == 10
    assert len({item.unit for item in manifest.items}) == 2
    rows = rows_of(manifest, Store(tmp_path / "store"))
    rows[3]["failure"] = "generation failed"
    out = tmp_path / "out"
    out.mkdir()
    (out / "of an earlier run-0.mp4").write_bytes(b"")
    assert export_results("vbench", rows, Store(tmp_path / "store"), out) == 9
    names = {path.name for path in out.iterdir()}
    assert names == {f"{p}-{k}.mp4" for p in prompts for k in range(5)} - {f"{prompts[0]}-3.mp4"}
    listed = json.loads(manifest_file(out).read_text())
    assert set(listed["files"]) == names
    assert [m["failure"] for m in listed["missing"]] == ["generation failed"]
    assert suite("vbench_full").samples_of(vbench(tmp_path, ["x"], "temporal_flickering").items[0]) == 25


def test_two_rows_of_one_prompt_share_a_file_and_names_that_no_disk_takes_are_refused(tmp_path):
    store = Store(tmp_path / "store")
    assert export_results("vbench", rows_of(vbench(tmp_path, ["a cat", "a cat"]), store), store, tmp_path / "out") == 1
    listed = json.loads(manifest_file(tmp_path / "out").read_text())["files"]
    assert (listed["a cat-0.mp4"]["key"], listed["a cat-0.mp4"]["also"]) == ("0000", ["0001"])
    with pytest.raises(UserError, match="0000: its prompt is too long for a file name"):
        export_results("vbench", rows_of(vbench(tmp_path, ["x" * 260]), store), store, tmp_path / "out")


def test_geneval_has_four_pictures_a_prompt_and_as_many_verdicts(tmp_path):
    metadata = {"tag": "colors", "include": [], "prompt": "a red cup"}
    item = EvalItem("geneval", "00000", "t2i", "colors", "a red cup", extra={"metadata": metadata})
    manifest = SuiteManifest("geneval", tmp_path, (item,)).repeated(suite("geneval").samples_of)
    store = Store(tmp_path / "store")
    assert export_results("geneval", rows_of(manifest, store), store, tmp_path / "out") == 4
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert found == [f"00000/samples/{n:04d}.png" for n in range(4)]
    verdicts = tmp_path / "results.jsonl"
    verdicts.write_text('{"tag": "colors", "correct": true}\n' * 3)
    with pytest.raises(UserError, match="3 verdicts, but 4 pictures were written"):
        import_scores("geneval", verdicts, 4)
    assert import_scores("geneval", verdicts, 3)["overall"] == 1


SCORER = """import json, os, sys
assert "VIRTUAL_ENV" not in os.environ
folder, output, *dimensions = sys.argv[1:]
if os.environ.get("BREAK"):
    sys.exit("no such weights")
scores = {d: [len(os.listdir(folder)) / 10, []] for d in dimensions}
with open(os.path.join(output, f"run{len(os.listdir(output))}_eval_results.json"), "w") as out:
    json.dump(scores, out)
"""


def test_a_scorer_runs_in_its_own_environment_and_once(tmp_path, monkeypatch):
    # The task's own function, in this process: a session of Ray proves nothing more here.
    monkeypatch.setattr(runners, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(
        runners.ray, "remote", lambda run: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=run))
    )
    monkeypatch.setattr(runners.ray, "get", lambda value: value)
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    (tmp_path / "score.py").write_text(SCORER)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a-0.mp4").write_bytes(b"x")
    command = f"{sys.executable} {tmp_path}/score.py {{results}} {{output}} {{dimensions}}"
    asked = ("vbench", command, tmp_path / "results", tmp_path / "out", tmp_path, ["color", "scene"])
    file = runners.run_scorer(*asked)
    assert import_scores("vbench", file) == {"color": 0.1, "scene": 0.1}
    assert runners.run_scorer(*asked) == file
    assert len(list((tmp_path / "out").glob("*_eval_results.json"))) == 1
    (tmp_path / "results" / "b-0.mp4").write_bytes(b"y")
    monkeypatch.setenv("BREAK", "1")
    with pytest.raises(UserError, match=r"ended with 1; its log .*\n.*no such weights"):
        runners.run_scorer(*asked)
    with pytest.raises(UserError, match=r"scorers\.vbench: the command names no \{output\}"):
        EvaluateConfig(scorers={"vbench": "python x.py {results}"}).check()
