"""Controls of an edit: the same noise with another sample's instruction, and without the source.

A model that ignores its instruction or its source is as good in these as in the edit itself.
"""

from collections.abc import Sequence

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.evaluation.rows import MODEL, Row
from loomvideo.pipelines.evaluation.suites.items import EvalItem

WRONG_INSTRUCTION, NO_SOURCE = "wrong_instruction", "no_source"
CONTROLS = (WRONG_INSTRUCTION, NO_SOURCE)
MEASURED = "edit_psnr_db"
"""What is measured of a control; it becomes ``CONTROL_psnr_db`` of the sample."""


def other_instruction(items: Sequence[EvalItem], index: int) -> str:
    """The instruction of the next edit of the same task that asks for something else; any edit's if there is none."""
    this = items[index]
    others = [i for i in (*items[index + 1 :], *items[:index]) if TASKS[i.task].needs_source and i.text != this.text]
    same_task = [item.text for item in others if item.task == this.task]
    return (same_task or [item.text for item in others] or [""])[0]


def merge_controls(rows: Sequence[Row]) -> list[Row]:
    """Rows without those of controls, whose figures become metrics of the sample that they belong to."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for row in rows:
        if row["series"] in CONTROLS and not row["failure"] and MEASURED in row["metrics"]:
            figures = found.setdefault((row["suite"], row["key"]), {})
            figures[f"{row['series']}_psnr_db"] = row["metrics"][MEASURED]
    merged: list[Row] = []
    for row in rows:
        if row["series"] in CONTROLS:
            continue
        figures = found.get((row["suite"], row["key"])) if row["series"] == MODEL and not row["failure"] else None
        merged.append({**row, "metrics": row["metrics"] | figures} if figures else row)
    return merged
