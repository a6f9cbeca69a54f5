"""Which run, step and weights a reference names."""

import json
import os

import pytest
from fixtures.checkpoints import write_checkpoint

from loomvideo.jobs.weights.lookup import find_weights
from loomvideo.jobs.weights.references import find_run, split_step
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.sizes import PIPELINE_FILE, model_size
from loomvideo.model.weights import load_dit
from loomvideo.platform.errors import UserError


@pytest.fixture
def runs(tmp_path):
    for job, name, time in (("pretrain", "a", 1), ("pretrain", "both", 2), ("finetune-edit", "both", 3)):
        folder = tmp_path / job / name
        (folder / "weights").mkdir(parents=True)
        (folder / "config.yaml").write_text("model: tiny\n")
        (folder / "result.json").write_text("{}")
        os.utime(folder / "result.json", (time, time))
    return tmp_path


@pytest.mark.parametrize(
    "text", ["pretrain/a@7", "a@7", "{runs}/pretrain/a@7", "{runs}/pretrain/a/checkpoints/step-00000007"]
)
def test_every_way_to_write_a_step_of_a_run(runs, text):
    (runs / "pretrain" / "a" / "checkpoints" / "step-00000007").mkdir(parents=True)
    found = find_run(text.format(runs=runs), runs)
    assert (found.run.job, found.run.name, found.run.root, found.step) == ("pretrain", "a", runs, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("both", "from_run=both: several runs have this name; write finetune-edit/both or pretrain/both"),
        (
            "pretrain/c",
            "from_run=pretrain/c: no such run of finetune-edit or pretrain or .* in .*; there are .*pretrain/a",
        ),
        ("a@newest", "a@newest: the part after @ is a step, such as a@500"),
        ("", "no such run"),
    ],
)
def test_references_that_name_no_run_say_what_there_is(runs, text, message):
    with pytest.raises(UserError, match=message):
        find_run(text, runs, setting="from_run")


def test_a_name_of_two_jobs_means_the_one_that_the_command_continues(runs):
    assert find_run("both", runs, preferred="pretrain").run.job == "pretrain"
    assert split_step("s3://user@host/x") == ("s3://user@host/x", None)


def test_weights_are_a_runs_a_steps_or_a_path(runs):
    assert find_weights("", runs)[1] == runs / "finetune-edit" / "both" / "weights"
    assert find_weights("a", runs)[1] == find_weights(str(runs / "pretrain" / "a"), runs)[1]
    elsewhere = runs / "gen_model.pth"
    elsewhere.write_text("")
    assert find_weights(str(elsewhere), runs) == (None, elsewhere)
    (runs / "pretrain" / "a" / "weights").rmdir()
    with pytest.raises(UserError, match=r"checkpoint=a: .*has no weights yet; @STEP takes those of a checkpoint"):
        find_weights("a", runs)


def test_the_weights_of_a_step_are_written_once_when_asked_for(runs):
    model = LoomVideoDiT(model_size("tiny").dit)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_checkpoint(runs / "pretrain" / "a", 7, state)
    run, weights = find_weights("a@7", runs)
    assert (run.name, weights.name) == ("a", "step-00000007-ema")
    note = json.loads((weights / PIPELINE_FILE).read_text())
    assert note == {"model": "tiny", "step": 7, "weights": "ema", "run": "pretrain/a", "left_out": []}
    assert (load_dit(weights).proj_out.weight == -state["proj_out.weight"]).all()
    written = (weights / "config.json").stat().st_mtime_ns
    assert find_weights("a@7", runs)[1] == weights
    assert (weights / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]
    with pytest.raises(UserError, match="no checkpoint of step 8; there are 7"):
        find_weights("a@8", runs)
