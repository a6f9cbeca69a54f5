"""Suites whose scorers live in environments of their own: results out in their layout, their verdicts back in.

GenEval's detector and VBench's networks pin libraries that conflict with training, so they run elsewhere on the folders
written here.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from loomvideo.pipelines.evaluation.stages import FILM, MODEL, VIDEO, Row
from loomvideo.pipelines.evaluation.store import Store, read_lossless
from loomvideo.pipelines.evaluation.suites.geneval import TAGS, summarise
from loomvideo.pipelines.evaluation.suites.vbench import loomvideo_average, official_totals, read_results
from loomvideo.platform.errors import UserError


def export_results(scorer: str, rows: Sequence[Row], store: Store, folder: Path) -> int:
    """Write results as the outside scorer expects them; returns how many.

    GenEval: ``00000/metadata.jsonl`` and ``00000/samples/0000.png``. VBench: ``{prompt}-0.mp4``.
    """
    count = 0
    for row in rows:
        if row["series"] != MODEL or row["failure"]:
            continue
        count += 1
        if scorer == "geneval":
            place = folder / row["key"]
            (place / "samples").mkdir(parents=True, exist_ok=True)
            metadata = row["item"]["extra"]["metadata"]
            (place / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
            frame = read_lossless(store.entry("results", row["result"]) / VIDEO)[0]
            Image.fromarray(frame).save(place / "samples" / "0000.png")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            # VBench finds a video by its prompt; a slash cannot be in a file name.
            name = row["item"]["text"].replace("/", " ")[:180]
            shutil.copyfile(store.entry("media", row["media"]) / FILM, folder / f"{name}-0.mp4")
    return count


def import_scores(scorer: str, path: Path) -> dict[str, float]:
    """Figures from the outside scorer's result file, by its official summary.

    Raises:
        UserError: if the file is not one of its results.
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
    return summarise(verdicts)
