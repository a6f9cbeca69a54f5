"""Held-out samples during and at the end of a training job: the ``sample`` suite in this process, and what it shows."""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.jobs.training.config import HeldoutConfig
from loomvideo.jobs.training.summary import HeldoutSample, words
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.evaluation.controls import CONTROLS, WRONG_INSTRUCTION
from loomvideo.pipelines.evaluation.in_process import evaluate_in_process
from loomvideo.pipelines.evaluation.inputs import InputOptions, LoadedItem
from loomvideo.pipelines.evaluation.media import SheetRow, contact_sheet, save_png
from loomvideo.pipelines.evaluation.pipeline_generator import PipelineGenerator, SamplerSettings
from loomvideo.pipelines.evaluation.rows import MODEL, Row
from loomvideo.pipelines.evaluation.suites import own
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.platform.errors import UserError

STRIP = "strip.png"
STRIP_EDITS = 6
WORDS_STRIP = "words.png"
SHEET_ROWS = 24
"""Generations of a sheet; more are measured, not shown."""
COLUMNS = ("source", "edited", "target", "other instruction", "generated", *(f"reference {n}" for n in range(1, 10)))


@dataclass
class HeldoutResult:
    """What was measured and written.

    Attributes:
        figures: Means over samples by metric, and by ``METRIC/TASK``.
        samples: Every sample with its figures.
        files: Pictures and films, relative to the folder.
        failures: Samples without a result, by reason.
        summary: The figures in words, a line each.
    """

    figures: dict[str, float]
    samples: list[HeldoutSample]
    files: list[str]
    failures: dict[str, int] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"samples": [sample.flat() for sample in self.samples]}


def evaluate_heldout(
    pipeline: LoomVideoPipeline, config: HeldoutConfig, tasks: set[str], folder: Path, controls: bool = True
) -> HeldoutResult:
    """Generate held-out samples, measure them as ``loomvideo evaluate`` does, and write contact sheets and films.

    Every edit is made three ways from the same noise: as instructed, with another sample's instruction, and with a
    source of zeros; ``copy_psnr_db`` is the source itself against the target. ``strip.png`` shows six edits of
    different kinds, the first of each kind in the order of the dataset; ``words.png`` six generations from words alone.

    Args:
        pipeline: What generates.
        config: How much and how.
        tasks: The tasks that were trained; others are left out.
        folder: Receives ``strip.png``, ``words.png``, ``edits.png``, ``generated.png`` and ``films/*.mp4``.
        controls: Also edit with another instruction and without the source.

    Raises:
        UserError: if there is no held-out sample of these tasks, or none can be made.
    """
    manifest = own.sample(Path(config.samples), heldout_fraction=0.0)
    items = [item for item in manifest.items if item.task in tasks]
    edits = _spread([item for item in items if TASKS[item.task].needs_source], config.num_edits)
    generated = _spread([item for item in items if not TASKS[item.task].needs_source], config.num_generated)
    if not edits and not generated:
        raise UserError(f"evaluation.samples={config.samples}: no held-out samples of {', '.join(sorted(tasks))}")
    settings = SamplerSettings(config.steps, config.scale, config.generate_scale, config.visual_scale)
    options = InputOptions(
        bucket_classes=tuple(config.buckets),
        reference_classes=tuple(config.buckets),
        grid=pipeline.grid,
        num_frames=config.num_frames,
    )
    pictures = _Pictures(config, folder)
    result, rows = evaluate_in_process(
        dataclasses.replace(manifest, items=(*edits, *generated)),
        PipelineGenerator(pipeline, settings),
        options,
        lambda suite, key: config.seed,
        pictures.add,
        (MODEL, *CONTROLS) if controls else (MODEL,),
    )
    pictures.save()
    figures = {f"{f.metric}/{f.category}" if f.category else f.metric: f.value for f in result.figures}
    samples = [
        HeldoutSample(
            row["key"], row["item"]["task"], row["item"]["cluster"], row["item"]["text"], row.get("metrics", {})
        )
        for row in rows
    ]
    return HeldoutResult(figures, samples, pictures.files, result.failures, words(samples))


class _Pictures:
    """Contact sheets of all samples, and films of some."""

    def __init__(self, config: HeldoutConfig, folder: Path):
        self.config, self.folder = config, folder
        self.sheets: dict[str, list[SheetRow]] = {"edits": [], "generated": []}
        self.files: list[str] = []
        self.kinds: list[str] = []

    def add(self, loaded: LoadedItem, results: dict[str, np.ndarray], row: Row) -> None:
        item, shown = loaded.item, [results[MODEL]]
        references = {f"reference {number}": image[None] for number, image in enumerate(loaded.references, 1)}
        targets = {} if loaded.target is None else {"target": loaded.target}
        if loaded.source is None:
            panels = {"generated": results[MODEL]} | targets | references
            self.sheets["generated"].append(SheetRow(f"{item.task}: {item.text}", panels))
        else:
            panels = {"source": loaded.source, "edited": results[MODEL]} | targets
            if WRONG_INSTRUCTION in results:
                panels["other instruction"] = results[WRONG_INSTRUCTION]
            values = row["metrics"]
            note = ""
            if "edit_psnr_db" in values:
                note = f"edit {values['edit_psnr_db']:.1f} dB · copy {values['copy_psnr_db']:.1f} dB"
            self.sheets["edits"].append(SheetRow(item.text, panels | references, note))
            self.kinds.append(f"{item.task} {item.extra.get('kind', '')}")
            shown = [loaded.source, *shown]
        self._film(item, [*shown, *targets.values()], loaded.fps)

    def _film(self, item: EvalItem, videos: list[np.ndarray], fps: float) -> None:
        count = sum(name.startswith("films/") for name in self.files)
        alike = len({video.shape[:3] for video in videos}) == 1
        if len(videos[0]) > 1 and alike and count < self.config.num_films:
            name = f"films/{item.key}.mp4"
            write_video(self.folder / name, np.concatenate(videos, axis=2), fps)
            self.files.append(name)

    def save(self) -> None:
        for name, rows in (("edits", self.sheets["edits"]), ("generated", self.sheets["generated"][:SHEET_ROWS])):
            if rows:
                title = "held-out edits" if name == "edits" else "held-out generation"
                save_png(contact_sheet(rows, COLUMNS, title=title), self.folder / f"{name}.png")
                self.files.append(f"{name}.png")
        if self.sheets["edits"]:
            rows = [self.sheets["edits"][index] for index in _different(self.kinds, STRIP_EDITS)]
            save_png(contact_sheet(rows, COLUMNS[:3], height=144), self.folder / STRIP)
            self.files.append(STRIP)
        told = [row for row in self.sheets["generated"] if set(row.panels) <= {"generated", "target"}]
        if told:
            rows = [told[index] for index in _different([row.text.partition(":")[0] for row in told], STRIP_EDITS)]
            save_png(contact_sheet(rows, ("generated", "target"), height=144), self.folder / WORDS_STRIP)
            self.files.append(WORDS_STRIP)


def _different(kinds: list[str], count: int) -> list[int]:
    """The first of each kind, then the second of each, until there are ``count``; in their order."""
    seen: Counter[str] = Counter()
    ranks = []
    for index, kind in enumerate(kinds):
        ranks.append((seen[kind], index))
        seen[kind] += 1
    return sorted(index for _, index in sorted(ranks)[:count])


def _spread(items: list[EvalItem], count: int) -> list[EvalItem]:
    """``count`` items evenly spread over the list, so that all groups and tasks have a share."""
    if count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]
