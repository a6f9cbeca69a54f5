"""docs/tutorial.md: every command of the page, in order, on ten small files."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fixtures.media import moving_frames, write_picture, write_video
from fixtures.pages import blocks, replaced

from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.platform.machine import patience

# Two steps instead of hundreds; nothing else is changed.
SMALL = {
    "training.steps=300": "training.steps=2 training.optimizer.warmup_steps=1 training.pack.tokens=400",
    "training.steps=200": "training.steps=2 training.optimizer.warmup_steps=1 training.pack.tokens=400",
    "suites=[sample]": "suites=[sample] generation.steps=2",
    "out=mine/walk-green.mp4": "out=mine/walk-green.mp4 steps=2",
    "--probes 4": "--probes 1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The ten files and the page's samples.jsonl."""
    folder = tmp_path_factory.mktemp("tutorial")
    (samples,) = blocks("tutorial.md", "json")
    media = folder / "mine" / "media"
    names = {
        name
        for line in samples.splitlines()
        for sample in [json.loads(line)]
        for name in (sample["target"], sample.get("source"), *sample.get("references", ()))
        if name
    }
    assert len(names) == 10
    for number, name in enumerate(sorted(names)):
        frames = moving_frames(12, 64, 64, shift=5 * number)
        write = write_video if name.endswith(".mp4") else lambda path, frames: write_picture(path, frames[0])
        write(media / Path(name).name, frames)
    (folder / "mine" / "samples.jsonl").write_text(samples)
    return folder


def environment() -> dict[str, str]:
    values = os.environ | {"OMP_NUM_THREADS": "1"}
    values.pop("MLFLOW_TRACKING_URI", None)
    return values


def loomvideo(folder: Path, command: str) -> str:
    """Run a line of the page as it stands there."""
    program, *arguments = shlex.split(command)
    assert program == "loomvideo"
    done = subprocess.run(
        [sys.executable, "-m", "loomvideo.jobs.cli", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=patience(1200),
    )  # fmt: skip
    assert done.returncode == 0, command + done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def hear_interrupts() -> None:
    """As at a terminal: what a script starts in the background ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def serve(folder: Path, command: str) -> str:
    """Start the page, read it, stop it with Ctrl-C."""
    port = free_port()
    arguments = [*shlex.split(command)[1:], f"port={port}"]
    said = folder / "serve.log"
    with (
        said.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "loomvideo.jobs.cli", *arguments],
            cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT, preexec_fn=hear_interrupts,
        ) as process,
    ):  # fmt: skip
        try:
            deadline = time.monotonic() + patience(900)
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
                except OSError:
                    time.sleep(1)
            raise AssertionError(f"the page did not open (exit code {process.poll()}): {said.read_text()[-4000:]}")
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(patience(120))
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def test_the_page_shows_a_line_of_every_task_of_the_sample_dataset():
    (samples,) = blocks("tutorial.md", "json")
    assert {json.loads(line)["task"] for line in samples.splitlines()} == set(SampleDataConfig().task_weights)


@pytest.mark.slow
@pytest.mark.walkthrough
@pytest.mark.timeout(0)
def test_every_command_of_the_tutorial(folder):
    commands = replaced("".join(blocks("tutorial.md", "bash")), SMALL).splitlines()
    done = [line.split()[1:3] for line in commands]
    assert [words[0] if words[0] != "data" else words[1] for words in done] == [
        "plan", "prepare", "inspect", "quarantine",
        "pretrain", "finetune-edit", "checkpoint", "evaluate", "generate", "serve",
    ]  # fmt: skip
    outputs = {tuple(words): loomvideo(folder, line) for words, line in zip(done[:-1], commands[:-1], strict=True)}
    assert "7 samples" in outputs["data", "plan"]
    assert "0 losses" in outputs["data", "quarantine"]
    weights = folder / "runs" / "finetune-edit" / "edits" / "weights"
    assert (weights / "config.json").is_file()
    assert (folder / "runs" / "evaluate" / "look" / "suites" / "sample" / "review.html").is_file()
    assert (folder / "mine" / "walk-green.mp4").stat().st_size > 0
    assert "<html" in serve(folder, commands[-1])
