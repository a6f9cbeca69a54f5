"""``loomvideo data inspect|diff|plan|verify|report|quarantine|remove|compact``: before and after a prepare."""

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from loomvideo.jobs.command import job_config
from loomvideo.platform.console import console, table_of
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from loomvideo.platform.shards import ShardDataset

DatasetFolder = Annotated[str, typer.Argument(metavar="DIR", help="dataset folder or URL")]
Overrides = Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]…", help="as for `data prepare`")]

_MOST_SHOWN = 200
_INDEX_HEADERS = {
    "num_frames": "frames",
    "count_all": "samples",
    "num_bytes_mean": "bytes each",
    "dit_tokens_mean": "DiT tokens",
    "mllm_tokens_mean": "MLLM tokens",
}
"""Headers of aggregated index columns; means are over samples."""


def register(app: typer.Typer) -> None:
    """Add the commands to ``loomvideo data``."""
    app.command()(inspect)
    app.command()(diff)
    app.command()(plan)
    app.command()(verify)
    app.command()(report)
    app.command()(remove)
    app.command()(compact)
    quarantine = typer.Typer(name="quarantine", help="What was not written, and why.", no_args_is_help=True)
    quarantine.command("ls")(quarantine_ls)
    quarantine.command("retry")(quarantine_retry)
    quarantine.command("export")(quarantine_export)
    app.add_typer(quarantine)


def inspect(folder: DatasetFolder) -> None:
    """Print what a dataset holds: counts, sizes, tasks, buckets and one sample's members."""
    from loomvideo.platform.shards import ShardDataset

    out, dataset = console(), ShardDataset.open(folder)
    manifest, index = dataset.manifest, dataset.index
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    out.print(
        f"{folder}: {len(dataset)} samples in {len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB, "
        f"digest {dataset.digest[:16]}",
        soft_wrap=True,
    )
    for name, value in {"encoders": manifest.encoders, "features": manifest.features}.items():
        out.print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in value.items()), soft_wrap=True)
    _print_rows(out, "accounts", [{"dataset": name, **count} for name, count in manifest.counts.items()])
    measures = [([], "count_all"), ("num_bytes", "mean"), ("dit_tokens", "mean"), ("mllm_tokens", "mean")]
    for title, keys in (("tasks", ["split", "task"]), ("buckets", ["width", "height", "num_frames"])):
        groups = index.group_by(keys).aggregate(measures).sort_by([(key, "ascending") for key in keys]).to_pylist()
        _print_rows(
            out, title, [{_INDEX_HEADERS.get(name, name): value for name, value in row.items()} for row in groups]
        )
    if len(dataset):
        _print_sample(dataset, out)


def _print_sample(dataset: "ShardDataset", out: Console) -> None:
    import pyarrow.compute as pc

    # The sample with most members says most about the format.
    row = pc.list_value_length(dataset.index.column("members")).to_pylist()
    row = row.index(max(row))
    sample = dataset.read(row)
    members = [
        {"member": member, "tensor": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[-1]}
        for member, tensors in sorted(sample.tensors.items())
        for name, tensor in sorted(tensors.items())
    ]
    _print_rows(out, f"sample {sample.key}", members)
    out.print(json.dumps(sample.metadata, indent=1, ensure_ascii=False), soft_wrap=True, markup=False)
    shared = dataset.shared()
    _print_rows(out, "shared tensors", [{"tensor": name, "shape": list(t.shape)} for name, t in shared.items()])


