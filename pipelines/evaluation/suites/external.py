"""Suites whose scorers live in environments of their own: results out in their layout, their verdicts back in.

GenEval's detector and VBench's networks pin libraries that conflict with training, so they run elsewhere on the folders
written here.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from loomvideo.pipelines.evaluation.rows import MODEL, Row
from loomvideo.pipelines.evaluation.stages import FILM, VIDEO
from loomvideo.pipelines.evaluation.store import Store, read_lossless
from loomvideo.pipelines.evaluation.suites.geneval import TAGS, summarise
from loomvideo.pipelines.evaluation.suites.vbench import loomvideo_average, official_totals, read_results
from loomvideo.platform.errors import UserError

MANIFEST_ENDING = "-files.json"
MAX_NAME_BYTES = 255


def export_results(scorer: str, rows: Sequence[Row], store: Store, folder: Path) -> int:
    """Write results as the outside scorer expects them; returns how many.

    GenEval: ``00000/metadata.jsonl`` and ``00000/samples/0000.png``. VBench: ``{prompt}-0.mp4``, the whole prompt,
    since its tool finds a video by it. ``FOLDER-files.json`` says which sample each file is, and which samples have
    none; it lies beside the folder, since VBench may take the ending of any file in it for that of the videos.

    Raises:
        UserError: if a prompt is too long for a file name.
    """
    # Results of an earlier run of the same name would be scored too.
    shutil.rmtree(folder, ignore_errors=True)
    files: dict[str, dict[str, Any]] = {}
    missing = []
    for row in rows:
        if row["series"] != MODEL:
            continue
        if row["failure"]:
            missing.append({"key": row["key"], "prompt": row["item"]["text"], "failure": row["failure"]})
            continue
        extra = row["item"]["extra"]
        prompt_key, number = extra.get("prompt_key", row["key"]), extra.get("number", 0)
        if scorer == "geneval":
            name = f"{prompt_key}/samples/{number:04d}.png"
        else:
            # A slash cannot be in a file name; VBench's own prompts have none.
            name = f"{row['item']['text'].replace('/', ' ')}-{number}.mp4"
        if name in files:
            # Two rows of one prompt: the scorer knows a file by its prompt alone, so that one serves both.
            files[name]["also"].append(row["key"])
            continue
        if len(Path(name).name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"{row['key']}: its prompt is too long for a file name, by which the scorer finds it")
        if scorer == "geneval":
            _write_picture(folder / name, store, row)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.entry("media", row["media"]) / FILM, folder / name)
        known = {"key": row["key"], "also": [], "prompt": row["item"]["text"], "number": number, "seed": row["seed"]}
        files[name] = known
    folder.mkdir(parents=True, exist_ok=True)
    content = {"files": files, "missing": missing}
    manifest_file(folder).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return len(files)


def manifest_file(folder: Path) -> Path:
    """Where the list of a folder's files is."""
    return folder.with_name(folder.name + MANIFEST_ENDING)


def _write_picture(path: Path, store: Store, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = row["item"]["extra"]["metadata"]
    (path.parent.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    frame = read_lossless(store.entry("results", row["result"]) / VIDEO)[0]
    Image.fromarray(frame).save(path)


def import_scores(scorer: str, path: Path, num_files: int = 0) -> dict[str, float]:
    """Figures from the outside scorer's result file, by its official summary.

    Args:
        scorer: ``geneval`` or ``vbench``.
        path: The result file.
        num_files: Files that were written for the scorer; 0 when unknown.

    Raises:
        UserError: if the file is not one of its results, or speaks of fewer or more files.
    """
    if scorer == "vbench":
        raw = read_results(path)
        totals = official_totals(raw)
        figures = dict(raw)
        if not totals.missing:
            figures |= {"total": totals.total, "quality": totals.quality, "semantic": totals.semantic}
        if all(name in raw for name in ("imaging_quality", "overall_consistency", "subject_consistency")):
            figures["loomvideo_average"] = loomvideo_average(raw)
        return figures
    verdicts = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            if row["tag"] not in TAGS:
                raise UserError(f"{path}:{number}: unknown tag {row['tag']!r}")
            verdicts.append((row["tag"], bool(row["correct"])))
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: not a GenEval result file (one JSON a line with tag and correct): {error}") from error
    if not verdicts:
        raise UserError(f"{path}: the GenEval result file is empty")
    if num_files and len(verdicts) != num_files:
        raise UserError(f"{path}: {len(verdicts)} verdicts, but {num_files} pictures were written for the scorer")
    return summarise(verdicts)
