"""What an evaluation needs before it starts: checkpoint, manifests, judge; every user mistake surfaces here."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow.tracking import MlflowClient

from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.jobs.weights.lookup import find_weights
from loomvideo.jobs.weights.references import find_run
from loomvideo.model.codec import LatentGrid
from loomvideo.model.loading import ModelSource
from loomvideo.model.sizes import PUBLISHED, model_size, stated_size
from loomvideo.pipelines.evaluation.generators import BlendGenerator, IdentityGenerator, SampleGenerator
from loomvideo.pipelines.evaluation.pipeline_generator import (
    ModelGenerator,
    ModelOptions,
    SamplerSettings,
    model_fingerprint,
)
from loomvideo.pipelines.evaluation.suites.items import SuiteManifest
from loomvideo.pipelines.evaluation.suites.registry import Suite
from loomvideo.platform.console import console
from loomvideo.platform.errors import UserError
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import default_tracking_uri

JOB = "evaluate"
DEFAULT_DATA = {"sample": "data/sample", "fashion": "data/sample"}


@dataclass(frozen=True)
class EvaluatedModel:
    """What is evaluated.

    Attributes:
        name: Shown everywhere.
        fingerprint: The fingerprint of weights and sampler.
        build: Makes the generator inside its actor.
        weights: Path of the weights; empty for generators without.
        training_run: MLflow run that trained it; empty when unknown.
        model: Its size.
    """

    name: str
    fingerprint: str
    build: Callable[[], SampleGenerator]
    weights: str = ""
    training_run: str = ""
    model: str = ""


def find_checkpoint(config: EvaluateConfig) -> EvaluatedModel:
    """Resolve what to evaluate.

    Raises:
        UserError: naming what is missing.
    """
    if config.generator != "model":
        model_grid(config.generation.model).check_frames("inputs.num_frames", config.inputs.num_frames)
    if config.generator == "identity":
        return EvaluatedModel("identity", "identity", IdentityGenerator)
    g = config.generation
    if config.generator == "blend":
        blend = BlendGenerator(g.blend_skill, g.blend_noise)
        return EvaluatedModel(blend.fingerprint, blend.fingerprint, lambda: blend)
    run, weights = find_weights(config.checkpoint, config.runs)
    model = g.model or stated_size(weights)
    if not model:
        raise UserError(f"checkpoint={config.checkpoint}: set generation.model (5b for the published model)")
    model_grid(model).check_frames("inputs.num_frames", config.inputs.num_frames)
    options = ModelOptions(
        ModelSource(
            str(weights),
            model,
            g.codec_folder,
            g.mllm_folder,
            g.kernels,
            g.compile,
            # Looked at where it runs, which may be another machine than this one.
            device="cuda" if g.gpus else "cpu",
            lora=tuple(g.lora),
        ).absolute(),
        SamplerSettings(g.steps, g.scale, g.generate_scale, g.visual_scale, g.negative_prompt, g.prompts),
    )
    fingerprint = model_fingerprint(options)
    tracking = run.read_json("mlflow.json") if run else None
    return EvaluatedModel(
        name=f"{run.job}/{run.name}" if run else weights.name,
        fingerprint=fingerprint,
        build=lambda: ModelGenerator(options, fingerprint),
        weights=str(weights),
        training_run=(tracking or {}).get("run_id", ""),
        model=model,
    )


def model_grid(model: str) -> LatentGrid:
    """Which frames and sizes results have: those of a model size, empty for the published one's."""
    return model_size(model or PUBLISHED).grid


def load_manifest(config: EvaluateConfig, suite: Suite) -> SuiteManifest:
    """Convert a suite's download, report deviations and missing files.

    Raises:
        UserError: if its data are not there, or files are missing and ``allow_missing`` is off.
    """
    path = config.data.get(suite.name) or DEFAULT_DATA.get(suite.name)
    if path is None:
        raise UserError(f"suite {suite.name}: set data.{suite.name}=FOLDER to its official download")
    manifest = suite.convert(Path(path))
    warn = console(stderr=True)
    for problem in manifest.problems:
        warn.print(f"{suite.name}: {problem}", style="yellow", highlight=False)
    manifest = dataclasses.replace(manifest.limited(config.limit), suite=suite.name)
    official = sum(suite.samples_of(item) for item in manifest.items)
    manifest = manifest.repeated(lambda item: config.samples_per_prompt or suite.samples_of(item))
    if len(manifest.items) < official:
        told = f"{suite.name}: {len(manifest.items)} results, the official protocol makes {official} of these prompts"
        warn.print(f"{told}; samples_per_prompt=0 does", style="yellow", highlight=False, soft_wrap=True)
    manifest = dataclasses.replace(
        manifest, items=tuple(dataclasses.replace(item, suite=suite.name) for item in manifest.items)
    )
    missing = manifest.missing()
    if missing and not config.allow_missing:
        raise UserError(
            f"suite {suite.name}: {len(missing)} files are not on disk, first {missing[0]} under {manifest.root}; "
            f"add them or set allow_missing=true"
        )
    return manifest


def store_folder(config: EvaluateConfig) -> Path:
    """Where results are kept by content."""
    return Path(config.store or Path(config.runs) / "evaluation-store").absolute()


def evaluation_run(runs: Path | str, reference: str, setting: str = "") -> RunFolder:
    """The folder of an evaluation run; ``setting`` is the key that holds the reference, for error messages.

    Raises:
        UserError: if there is none.
    """
    return find_run(reference, runs, jobs=(JOB,), setting=setting).run


def tracked(folder: RunFolder, tracking_uri: str) -> tuple[MlflowClient, str]:
    """A client of the tracking server that a run was logged to, and the id of its run there.

    Raises:
        UserError: if the folder knows of none.
    """
    known = folder.read_json("mlflow.json")
    if known is None:
        raise UserError(f"{folder.path}: no MLflow run is recorded here")
    uri = tracking_uri or known["tracking_uri"] or default_tracking_uri(folder.root)
    return MlflowClient(tracking_uri=uri), known["run_id"]
