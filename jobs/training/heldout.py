"""The evaluation at the end of a training job: edit held-out samples, measure, and show."""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from loomvideo.jobs.training.config import HeldoutConfig
from loomvideo.model.guidance import Guidance
from loomvideo.model.pipeline import LoomVideoPipeline, without_source
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.evaluation.media import SheetRow, contact_sheet, save_png
from loomvideo.pipelines.evaluation.metrics import psnr_db
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.prepare.config import ClipOptions, PrepareConfig
from loomvideo.pipelines.prepare.encode import LoadedSample, SampleLoader
from loomvideo.pipelines.sources.samples import Sample, read_jsonl
from loomvideo.platform.errors import UserError

FPS = 24.0


@dataclass
class HeldoutResult:
    """What was measured and written.

    Attributes:
        figures: Means over samples; ``edit_psnr_db`` and ``copy_psnr_db`` also by task.
        samples: The figures of every sample.
        files: Pictures and films, relative to the folder.
    """

    figures: dict[str, float]
    samples: list[dict[str, float | str]]
    files: list[str]


def evaluate_heldout(
    pipeline: LoomVideoPipeline, config: HeldoutConfig, tasks: set[str], folder: Path
) -> HeldoutResult:
    """Generate held-out samples, measure the edits against their targets, and write contact sheets and films.

    Every edit is made four ways from the same noise: as instructed, with another sample's instruction, and with a
    source of zeros; ``copy_psnr_db`` is the source itself against the target.

    Args:
        pipeline: What generates.
        config: How much and how.
        tasks: The tasks that were trained; others are left out.
        folder: Receives ``edits.png``, ``generated.png`` and ``films/*.mp4``.
    """
    samples = [s for s in read_jsonl(Path(config.samples)) if s.assigned_split(0.0) == "heldout" and s.task in tasks]
    edits = _spread([s for s in samples if TASKS[s.task].needs_source], config.num_edits)
    generated = _spread([s for s in samples if not TASKS[s.task].needs_source], config.num_generated)
    if not edits and not generated:
        raise UserError(f"evaluation.samples={config.samples}: no held-out samples of {', '.join(sorted(tasks))}")
    clips = ClipOptions(num_frames=config.num_frames, buckets=config.buckets)
    prepare = PrepareConfig(input=config.samples, output="", clips=clips)
    loader = SampleLoader(prepare, base_folder(config.samples), {"codec": "", "mllm": ""})
    try:
        evaluation = _Evaluation(pipeline, config, folder)
        for index, sample in enumerate(edits):
            evaluation.edit(loader.load(sample), _other_instruction(edits, index))
        for sample in generated:
            evaluation.generate(loader.load(sample))
    finally:
        loader.close()
    return evaluation.finish()


class _Evaluation:
    def __init__(self, pipeline: LoomVideoPipeline, config: HeldoutConfig, folder: Path):
        self.pipeline, self.config, self.folder = pipeline, config, folder
        self.edit_rows: list[SheetRow] = []
        self.generated_rows: list[SheetRow] = []
        self.samples: list[dict[str, float | str]] = []
        self.files: list[str] = []

    def edit(self, loaded: LoadedSample, other_instruction: str) -> None:
        sample = loaded.sample
        source, target = loaded.source[0].numpy(), loaded.target[0].numpy()
        references = [image.numpy() for image in loaded.references]
        guidance = Guidance(self.config.scale, self.config.visual_scale)
        conditions = self.pipeline.encode(sample.task, sample.text, source, references)
        wrong = self.pipeline.encode(sample.task, other_instruction, source, references)
        edited, wrongly_edited, sourceless = (
            self.pipeline.denoise(c, self.config.steps, guidance, self.config.seed, batch_branches=True)
            for c in (conditions, wrong, without_source(conditions))
        )
        figures = {
            "edit_psnr_db": psnr_db(edited, target),
            "copy_psnr_db": psnr_db(source, target),
            "wrong_instruction_psnr_db": psnr_db(wrongly_edited, target),
            "no_source_psnr_db": psnr_db(sourceless, target),
        }
        self.samples.append({"key": sample.key, "task": sample.task, "instruction": sample.text, **figures})
        panels = {"source": source, "edited": edited, "target": target, "other instruction": wrongly_edited}
        panels |= {f"reference {number}": image[None] for number, image in enumerate(references, 1)}
        note = f"edit {figures['edit_psnr_db']:.1f} dB · copy {figures['copy_psnr_db']:.1f} dB"
        self.edit_rows.append(SheetRow(sample.text, panels, note))
        self._film(sample, [source, edited, target])

    def generate(self, loaded: LoadedSample) -> None:
        sample, target = loaded.sample, loaded.target[0].numpy()
        references = [image.numpy() for image in loaded.references]
        guidance = Guidance(self.config.generate_scale, self.config.visual_scale if references else None)
        size = (target.shape[2], target.shape[1])
        conditions = self.pipeline.encode(sample.task, sample.text, None, references, size, len(target))
        video = self.pipeline.denoise(conditions, self.config.steps, guidance, self.config.seed, batch_branches=True)
        panels = {"generated": video, "target": target}
        panels |= {f"reference {number}": image[None] for number, image in enumerate(references, 1)}
        self.generated_rows.append(SheetRow(f"{sample.task}: {sample.text}", panels))
        self._film(sample, [video, target])

    def _film(self, sample: Sample, videos: list[np.ndarray]) -> None:
        count = sum(name.startswith("films/") for name in self.files)
        if len(videos[0]) > 1 and count < self.config.num_films:
            name = f"films/{sample.key}.mp4"
            write_video(self.folder / name, np.concatenate(videos, axis=2), FPS)
            self.files.append(name)

    def finish(self) -> HeldoutResult:
        """Means and contact sheets."""
        columns = ["source", "edited", "target", "other instruction", "generated"]
        columns += [f"reference {number}" for number in range(1, 10)]
        for name, rows in (("edits", self.edit_rows), ("generated", self.generated_rows)):
            if rows:
                title = "held-out edits" if name == "edits" else "held-out generation"
                save_png(contact_sheet(rows, columns, title=title), self.folder / f"{name}.png")
                self.files.append(f"{name}.png")
        by_figure = defaultdict(list)
        for values in self.samples:
            for name in ("edit_psnr_db", "copy_psnr_db", "wrong_instruction_psnr_db", "no_source_psnr_db"):
                by_figure[name].append(values[name])
                if name in ("edit_psnr_db", "copy_psnr_db"):
                    by_figure[f"{name}/{values['task']}"].append(values[name])
        figures = {name: fmean(values) for name, values in by_figure.items()}
        return HeldoutResult(figures, self.samples, self.files)


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """``count`` samples evenly spread over the list, so that all groups and tasks have a share."""
    if count >= len(samples):
        return samples
    return [samples[index * len(samples) // count] for index in range(count)]


def _other_instruction(samples: list[Sample], index: int) -> str:
    """The instruction of the next sample of the same task that asks for something else."""
    this = samples[index]
    others = samples[index + 1 :] + samples[:index]
    same_task = [s.text for s in others if s.task == this.task and s.text != this.text]
    other_task = [s.text for s in others if s.text != this.text]
    return (same_task or other_task or [""])[0]


def as_json(result: HeldoutResult) -> dict:
    """Plain values."""
    return dataclasses.asdict(result)
