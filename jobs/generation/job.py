"""``loomvideo generate``: one file, or a batch over a pool of Ray actors."""

import dataclasses
from pathlib import Path

from loomvideo.jobs.generation.config import GenerateConfig
from loomvideo.model.loading import ModelSource, available_bytes, fitted, source_peaks
from loomvideo.model.peaks import GIB, Work
from loomvideo.pipelines.generation.beside import WriterBeside
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.memory import largest_work
from loomvideo.pipelines.generation.requests import Request, read_requests
from loomvideo.pipelines.generation.shortcut_error import ShortcutError, measure_shortcuts, num_runs
from loomvideo.platform.console import bars, console, table
from loomvideo.platform.errors import UserError
from loomvideo.platform.folders import absolute
from loomvideo.platform.nodes.devices import device_of


def run(config: GenerateConfig) -> None:
    """Generate what the configuration says.

    Raises:
        UserError: in one line, for whatever cannot be done.
    """
    refused: list[str] = []
    requests = list(read_requests(Path(config.batch), refused)) if config.batch else [single_request(config)]
    config.check()
    for key in ("workers", "ranks", "sequence_ranks"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: must be at least 1")
    if config.ranks % config.sequence_ranks:
        raise UserError(f"sequence_ranks={config.sequence_ranks}: must divide ranks={config.ranks}")
    if config.seeds and (config.batch or config.ranks > 1 or config.whole):
        raise UserError("seeds: are for one request on one process; leave out batch, ranks and whole")
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds={config.seeds}: names one twice")
    if config.whole and config.ranks > 1:
        raise UserError(f"ranks={config.ranks}: whole=true edits on one process; set ranks=1")
    if config.decode_beside and not (config.batch or config.seeds):
        raise UserError("decode_beside=true: there is no next result to denoise; set batch= or seeds=")
    if config.decode_beside and (config.whole or config.ranks > 1):
        raise UserError("decode_beside=true: is for results that one process makes at once; leave out whole and ranks")
    source = config.model_source()
    source.check()
    source.size.grid.check_frames("num_frames", config.num_frames)
    if config.batch or config.ranks > 1:
        _run_on_ray(config, requests, refused)
    elif config.seeds:
        _run_seeds(config, requests[0])
    else:
        _run_here(config, requests[0])


def preview(config: GenerateConfig) -> None:
    """Print how much memory each way of using it would need, and which one would be taken.

    Raises:
        UserError: as :func:`run`, for what needs no file.
    """
    config.check()
    source = config.model_source()
    requests = list(read_requests(Path(config.batch))) if config.batch else []
    if not requests and config.task:
        requests = [single_request(config)]
    _print_peaks(source, largest_work(source.size, config, requests))


def single_request(config: GenerateConfig) -> Request:
    """The request of the command line, checked as far as it can be without its files."""
    for key in ("task", "prompt", "out"):
        if not getattr(config, key):
            raise UserError(f"{key}: set {key}=…, or batch=FILE.jsonl")
    request = Request(config.task, config.prompt, config.out, config.source, list(config.refs), seed=config.seed)
    request.check()
    return request


def _run_here(config: GenerateConfig, request: Request) -> None:
    measures = config.measure_error and bool(config.shortcuts.alone()) and not config.whole
    generator = FileGenerator.load(config.model_source(drop_exact=not measures), config, [request])
    rows: list[ShortcutError] = []
    try:
        if config.whole:
            with bars() as bar:
                task = bar.add_task("denoising", total=None)
                path = generator.generate(request, lambda step, total: bar.update(task, completed=step, total=total))
            print(path)
            return
        prepared = generator.prepare(request)
        with bars() as bar:
            task = bar.add_task("denoising", total=config.shortcuts.steps or config.steps)
            if measures:
                bar.update(task, total=num_runs(config.shortcuts))
                latents, rows = measure_shortcuts(generator, prepared, lambda name: bar.advance(task))
            else:
                latents = generator.sample(
                    prepared, on_step=lambda step, total: bar.update(task, completed=step, total=total)
                )
        path = generator.write(prepared, latents)
    finally:
        generator.close()
    if prepared.frames_left_out:
        all_frames = prepared.num_frames + prepared.frames_left_out
        print(f"edited the first {prepared.num_frames} of {all_frames} frames; whole=true edits all")
    if rows:
        _print_errors(rows)
    elif config.shortcuts.alone():
        print(f"approximate: {', '.join(config.shortcuts.alone())}; measure_error=true prints the error")
    print(path)


def _run_seeds(config: GenerateConfig, request: Request) -> None:
    out = Path(request.out)
    requests = [
        dataclasses.replace(request, seed=seed, out=str(out.with_name(f"{out.stem}-{seed}{out.suffix}")))
        for seed in config.seeds
    ]
    generator = FileGenerator.load(config.model_source(drop_exact=True), config, [request])
    beside = WriterBeside(generator) if config.decode_beside else None
    try:
        with bars() as bar:
            task = bar.add_task("denoising", total=None)
            made = generator.generate_seeds(
                requests,
                lambda step, total: bar.update(task, completed=step, total=total),
                beside.write if beside else None,
            )
            paths = list(made)
    finally:
        if beside:
            beside.close()
        generator.close()
    print("\n".join(map(str, paths)))


def _print_peaks(source: ModelSource, work: Work) -> None:
    """The need of every way of using memory, the codec's within its own limit, and what would be taken."""
    needs = table("memory", "mllm_bits", "dit_bits", "encode", "denoise", "decode", "GiB", figures=True)
    for mllm_bits, dit_bits in dict.fromkeys([(source.mllm_bits, source.dit_bits), (16, 16), (8, 16), (4, 16), (4, 8)]):
        variant = dataclasses.replace(source, mllm_bits=mllm_bits, dit_bits=dit_bits)
        for peak in source_peaks(variant, work):
            stages = (peak.encode, peak.denoise, peak.decode)
            figures = (f"{stage / GIB:.1f}" for stage in (*stages, max(stages)))
            needs.add_row(peak.mode, str(mllm_bits), str(dit_bits), *figures)
    shape = f"{work.width}x{work.height}x{work.num_frames}"
    out = console()
    out.print(f"{work.task} {shape}, {len(work.references)} references; estimated GiB:")
    out.print(needs)
    device = device_of(source.device)
    free = source.memory_bytes or available_bytes(device)
    chosen = fitted(source, work).memory
    out.print(f"{device}: {free / GIB:.1f} GiB to use; memory={source.memory} takes {chosen}")


def _print_errors(rows: list[ShortcutError]) -> None:
    errors = table("denoising", "seconds", "faster", "latent error", "PSNR", figures=True)
    for row in rows:
        error = ("", "") if row.name == "exact" else (f"{row.latent_error:.2%}", f"{row.psnr_db:.1f} dB")
        errors.add_row(row.name, f"{row.seconds:.2f}", f"{row.speedup:.2f}x", *error)
    console().print(errors)


def _run_on_ray(config: GenerateConfig, requests: list[Request], refused: list[str]) -> None:
    from loomvideo.jobs.generation.actors import generate_all
    from loomvideo.platform.ray_session import ray_session

    if not requests:
        raise UserError(refused[0] if refused else f"batch={config.batch}: holds no request")
    outcomes: dict[str, list[str]] = {"done": [], "kept": [], "failed": []}
    messages = list(refused)
    for message in refused:
        print(message)
    with ray_session(), bars() as bar:
        task = bar.add_task("generating", total=len(requests))
        elsewhere = [_absolute_request(request) for request in requests]
        made = generate_all(_absolute_config(config), elsewhere)
        for request, (_, (outcome, message)) in zip(requests, made, strict=True):
            outcomes[outcome].append(request.out)
            if message:
                messages.append(message)
                print(f"{request.out}: {message}")
            bar.advance(task)
    if config.shortcuts.alone():
        print(f"approximate: {', '.join(config.shortcuts.alone())}; one file alone prints the error")
    print(", ".join(f"{len(paths)} {outcome}" for outcome, paths in outcomes.items()))
    num_requests = len(requests) + len(refused)
    if num_requests == 1 and messages:
        raise UserError(messages[0])
    if messages:
        raise UserError(f"{len(messages)} of {num_requests} requests failed; fix them and run the same line again")


def _absolute_config(config: GenerateConfig) -> GenerateConfig:
    """The same configuration for actors, which may run in another folder."""
    source = config.model_source().absolute()
    folders = {"codec_folder": source.codec_folder, "mllm_folder": source.mllm_folder, "lora": list(source.lora)}
    return dataclasses.replace(config, checkpoint=source.weights, model=source.model, **folders)


def _absolute_request(request: Request) -> Request:
    refs = [absolute(path) for path in request.refs]
    return dataclasses.replace(request, out=absolute(request.out), source=absolute(request.source), refs=refs)
