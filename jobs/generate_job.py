"""``loomvideo generate``: one file, or a batch over a pool of Ray actors."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loomvideo.jobs.checkpoints import find_weights
from loomvideo.jobs.generate_config import GenerateConfig
from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.presets import stated_preset
from loomvideo.pipelines.generation import FileGenerator, Request, Settings, read_requests
from loomvideo.platform.errors import UserError

console = Console()


def run(config: GenerateConfig) -> None:
    """Generate what the configuration says."""
    requests = list(read_requests(Path(config.batch))) if config.batch else [single_request(config)]
    if not config.batch:
        requests[0].check()
    if config.num_frames % 4 != 1:
        raise UserError(f"num_frames={config.num_frames}: must be 4k+1")
    if config.batch:
        _run_batch(config, requests)
        return
    generator = load_generator(config)
    try:
        with _progress() as bar:
            task = bar.add_task("denoising", total=config.steps)
            path = generator.generate(requests[0], lambda step, total: bar.update(task, completed=step, total=total))
    finally:
        generator.close()
    console.print(f"{path}", soft_wrap=True)


def single_request(config: GenerateConfig) -> Request:
    """The request of the command line."""
    for key in ("task", "prompt", "out"):
        if not getattr(config, key):
            raise UserError(f"{key}: set {key}=…, or batch=FILE.jsonl")
    return Request(
        config.task, config.prompt, config.out, config.source, list(config.refs), config.negative_prompt, config.seed
    )


def load_generator(config: GenerateConfig) -> FileGenerator:
    """Load the checkpoint onto the GPU, or the CPU where there is none."""
    _, weights = find_weights(config.checkpoint, config.runs)
    name = stated_preset(weights) or config.model
    try:
        pipeline = LoomVideoPipeline.from_pretrained(weights, name, config.codec_folder, config.mllm_folder)
    except torch.OutOfMemoryError as error:
        raise UserError(f"checkpoint={weights}: does not fit on this GPU ({error})") from error
    folder = weights if weights.is_dir() else weights.parent
    checkpoint: dict[str, Any] = {"path": str(weights), "fingerprint": folder_fingerprint(folder), "model": name}
    settings = Settings(
        tuple(config.buckets),
        config.width,
        config.height,
        config.num_frames,
        (config.default_size[0], config.default_size[1]),
        config.steps,
        config.scale,
        config.visual_scale,
        config.batch_branches,
    )
    return FileGenerator(pipeline, settings, checkpoint)


class GeneratorActor:
    """A loaded generator in a process of its own."""

    def __init__(self, config: GenerateConfig):
        self.generator = load_generator(config)

    def generate(self, request: Request) -> tuple[str, str]:
        """The outcome, ``done``, ``kept`` or ``failed``, and a failure's message."""
        try:
            if self.generator.is_done(request):
                return "kept", ""
            self.generator.generate(request)
        except UserError as error:
            return "failed", str(error)
        except torch.OutOfMemoryError:
            return "failed", f"{request.out}: out of GPU memory; lower width, height or num_frames"
        return "done", ""


def _run_batch(config: GenerateConfig, requests: list[Request]) -> None:
    import ray

    from loomvideo.platform.ray_session import ray_session

    if not requests:
        raise UserError(f"batch={config.batch}: holds no request")
    outcomes: dict[str, list[str]] = {"done": [], "kept": [], "failed": []}
    with ray_session():
        actor = ray.remote(num_gpus=config.gpus, num_cpus=1)(GeneratorActor)
        pool = ray.util.ActorPool([actor.remote(config) for _ in range(min(config.workers, len(requests)))])
        with _progress() as bar:
            task = bar.add_task("generating", total=len(requests))
            results = pool.map(lambda worker, request: worker.generate.remote(request), requests)
            for request, (outcome, message) in zip(requests, results, strict=True):
                outcomes[outcome].append(request.out)
                if message:
                    bar.console.print(f"{request.out}: {message}", soft_wrap=True)
                bar.advance(task)
    console.print(", ".join(f"{len(paths)} {outcome}" for outcome, paths in outcomes.items()))
    if outcomes["failed"]:
        raise UserError(
            f"{len(outcomes['failed'])} of {len(requests)} requests failed; fix them and run the same line again"
        )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
