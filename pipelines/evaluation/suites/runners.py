"""Running a suite's outside scorer in an environment of its own: one command, whose result file is read back."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from loomvideo.pipelines.evaluation.store import content_key
from loomvideo.platform.errors import UserError
from loomvideo.platform.ray_session import ray_session

RESULTS = {"geneval": "*.jsonl", "vbench": "*_eval_results.json"}
"""The result files that a scorer leaves in its output folder."""
# They would lead the scorer's Python back into this environment.
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
_SHOWN_LINES = 15


def command_line(command: str, results: Path, output: Path, data: Path, dimensions: Sequence[str]) -> list[str]:
    """The command with its placeholders filled in; ``{dimensions}`` as a word of its own becomes one each."""
    words = []
    for word in shlex.split(command):
        if word == "{dimensions}":
            words += dimensions
            continue
        for name, value in (("{results}", results), ("{output}", output), ("{data}", data)):
            word = word.replace(name, str(value))
        words.append(os.path.expanduser(word.replace("{dimensions}", ",".join(dimensions))))
    return words


def run_scorer(
    scorer: str, command: str, results: Path, output: Path, data: Path, dimensions: Sequence[str], gpus: float = 0.0
) -> Path:
    """Score the results that were written for a scorer, unless the same files were scored by the same command.

    It runs as a task of the cluster, so that its GPUs are accounted for.

    Args:
        scorer: ``geneval`` or ``vbench``.
        command: A command with placeholders: the scorer's own interpreter, or a container.
        results: Folder of the results.
        output: Folder for its result file and its log.
        data: The benchmark's download.
        dimensions: VBench's dimensions to score.
        gpus: GPUs of the task.

    Returns:
        The result file.

    Raises:
        UserError: if the command fails or leaves no result file.
    """
    files = sorted((str(p.relative_to(results)), p.stat().st_size, p.stat().st_mtime_ns) for p in results.rglob("*"))
    stamp, done = content_key(command, files, list(dimensions)), output / "scored.json"
    if done.is_file() and (kept := json.loads(done.read_text(encoding="utf-8")))["key"] == stamp:
        return output / kept["file"]
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob(RESULTS[scorer]):
        old.unlink()
    line = command_line(command, results.absolute(), output.absolute(), data.absolute(), dimensions)
    log = output / "log.txt"
    with ray_session():
        task: Callable[..., ray.ObjectRef] = ray.remote(_run).options(num_cpus=1, num_gpus=gpus, max_retries=0).remote
        code = ray.get(task(line, str(log)))
    found = sorted(output.glob(RESULTS[scorer]))
    if code != 0 or not found:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:])
        why = f"ended with {code}" if code else f"left no {RESULTS[scorer]} in {output}"
        raise UserError(f"scorer of {scorer}: {why}; its log {log} ends:\n{last}")
    done.write_text(json.dumps({"key": stamp, "file": found[-1].name}), encoding="utf-8")
    return found[-1]


def _run(line: list[str], log: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    if "CUDA_VISIBLE_DEVICES" in os.environ and ray.get_gpu_ids():
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    with open(log, "w", encoding="utf-8") as out:
        try:
            return subprocess.run(line, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        except OSError as error:
            out.write(f"{line[0]}: {error}\n")
            return 127
