"""The data path against plain alternatives on the same cores: `make bench-data`.

    python benchmarks/data_bench.py data/sample/samples.jsonl --samples 96 --builders 2

encode   the prepare job (without Ray's start) against a plain single-process loop with the same decoder, codec and
         MLLM, and against as many of these loops at once: what the cores give (run it on an idle machine)
write    MB/s and peak memory of our shard writer, webdataset.ShardWriter and ray.data.Dataset.write_webdataset
read     samples/s of random reads and of a pass in order, against wids and webdataset
decode   frames/s of decord and PyAV, in process and isolated
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PARTS = ("encode", "write", "read", "decode")


def config_for(samples: Path, output: Path, count: int, bucket: int = 64):
    """The tiny preset on samples spread over a file."""
    from loomvideo.jobs.command import job_config
    from loomvideo.pipelines.prepare.config import PrepareConfig

    chosen = output.parent / f"bench-{count}.jsonl"
    lines = samples.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:: max(len(lines) // count, 1)][:count]]
    for row in rows:
        for name in ("target", "source"):
            if row.get(name):
                row[name] = str((samples.parent / row[name]).absolute())
        row["references"] = [str((samples.parent / path).absolute()) for path in row.get("references", [])]
    chosen.write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = [f"input={chosen}", f"output={output}", "shards.max_samples=16", f"clips.buckets=[{bucket}]"]
    return job_config(PrepareConfig, "data-prepare", arguments)


def plain_loop(samples: Path, folder: Path, count: int, bucket: int) -> dict[str, float]:
    """Decode, encode and write one sample after another in one process, with webdataset's writer."""
    import safetensors.torch
    import torch
    import webdataset

    from loomvideo.model.buckets import resize_and_crop
    from loomvideo.model.sizes import model_size
    from loomvideo.pipelines.media.decode import open_media
    from loomvideo.pipelines.prepare import encode
    from loomvideo.pipelines.prepare.geometry import plan_clips
    from loomvideo.pipelines.prepare.inputs import read_inputs
    from loomvideo.pipelines.prepare.load import LoadedSample

    torch.set_num_threads(1)
    config = config_for(samples, folder / "plain", count, bucket)
    encoder = encode.SampleEncoder(model_size(config.model), config.features)
    grid = model_size(config.model).grid
    inputs = list(read_inputs(config).samples())
    began, cpu = time.perf_counter(), time.process_time()
    (folder / "plain").mkdir()
    base = Path(config.input).parent
    with webdataset.ShardWriter(str(folder / "plain" / "%06d.tar"), maxcount=16, verbose=0) as writer:
        for sample in inputs:
            opened = {path: open_media(str(base / path)) for path in (sample.target, sample.source, *sample.references)
                      if path}  # fmt: skip
            references = [opened[path].info for path in sample.references]
            source = opened[sample.source].info if sample.source else None
            clips = plan_clips(sample, opened[sample.target].info, source, references, config.clips, config.seed, grid)
            loaded = LoadedSample(sample, clips, 24.0, 24.0, {})
            loaded.target = [_clip(opened[sample.target], clips.target[0], clips.bucket, resize_and_crop)]
            if sample.source:
                loaded.source = [_clip(opened[sample.source], clips.source[0], clips.bucket, resize_and_crop)]
            loaded.references = [
                _clip(opened[path], (0,), bucket, resize_and_crop)[0]
                for path, bucket in zip(sample.references, clips.reference_buckets, strict=True)
            ]
            encoded = encoder.encode(loaded, "train")
            row = {f"{member}.safetensors": safetensors.torch.save(t) for member, t in encoded.tensors.items()}
            writer.write({"__key__": sample.key, "json": encoded.metadata, **row})
    seconds = time.perf_counter() - began
    cpu_s = time.process_time() - cpu
    return {
        "samples_per_s": len(inputs) / seconds,
        "ms_per_sample": 1e3 * seconds / len(inputs),
        "cpu_ms_per_sample": 1e3 * cpu_s / len(inputs),
    }


def _clip(media, indices, bucket, resize_and_crop):
    import numpy as np

    return resize_and_crop(np.concatenate(list(media.read(indices))), bucket)


