"""``loomvideo data …``: make, prepare and look at datasets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loomvideo.jobs.command import config_command
from loomvideo.jobs.data import tools as dataset_tools
from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.platform.config import option
from loomvideo.platform.console import console, table

if TYPE_CHECKING:
    from loomvideo.jobs.data.imports import ImportConfig
    from loomvideo.pipelines.captions.dataset import CaptionDatasetConfig
    from loomvideo.pipelines.clips.config import CutConfig
    from loomvideo.pipelines.prepare.config import PrepareConfig

app = typer.Typer(name="data", help="Make, prepare and look at datasets.", no_args_is_help=True)


def prepare_schema() -> type:
    """The schema of ``data prepare``, imported late: it knows the model sizes."""
    from loomvideo.pipelines.prepare.config import PrepareConfig

    return PrepareConfig


def caption_schema() -> type:
    """The schema of ``data caption``, imported late as the above."""
    from loomvideo.pipelines.captions.dataset import CaptionDatasetConfig

    return CaptionDatasetConfig


def import_schema() -> type:
    """The schema of ``data import``, imported late as the above."""
    from loomvideo.jobs.data.imports import ImportConfig

    return ImportConfig


def cut_schema() -> type:
    """The schema of ``data cut``, imported late as the above."""
    from loomvideo.pipelines.clips.config import CutConfig

    return CutConfig


@dataclass
class SampleCommandConfig(SampleDataConfig):
    """Where the sample dataset goes, and what is in it."""

    output: str = option("data/sample", "folder of the dataset: samples.jsonl, media/, overview.png")


@config_command(app, "sample", "data-sample", lambda: SampleCommandConfig)
def sample(config: SampleCommandConfig) -> None:
    """Make a small dataset of six tasks: a rendered fashion world and real clips and photos out of wheels."""
    from loomvideo.pipelines.sample_data.generate import make_sample_data

    summary = make_sample_data(Path(config.output), config)
    title = f"{summary.output}: {summary.num_samples} samples, {summary.num_bytes / 1e6:.1f} MB"
    title += ", as before" if summary.reused else f" in {summary.seconds:.1f} s"
    tasks = sorted({task for counts in summary.tasks.values() for task in counts})
    counted = table("split", *tasks, title=title)
    for split, counts in summary.tasks.items():
        counted.add_row(split, *(str(counts.get(task, 0)) for task in tasks))
    console().print(counted)


@config_command(app, "import", "data-import", import_schema)
def import_(config: "ImportConfig") -> None:
    """Show what is understood of a dataset, with ten samples, then write it as a sample file; asks what is unclear."""
    from loomvideo.jobs.data.imports import run

    run(config)


@config_command(app, "prepare", "data-prepare", prepare_schema)
def prepare(config: "PrepareConfig") -> None:
    """Encode samples into shards: latents and MLLM features, up to date with input and configuration."""
    from loomvideo.jobs.data.prepare import run

    run(config)


@config_command(app, "cut", "data-cut", cut_schema)
def cut(config: "CutConfig") -> None:
    """Cut films into clips, each film read once: the parts that samples name, or its shots (shots.detector=…)."""
    from loomvideo.jobs.data.cut import run

    run(config)


@config_command(app, "caption", "data-caption", caption_schema)
def caption(config: "CaptionDatasetConfig") -> None:
    """Write captions or edit instructions for a dataset with a vision-language model: a sample file for `prepare`."""
    from loomvideo.jobs.data.caption import run

    run(config)


dataset_tools.register(app)