def _print_rows(out: Console, title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        out.print(table_of(rows, title))


def _prepare_config(overrides: list[str]) -> Any:
    from loomvideo.pipelines.prepare.config import PrepareConfig

    return job_config(PrepareConfig, "data-prepare", overrides)


def diff(
    overrides: Overrides,
    workers: Annotated[
        int,
        typer.Option(
            help="compare on the Ray cluster, with so many tasks at most that look at samples' files: the driver holds "
            "nothing of the input; 0: this process compares"
        ),
    ] = 0,
) -> None:
    """Say what of a dataset is stale and why, with the arguments of `data prepare`; exit code 1 when something is."""
    from loomvideo.pipelines.prepare.stages import reached_by_workers
    from loomvideo.pipelines.prepare.staleness import stale_parts

    config = _prepare_config(overrides)
    if workers:
        from loomvideo.pipelines.prepare.staleness_on_ray import stale_parts_on_ray
        from loomvideo.platform.ray_session import ray_session

        with ray_session():
            parts = stale_parts_on_ray(reached_by_workers(config), workers, _MOST_SHOWN)
        found, count = parts.first, parts.count
    else:
        found = stale_parts(config)
        count = len(found)
    if not found:
        print("up to date")
        return
    console().print(table_of([vars(part) for part in found[:_MOST_SHOWN]]))
    if count > _MOST_SHOWN:
        print(f"and {count - _MOST_SHOWN} more")
    raise typer.Exit(1)


def plan(
    overrides: Overrides,
    probes: Annotated[int, typer.Option(help="samples to make for real; 0 measures nothing")] = 20,
    workers: Annotated[int, typer.Option(help="builders that the duration is stated for")] = 1,
    read_gb_per_s: Annotated[float, typer.Option(help="gigabytes a second of storage for one training GPU")] = 1.0,
    recompute_us_per_token: Annotated[
        float, typer.Option(help="microseconds of the MLLM a token on a training GPU; 55 is estimated for an H100")
    ] = 55.0,
) -> None:
    """Say what `data prepare` with these arguments will cost, and which feature mode fits the storage."""
    from loomvideo.pipelines.prepare.cost import estimate_cost

    config = _prepare_config(overrides)
    cost = estimate_cost(config, probes, read_gb_per_s, recompute_us_per_token)
    out = console()
    out.print(f"{cost.num_samples} samples in {cost.num_shards} shards")
    rows = [
        {
            "features": mode.mode,
            "KB a sample": f"{mode.bytes_per_sample / 1e3:.1f}",
            "GB": f"{mode.total_bytes / 1e9:.3f}",
            "read ms a sample": f"{mode.read_s_per_sample * 1e3:.2f}",
        }
        for mode in cost.modes
    ]
    out.print(table_of(rows, "sizes (estimated from the largest bucket)"))
    if cost.measured:
        stages = ", ".join(f"{name} {value:.3g}" for name, value in cost.measured.items())
        out.print(f"measured on this machine: {stages}")
        needed, allowed = int(cost.measured["decoders"]), 1 + config.workers.decoders
        limit = "decoding" if needed > allowed else "encoding"
        rate = 1 / cost.measured["sample_s"]
        unit = "GPU" if config.workers.gpus else "worker"
        out.print(f"{needed} core{'s' if needed > 1 else ''} to decode feed a {unit}; workers.decoders="
                  f"{config.workers.decoders} and its own allow {allowed}")  # fmt: skip
        out.print(f"{rate:.2f} samples/s a worker, {limit} limits; {cost.hours(workers):.2f} h on {workers}, "
                  f"{cost.hours(1):.2f} {unit}-hours")  # fmt: skip
    else:
        out.print("nothing measured: the encoders' weights are not here, or --probes 0")
    if cost.captions is not None:
        out.print(f"texts: {cost.captions} (answers in {config.captions.cache} cost nothing)", soft_wrap=True)
    if cost.judge is not None:
        out.print(f"judging: {cost.judge} (answers in {config.judge.cache} cost nothing)", soft_wrap=True)
    if cost.losses:
        out.print("losses among them: " + ", ".join(f"{count} {reason}" for reason, count in cost.losses.items()))
    out.print(f"recommended: features {cost.recommended}: {cost.why}", soft_wrap=True)


def verify(
    folder: DatasetFolder,
    samples: Annotated[int, typer.Option(help="samples to make again from their files and compare")] = 0,
    workers: Annotated[
        int, typer.Option(help="workers at most that read tars on the Ray cluster; 0: this process reads them all")
    ] = 0,
) -> None:
    """Check checksums, offsets, shapes and accounts; exit code 1 when something is wrong."""
    from loomvideo.pipelines.prepare.pools import Pool
    from loomvideo.pipelines.prepare.quarantine import saved_config
    from loomvideo.pipelines.prepare.verify import Problem, verify, verify_content, verify_on_actors
    from loomvideo.platform.folders import absolute
    from loomvideo.platform.shards.reader import ShardDataset

    dataset = ShardDataset.open(folder)
    if workers:
        from loomvideo.platform.ray_session import ray_session

        with ray_session():
            found = list(verify_on_actors(dataset, absolute(folder), Pool(workers, 1.0)))
    else:
        found = list(verify(dataset))
    if samples and not found:
        for line in verify_content(dataset, saved_config(folder), samples):
            if isinstance(line, Problem):
                found.append(line)
            else:
                print(line)
    for problem in found:
        print(f"{problem.where}: {problem.what}")
    print(f"{folder}: {len(dataset)} samples in {len(dataset.manifest.shards)} shards, {len(found)} problems")
    if found:
        raise typer.Exit(1)


def report(
    folder: DatasetFolder,
    samples: Annotated[
        int, typer.Option(help="samples of which strips of frames are stored, spread over outcomes, reasons and tasks")
    ] = 240,
    seconds: Annotated[float, typer.Option(help="begin no strip after so many seconds")] = 600.0,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="show it on this machine's loopback, with media that a page does not reach by itself: "
            "object stores, parts of films, other codecs; an up-to-date report is not written again"
        ),
    ] = False,
    port: Annotated[int, typer.Option(help="port of --serve")] = 8765,
) -> None:  # fmt: skip
    """Write DIR/report.html and DIR/report/: accounts, losses, distributions, and a gallery of all samples to filter.

    The page opens from a file or any static server that has both; rows are loaded as they are looked at.
    """
    from loomvideo.pipelines.gallery.report import is_current, write_report
    from loomvideo.platform.shards.reader import ShardDataset

    dataset = ShardDataset.open(folder)
    if serve:
        from loomvideo.pipelines.gallery.server import check_port

        check_port(port)
    if not serve or not is_current(dataset):
        try:
            print(write_report(dataset, samples, seconds))
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise
            raise UserError(
                f"{folder}: a report is written beside the shards, and this store takes no writing ({error}); run it "
                f"where it may be written, or look at the dataset with `loomvideo data inspect {folder}`, which reads"
            ) from error
    if serve:
        from loomvideo.pipelines.gallery.server import create_app, run_app

        print(f"http://localhost:{port}/ shows {folder}; end with Ctrl-C", flush=True)
        run_app(create_app(folder), port)


