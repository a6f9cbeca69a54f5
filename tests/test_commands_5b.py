"""Every documented command with a 5b preset resolves, names the folders it needs and asks for no more GPUs than are."""

import re
import shlex

import pytest
import yaml
from fixtures.pages import DOCS
from typer.testing import CliRunner

from loomvideo.jobs.cli import app
from loomvideo.platform.errors import UserError

PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("**/*.md"))]
TRAINING = ("pretrain", "finetune-edit", "distill", "prefer")
COMMANDS = (*TRAINING, "evaluate", "generate", "serve", "plan", "data prepare")
# Placeholders of the pages.
PLACEHOLDERS = {"…": "FOLDER"}


def documented():
    """The arguments of every such command, with the page that has it; of a submitted job those of the job itself."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            match = re.match(r"\s*(?:ray job submit .* -- )?loomvideo (.*(?:preset|model|like)=5b.*)$", line)
            if not match or not line.startswith((" ", "loomvideo", "ray")):
                continue
            command = match[1]
            for placeholder, value in PLACEHOLDERS.items():
                command = command.replace(placeholder, value)
            submitted = re.match(r"submit ([\w-]+) .*? -- (.*)$", command)
            if submitted:
                command = f"{'data prepare' if submitted[1] == 'data' else submitted[1]} {submitted[2]}"
            if command.startswith(COMMANDS):
                found.append(pytest.param(command, id=f"{page.name}: {command[:60]}"))
    return found


def resolved(command):
    result = CliRunner().invoke(app, [*shlex.split(command), "--dry-run"])
    assert result.exit_code == 0, (command, result.output, result.exception)
    return result.stdout


def test_there_are_such_commands():
    assert len(documented()) >= 7


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_resolves(command, tmp_path, monkeypatch):
    # A checkpoint that is named must be there, even for `--dry-run`.
    monkeypatch.chdir(tmp_path)
    for checkpoint in re.findall(r"checkpoint=([\w./-]+)", command):
        (tmp_path / checkpoint).mkdir(parents=True)
    text = resolved(command)
    if not command.startswith(TRAINING):
        return
    config = yaml.safe_load(text)
    # Shards of the 5b presets are streamed: actors and the folder of their MLLM are needed.
    assert config["mllm_folder"], command
    assert config["data"]["shards"], command
    assert config["features"]["gpus"] > 0
    assert config["from_weights"] or config["from_run"]


def test_the_plan_for_64_gpus_asks_for_64():
    of_page = [found.values[0] for found in documented() if found.id.startswith("plan-5b")]
    (command,) = [command for command in of_page if command.startswith("pretrain")]
    config = yaml.safe_load(resolved(command))
    workers, features = config["training"]["workers"], config["features"]
    assert workers["num"] * workers["gpus"] + features["actors"] * features["gpus"] <= 64
    assert workers["num"] % config["training"]["zero"]["hpz_partition_size"] == 0


def test_distilling_and_preferring_fit_eight_gpus():
    of_page = [found.values[0] for found in documented() if found.id.startswith("distillation")]
    commands = [command for command in of_page if command.startswith(("distill", "prefer"))]
    assert {command.split()[0] for command in commands} == {"distill", "prefer"}
    for command in commands:
        config = yaml.safe_load(resolved(command))
        workers, features = config["training"]["workers"], config["features"]
        used = workers["num"] * workers["gpus"]
        if "prefer" in config:
            # A round's actors and its judge end before its training starts.
            nft, judge = config["prefer"]["nft"], config["judge"]
            judges = judge["actors"] * judge["gpus"] if judge["kind"] == "transformers" else 0
            used = max(used, nft["actors"] * nft["gpus"] + judges)
        assert used + features["actors"] * features["gpus"] == 8, command


def test_a_dry_run_says_which_values_do_not_fit():
    """So `make pretrain ARGS=…` ends before it has made data and shards."""
    done = CliRunner().invoke(app, ["pretrain", "data.shards=[x]", "samples.every_steps=30", "--dry-run"])
    assert isinstance(done.exception, UserError)
    assert "training.checkpoint.every_steps=400" in str(done.exception)
