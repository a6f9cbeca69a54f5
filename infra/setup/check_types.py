"""Checks the types of the public modules: ``python infra/setup/check_types.py``, part of ``make check``.

The rooms are imported as ``loomvideo.ROOM`` but lie in the repository's root, which no type checker can be told: they
are linked under ``build/types/loomvideo`` first.
"""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ROOMS = ("platform", "model", "pipelines", "jobs")
# What people import, configure or implement, and the rows that cross modules.
PUBLIC = (
    "platform/config.py",
    "platform/errors.py",
    "platform/runs.py",
    "platform/tracking.py",
    "platform/typed_text.py",
    "platform/nodes/config.py",
    "platform/shards/index.py",
    "platform/shards/manifest.py",
    "platform/shards/reader.py",
    "platform/shards/sample.py",
    "platform/training/config.py",
    "platform/training/recipe.py",
    "model/__init__.py",
    "model/config.py",
    "model/flow.py",
    "model/guidance.py",
    "model/packing.py",
    "model/pipeline.py",
    "model/sizes.py",
    "model/tasks.py",
    "model/codec/protocol.py",
    "pipelines/captions/dataset.py",
    "pipelines/prepare/accounts.py",
    "pipelines/prepare/attempts.py",
    "pipelines/prepare/builder.py",
    "pipelines/prepare/caption_stage.py",
    "pipelines/prepare/job.py",
    "pipelines/prepare/outcomes.py",
    "pipelines/prepare/pools.py",
    "pipelines/prepare/stages.py",
    "pipelines/prepare/units.py",
    "pipelines/sources/*.py",
    "pipelines/training/*.py",
    "pipelines/generation/*.py",
    "pipelines/evaluation/aggregate.py",
    "pipelines/evaluation/controls.py",
    "pipelines/evaluation/distances.py",
    "pipelines/evaluation/graph.py",
    "pipelines/evaluation/in_process.py",
    "pipelines/evaluation/judge_stage.py",
    "pipelines/evaluation/results.py",
    "pipelines/evaluation/review.py",
    "pipelines/evaluation/rows.py",
    "pipelines/evaluation/stages.py",
    "pipelines/evaluation/table.py",
    "pipelines/*/config.py",
    "jobs/*.py",
    "jobs/*/config.py",
    "jobs/data/*.py",
    "jobs/training/*.py",
    "jobs/weights/*.py",
)
SETTINGS = """preset = "default"
search-path = ["types"]
replace-imports-with-any = ["ray.*", "pyarrow.*", "PIL.*", "cv2.*", "av.*"]
"""


def public_files() -> list[str]:
    """The modules to check.

    Raises:
        SystemExit: if a line of the list names none.
    """
    files: list[str] = []
    for pattern in PUBLIC:
        found = sorted(path.relative_to(REPO).as_posix() for path in REPO.glob(pattern))
        if not found:
            sys.exit(f"{__file__}: {pattern} names no module any more")
        files += found
    return list(dict.fromkeys(files))


def main() -> int:
    """Link the rooms, run the checker; returns its exit code."""
    build = REPO / "build"
    links = build / "types" / "loomvideo"
    links.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        if not (links / room).is_symlink():
            os.symlink(REPO / room, links / room)
    (build / "pyrefly.toml").write_text(SETTINGS)
    command = [sys.executable, "-m", "pyrefly", "check", "--config", str(build / "pyrefly.toml")]
    command += ["--python-interpreter-path", sys.executable, "--output-format", "min-text"]
    # By the names that they are imported under: a module would else be two, with types of their own.
    files = [str(links / name) for name in public_files()]
    found = subprocess.run([*command, *files], cwd=REPO, stdout=subprocess.PIPE, text=True)
    print(found.stdout.replace("build/types/loomvideo/", ""), end="")
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
