"""From rendered clips to a finetuned, measured model, through the commands."""

import json
import os
import subprocess
import sys

import pytest

from loomvideo.jobs.cli import main
from loomvideo.model.weights import load_dit

pytestmark = pytest.mark.slow

DATA = "data.shards=[data/shards]"
TRAINING = ["training.pack.tokens=288", "training.log_every=1", "training.optimizer.warmup_steps=1"]
SMALL = [
    *TRAINING,
    "evaluation.samples=data/sample/samples.jsonl",
    "evaluation.num_edits=6",
    "evaluation.num_generated=1",
    "evaluation.num_films=1",
    "evaluation.steps=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


def loomvideo(folder, *arguments, code=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-m", "loomvideo.jobs.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def shards(folder):
    loomvideo(
        folder, "data", "sample", "num_train=12", "num_heldout=6", "width=64", "height=64", "real=false", "workers=1"
    )
    loomvideo(folder, "data", "prepare", "input=data/sample/samples.jsonl", "output=data/shards")
    return folder / "data" / "shards"


def result_of(folder, job, name):
    return json.loads((folder / "runs" / job / name / "result.json").read_text())


@pytest.fixture(scope="module")
def pretrained(folder, shards):
    loomvideo(folder, "pretrain", DATA, "run=a", "training.steps=3", *SMALL)
    return "pretrain/a"


def test_pretrain_then_finetune_then_continue(folder, pretrained):
    first = result_of(folder, "pretrain", "a")
    assert first["steps"] == 3
    assert {"edit_psnr_db", "copy_psnr_db", "wrong_instruction_psnr_db", "no_source_psnr_db"} <= set(first)

    # A longer run of the same name goes on from the last checkpoint, in the same MLflow run.
    run_id = json.loads((folder / "runs/pretrain/a/mlflow.json").read_text())["run_id"]
    sampled = ["samples.every_steps=5", "training.checkpoint.every_steps=5", "samples.num_edits=1"]
    loomvideo(folder, "pretrain", DATA, "run=a", "training.steps=5", *SMALL, *sampled)
    again = result_of(folder, "pretrain", "a")
    assert (again["first_step"], again["steps"]) == (3, 5)
    assert json.loads((folder / "runs/pretrain/a/mlflow.json").read_text())["run_id"] == run_id

    # Beside training, the checkpoint of step 5 was sampled from.
    assert (folder / "runs/pretrain/a/samples/step-00000005/edits.png").stat().st_size > 1000

    loomvideo(folder, "finetune-edit", DATA, "run=b", "training.steps=2", "lora.rank=2", "lora.dora=true", *SMALL)
    assert result_of(folder, "finetune-edit", "b")["steps"] == 2
    heldout = folder / "runs/finetune-edit/b/heldout"
    assert (heldout / "edits.png").stat().st_size > 1000
    assert len(list(heldout.glob("films/*.mp4"))) == 1

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    run = client.get_run(json.loads((folder / "runs/finetune-edit/b/mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["loomvideo.parent_run"] == "pretrain/a"
    # Adapters are merged into weights of the published names; what they do not touch is the parent's.
    ours, parents = (
        load_dit(folder / f"runs/{name}/weights").state_dict() for name in ("finetune-edit/b", "pretrain/a")
    )
    changed = {name for name, value in ours.items() if not value.equal(parents[name])}
    assert changed
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in changed)
    assert run.data.metrics["heldout/edit_psnr_db"] == pytest.approx(
        result_of(folder, "finetune-edit", "b")["edit_psnr_db"]
    )
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "result.json", "heldout"}


ROUNDS = [
    "prefer.method=nft", "prefer.nft.rounds=2", "prefer.nft.steps_per_round=4", "prefer.nft.prompts=3",
    "prefer.nft.repeats=2", "prefer.nft.sampler_steps=2", "judge.kind=fake",
    "prefer.rewards.weights={outside: 1.0, judge_done: 0.5, edit_psnr_db: 0.1}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("job", "method"),
    [
        ("distill", ["distill.critic_warmup=1", "distill.critic_steps=2"]),
        # Its checkpoint of step 4 is of the first round, the steps after it are of the second.
        ("prefer", ROUNDS),
    ],
    ids=["distill", "prefer"],
)
def test_every_method_repeats_its_steps(folder, pretrained, job, method):
    often = ["training.steps=8", "training.checkpoint.every_steps=2", "training.checkpoint.keep_last=9"]
    loomvideo(folder, job, DATA, "run=repeated", f"from_run={pretrained}", *TRAINING, *often, *method)
    done = loomvideo(folder, "audit-resume", f"{job}/repeated@4", "--steps", "2")
    assert "resume audit passed: equal bit by bit" in done.stdout
    if method == ROUNDS:
        made = json.loads((folder / "runs/prefer/repeated/rounds/round-0001/round.json").read_text())
        assert set(made["rewards"]) >= {"outside", "judge_done", "edit_psnr_db"}
        assert made["judge"]["kind"] == "fake"
        done = loomvideo(folder, "audit-resume", f"{job}/repeated@2", "--steps", "4", code=2)
        assert "after it in its round of 4 (checkpoints: 2, 4, 6, 8; last step 8)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "data.shards: name at least one folder"),
        (["pretrain", "data.shards=[nowhere]"], "nowhere: no manifest.json"),
        (["pretrain", "trainin.steps=3"], "did you mean training.steps?"),
        (["pretrain", "training.steps=many"], "training.steps='many' has the wrong type, expected int"),
        (["pretrain", "preset=huge"], "preset=huge: not found for pretrain; use one of"),
        (["finetune-edit", "data.shards=[data/shards]", "from_run=absent"], "from_run=absent"),
        (["finetune-edit", "data.shards=[data/shards]", "runs=empty"], "no finished pretrain run in empty"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(folder, shards, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["loomvideo", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