def prepared(samples: Path, folder: Path, count: int, builders: int, bucket: int) -> dict[str, float]:
    """The prepare job on Ray; timed from the first builder's start to the finished manifest, and as a whole."""
    import ray

    from loomvideo.pipelines.prepare.job import prepare

    config = config_for(samples, folder / "prepared", count, bucket)
    config.workers.count = builders
    began = time.perf_counter()
    ray.init(num_cpus=builders, include_dashboard=False, logging_level="error")
    start_s = time.perf_counter() - began
    marks: list[tuple[float, float]] = []
    result = prepare(config, on_progress=lambda report, total: marks.append((time.perf_counter(), machine_cpu_s())))
    written, end, cpu_s = result.summary()["written"], time.perf_counter(), machine_cpu_s()
    ray.shutdown()
    # The first report is the shared tensors': builders are up, models loaded.
    first, first_cpu_s = marks[0]
    busy_s = end - first
    return {
        "samples_per_s": written / busy_s,
        "ms_per_sample": 1e3 * busy_s / written,
        "cpu_ms_per_sample": 1e3 * (cpu_s - first_cpu_s) / written,
        "ray_start_s": start_s,
        "builders_start_s": first - began - start_s,
        "whole_s": end - began,
    }


def machine_cpu_s() -> float:
    """Processor seconds of all processes since the machine started: Ray's own count too."""
    user, nice, system = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def plain_loops(samples: Path, folder: Path, count: int, processes: int, bucket: int) -> dict[str, float]:
    """Plain loops that share the samples, one a core."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        folders = [folder / f"plain-{number}" for number in range(processes)]
        for one in folders:
            one.mkdir()
        runs = [pool.submit(plain_loop, samples, one, count // processes, bucket) for one in folders]
        rows = [run.result() for run in runs]
    return {
        "samples_per_s": sum(row["samples_per_s"] for row in rows),
        "ms_per_sample": statistics.mean(row["ms_per_sample"] for row in rows) / processes,
        "cpu_ms_per_sample": statistics.mean(row["cpu_ms_per_sample"] for row in rows),
    }


def builder_alone(samples: Path, folder: Path, count: int, bucket: int) -> dict[str, float]:
    """One shard builder in this process, its decoder process counted: what a sample costs without Ray."""
    from loomvideo.pipelines.prepare import job
    from loomvideo.pipelines.prepare.builder import ShardBuilder

    config = config_for(samples, folder / "alone", count, bucket)
    found: dict[str, float] = {}

    def run(stage, config, work):
        builder = ShardBuilder(config)
        began, cpu = time.perf_counter(), cpu_seconds(builder.loader.decoder)
        yield from (builder(row) for row in work)
        seconds = time.perf_counter() - began
        cpu_s = cpu_seconds(builder.loader.decoder) - cpu
        builder.loader.close()
        found.update(samples_per_s=count / seconds, ms_per_sample=1e3 * seconds / count)
        found["cpu_ms_per_sample"] = 1e3 * cpu_s / count

    original, job.run_stage = job.run_stage, run
    job.prepare(config)
    job.run_stage = original
    return found


def bench_encode(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Plain loop and prepare job."""
    plain = plain_loop(arguments.input, folder, arguments.samples, arguments.bucket)
    rows = {
        "plain loop, 1 process": plain,
        "one builder, 1 process": builder_alone(arguments.input, folder, arguments.samples, arguments.bucket),
    }
    if arguments.ray:
        ours = prepared(arguments.input, folder, arguments.samples, arguments.builders, arguments.bucket)
        ours["speed_up"] = ours["samples_per_s"] / plain["samples_per_s"]
        rows[f"prepare, {arguments.builders} builders"] = ours
        loops = plain_loops(arguments.input, folder, arguments.samples, arguments.builders, arguments.bucket)
        loops["speed_up"] = loops["samples_per_s"] / plain["samples_per_s"]
        rows[f"plain loop, {arguments.builders} processes"] = loops
    return rows