def remove(
    folder: DatasetFolder,
    source: Annotated[list[str], typer.Option(help="key, group, media path, source_id or sku; repeatable")],
) -> None:
    """Take samples down: hidden at once and left out by later prepares; `data compact` rewrites their tars."""
    from loomvideo.pipelines.gallery.report import remove_report
    from loomvideo.pipelines.prepare.identities import planned_identities
    from loomvideo.platform.shards.storage import Storage
    from loomvideo.platform.shards.takedown import remove

    storage = Storage(folder)
    keys = remove(folder, source, planned_identities(storage))
    # It names and shows what was taken down.
    remove_report(storage)
    print(f"{folder}: removed {len(keys)} samples: {', '.join(keys[:10])}{' …' if len(keys) > 10 else ''}")
    print(f"the report, which showed them, is gone too; `loomvideo data report {folder}` writes it anew")


def compact(
    folder: DatasetFolder,
    redeal: Annotated[
        bool, typer.Option("--redeal", help="deal all samples into shards anew, as a first prepare would")
    ] = False,
) -> None:
    """Rewrite the tars that hold removed samples; with --redeal all, so that many small additions become full shards.

    Encoded members are copied, never made again. Dealing anew holds both sets of shards until the new one is whole.
    """
    if redeal:
        from loomvideo.jobs.data.prepare import run
        from loomvideo.pipelines.prepare.quarantine import saved_config

        run(saved_config(folder), redeal=True)
        return
    from loomvideo.platform.shards.takedown import compact

    shards = compact(folder)
    print(f"{folder}: rewrote {len(shards)} shards" if shards else f"{folder}: nothing to compact")


def quarantine_ls(
    folder: DatasetFolder,
    reason: Annotated[str, typer.Option(help="list the samples of this reason")] = "",
) -> None:
    """Count losses by reason, or list the samples of one."""
    from loomvideo.pipelines.prepare.quarantine import by_reason, ledger

    losses = ledger(folder)
    if not reason:
        console().print(table_of([vars(count) for count in by_reason(losses)], f"{len(losses)} losses"))
        return
    chosen = [loss for loss in losses if loss.reason == reason]
    names = ("key", "dataset", "retriable", "message")
    rows = [{name: getattr(loss, name) for name in names} for loss in chosen]
    console().print(table_of(rows, f"{len(chosen)} lost to {reason}"))


def quarantine_retry(folder: DatasetFolder) -> None:
    """Assess, caption and build again what misses samples that another attempt may write."""
    from loomvideo.jobs.data.prepare import run
    from loomvideo.pipelines.prepare.quarantine import retriable_work, saved_config

    work = retriable_work(folder)
    if not work:
        print(f"{folder}: nothing retriable")
        return
    run(saved_config(folder), again=work)


def quarantine_export(
    folder: DatasetFolder,
    path: Annotated[Path, typer.Argument(help="JSONL file to write")],
    reason: Annotated[str, typer.Option(help="only this reason")] = "",
) -> None:
    """Write the lost samples as JSONL."""
    from loomvideo.pipelines.prepare.quarantine import export

    print(f"{path}: {export(folder, path, reason)} samples")