WRITE_SAMPLES, WRITE_BYTES = 64, 4 * 2**20
# Runs one writer in a process of its own and prints seconds, CPU seconds and added peak MB of the busiest process.
WRITE_SCRIPT = """
import sys, pathlib
sys.path.insert(0, {folder!r})
import data_bench
print(*data_bench.{name}(pathlib.Path({output!r})))
"""


def measured(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and megabytes by which the peak memory of this process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return seconds, cpu_s, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def latents(number: int):
    """One sample's tensors, 4 MB that are no constant."""
    import torch

    return {"mean.0": torch.full((WRITE_BYTES // 2,), float(number), dtype=torch.bfloat16)}


def write_ours(folder: Path, sync: bool = True) -> tuple[float, float, float]:
    """One shard through our writer: checksums, index rows, commit record, synced to disk."""
    from loomvideo.platform.shards import storage as storage_module
    from loomvideo.platform.shards.sample import ShardSample
    from loomvideo.platform.shards.storage import Storage
    from loomvideo.platform.shards.writer import write_shard

    if not sync:
        storage_module._sync = lambda path: None
    metadata = {"task": "t2v", "dataset": "bench", "split": "train", "bucket": [64, 64], "num_frames": 1}
    stream = ((i, ShardSample(f"{i:06d}", dict(metadata), {"target": latents(i)})) for i in range(WRITE_SAMPLES))
    return measured(lambda: write_shard(Storage(folder), "train-000000", "train", stream))


def write_ours_without_sync(folder: Path) -> tuple[float, float, float]:
    """The same, left to the page cache as the others are."""
    return write_ours(folder, sync=False)


def write_webdataset(folder: Path) -> tuple[float, float, float]:
    """The same samples through webdataset.ShardWriter."""
    import safetensors.torch
    import webdataset

    folder.mkdir(parents=True)

    def work() -> None:
        with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=WRITE_SAMPLES, maxsize=2**40, verbose=0) as out:
            for i in range(WRITE_SAMPLES):
                row = {"target.safetensors": safetensors.torch.save(latents(i)), "json": {}}
                out.write({"__key__": f"{i:06d}", **row})

    return measured(work)


def write_ray(folder: Path) -> tuple[float, float, float]:
    """The same through Ray Data's own write; started before, and the busiest worker's memory is what counts."""
    import psutil
    import ray

    # Workers import this file to make the samples.
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", runtime_env=here)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.range(1).map(lambda row: row).materialize()

    def sample(row: dict) -> dict:
        import safetensors.torch

        return {"__key__": f"{row['id']:06d}", "target.safetensors": safetensors.torch.save(latents(row["id"]))}

    peaks: dict[int, list[int]] = {}
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                        peaks.setdefault(process.pid, []).append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        rows = ray.data.range(WRITE_SAMPLES, override_num_blocks=4).map(sample)
        rows.write_webdataset(str(folder), min_rows_per_file=WRITE_SAMPLES)
        seconds = time.perf_counter() - began
    finally:
        finished.set()
        watcher.join()
    ray.shutdown()
    return seconds, float("nan"), max(max(sizes) - sizes[0] for sizes in peaks.values()) / 2**20


def bench_write(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Each writer in processes of its own, in turns; medians."""
    names = ["write_ours", "write_ours_without_sync", "write_webdataset", *(("write_ray",) if arguments.ray else ())]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(arguments.trials):
        for name in names:
            output = str(folder / name)
            code = WRITE_SCRIPT.format(folder=str(Path(__file__).parent), name=name, output=output)
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            found[name].append(tuple(map(float, out.split()[-3:])))
            shutil.rmtree(output)
    rows = {}
    for name, trials in found.items():
        seconds, cpu_s, peak_mb = (statistics.median(values) for values in zip(*trials, strict=True))
        rate = WRITE_SAMPLES * WRITE_BYTES / 1e6 / seconds
        rows[name] = {"MB_per_s": rate, "seconds": seconds, "cpu_s": cpu_s, "added_peak_MB": peak_mb}
    return rows


def bench_read(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Random and sequential reads of the prepared dataset."""
    import random

    import safetensors.torch
    import webdataset
    import wids

    from loomvideo.platform.shards.reader import ShardDataset

    output = folder / "prepared"
    if not output.exists() and arguments.ray:
        prepared(arguments.input, folder, arguments.samples, arguments.builders, arguments.bucket)
    elif not output.exists():
        output = folder / "alone"
        builder_alone(arguments.input, folder, arguments.samples, arguments.bucket)
    dataset = ShardDataset.open(output)
    order = random.Random(0).sample(range(len(dataset)), len(dataset))

    def rate(work) -> dict[str, float]:
        # What is read lies in the page cache: CPU time is what a busy machine does not stretch.
        work()
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < 2.0:
            count += work()
        return {
            "samples_per_s": count / (time.perf_counter() - began),
            "samples_per_cpu_s": count / (time.process_time() - cpu),
        }

    def random_reads() -> int:
        return sum(1 for row in order if dataset.read(row))

    def in_order() -> int:
        return sum(1 for row in range(len(dataset)) if dataset.read(row))

    def latents_only() -> int:
        return sum(1 for row in order if dataset.read(row, select=lambda member, name: member == "target"))

    def parsed(row: dict) -> int:
        for name, value in row.items():
            if name.endswith("safetensors"):
                safetensors.torch.load(value if isinstance(value, bytes) else value.read())
            elif name.endswith("json"):  # ours reads it too, and checks the key
                json.loads(value if isinstance(value, bytes) else value.read())
        return 1

    def sequential() -> int:
        urls = [str(path) for path in sorted((output / "shards").glob("*.tar"))]
        return sum(parsed(row) for row in webdataset.WebDataset(urls, shardshuffle=False))

    listed = wids.ShardListDataset(str(output / "wids.json"), transformations=[], keep=True)

    def wids_random() -> int:
        return sum(parsed(listed[row]) for row in order)

    return {
        "ours, random, everything": rate(random_reads),
        "wids, random, everything": rate(wids_random),
        "ours, random, target latents": rate(latents_only),
        "ours, in order, everything": rate(in_order),
        "webdataset, in order, everything": rate(sequential),
    }


def bench_decode(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Frames a second of the clips of the samples."""
    from loomvideo.pipelines.media.decode import open_media
    from loomvideo.pipelines.media.decode_process import IsolatedDecoder

    rows = [json.loads(line) for line in arguments.input.read_text().splitlines()]
    paths = [str(arguments.input.parent / row["target"]) for row in rows if row["target"].endswith(".mp4")]
    paths = paths[: arguments.samples]
    isolated = IsolatedDecoder()
    isolated.start()

    def in_process(backend: str):
        def frames(path: str) -> int:
            media = open_media(path, backend)
            return sum(len(chunk) for chunk in media.read(range(media.info.num_frames)))

        return frames

    def in_child(path: str) -> int:
        return sum(len(chunk) for chunk in isolated.read(path, range(isolated.probe(path).num_frames)))

    ways = {"decord": in_process("decord"), "PyAV": in_process("pyav"), "decord, isolated": in_child}
    found = {}
    for name, frames in ways.items():
        frames(paths[0])
        began, cpu = time.perf_counter(), cpu_seconds(isolated)
        count = sum(frames(path) for path in paths)
        seconds, cpu_s = time.perf_counter() - began, cpu_seconds(isolated) - cpu
        found[name] = {
            "frames_per_s": count / seconds,
            "ms_per_file": 1e3 * seconds / len(paths),
            "cpu_ms_per_file": 1e3 * cpu_s / len(paths),
        }
    isolated.close()
    return found


def cpu_seconds(decoder) -> float:
    """CPU time of this process and the decoder's, which a busy machine does not stretch."""
    import psutil

    child = psutil.Process(decoder.start().pid).cpu_times()
    return time.process_time() + child.user + child.system


def main() -> None:
    """Run the parts and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--builders", type=int, default=2)
    parser.add_argument("--bucket", type=int, default=64, help="clips.buckets of the encode part")
    parser.add_argument("--trials", type=int, default=5, help="of the write part")
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, default=True, help="also what starts Ray")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="data-bench-"))
    for part in arguments.parts:
        rows = globals()[f"bench_{part}"](arguments, folder)
        print(f"\n{part}")
        for name, values in rows.items():
            print(f"  {name:32}" + "  ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
    print(f"\npeak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
