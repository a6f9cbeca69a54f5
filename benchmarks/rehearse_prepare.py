"""The encode stage of a prepare on many GPUs, rehearsed on two cores: `make bench-prepare`.

    python benchmarks/rehearse_prepare.py --gpus 8 64                 # real Ray with logical GPUs; threads for 64
    python benchmarks/rehearse_prepare.py --gpus 8 --grow             # the job starts before there is any node
    python benchmarks/rehearse_prepare.py --gpus 8 --kill 90          # a tenth of the nodes is killed after 90 s
    python benchmarks/rehearse_prepare.py --crossing                  # pixels through Ray's object store, GB/s

The real plan, pool, builders, decoders, turns, tars and records; decoding, encoding and uploading sleep for the times
of ``KINDS``, all scaled so that encoding a sample takes ``--encode-s``. Pixels are a megabyte instead of up to 290:
``--crossing`` measures what that leaves out. Decoding times vary from a half to one and a half, by key. With more than
``MOST_ON_RAY`` GPUs, or ``--threads``, there is no memory for a process each: builders and decoders are threads of this
process then, and rows come from a queue. ``before`` is the design of earlier releases: one decoder a builder, two
samples ahead, one shard at a time.

Busy is the share of time in which encoders encode: ``warm`` from each builder's tenth sample to its last, ``late`` in
the second half of its samples (all decoders start on the cores of this machine, which a cluster's do not), ``whole``
from the first sample encoded by any to the last by any. ``encoded`` counts samples as often as they were, ``written``
as the finished dataset's accounts do.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from loomvideo.pipelines.prepare import builder as builder_module
from loomvideo.pipelines.prepare.builder import ShardBuilder
from loomvideo.pipelines.prepare.load import LoadedSample
from loomvideo.pipelines.prepare.loading import Decoder
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage

# Seconds of an H100 to encode a sample (assumed: Wan's VAE in bf16, inputs of the MLLM), of a core to fetch, decode and
# resize it, and to upload a shard, as a share of encoding it.
KINDS = {"pictures": (0.02, 0.08, 0.04), "1080p": (4.0, 4.0, 0.01), "4k": (4.0, 14.0, 0.01)}
MOST_ON_RAY = 8
SHARD_SAMPLES = 48
DECODER_START_S = 3.0


class SleepingLoader:
    """Decodes for a while."""

    def __init__(self, seconds, config, base, encoders):
        self.seconds = seconds

    def load(self, sample, previous=None):
        """A megabyte of pixels, after the time that decoding this sample takes."""
        share = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:4], "big") / 2**32
        time.sleep(self.seconds * (0.5 + share))
        return LoadedSample(sample, None, 24.0, 24.0, {}, target=[torch.zeros(1 << 20, dtype=torch.uint8)])

    def close(self):
        """Nothing to end."""


class SleepingEncoder:
    """Encodes for a while, and writes down when."""

    computed_by = fingerprints = {"codec": "none", "mllm": "none"}  # noqa: RUF012
    device_name = "logical"

    def __init__(self, seconds, log):
        self.seconds = seconds
        self.log = Path(log) / f"{os.getpid()}-{id(self)}.jsonl"

    def null_features(self):
        """Nothing."""
        return {}

    def ready(self, batch):
        """Nothing to do before."""

    def encode(self, loaded, split, assessed=None, ready=None):
        """A small sample, after the time that encoding takes."""
        began = time.time()
        time.sleep(self.seconds)
        with self.log.open("a") as out:
            out.write(json.dumps([began, time.time()]) + "\n")
        metadata = {
            "task": "t2v", "dataset": loaded.sample.dataset, "split": split, "bucket": [64, 64], "num_frames": 9,
            "fps": 24.0, "num_windows": 1, "dit_tokens": 1, "mllm_tokens": 1, "fingerprints": {},
        }  # fmt: skip
        return ShardSample(loaded.sample.key, metadata, {"target": {"mean.0": torch.zeros(8, dtype=torch.bfloat16)}})


class SlowStorage(Storage):
    """Uploads shards for a while."""

    upload_s = 0.0

    @contextlib.contextmanager
    def staged(self, path):
        """As it is, and then the upload."""
        with super().staged(path) as file:
            yield file
            if path.startswith("shards/"):
                time.sleep(self.upload_s)


class SleepingBuilder(ShardBuilder):
    """The builder, with encoders, decoders and a store that sleep."""

    def __init__(self, config, times, log):
        encode_s, load_s, upload_s = times

        def loader(*arguments):
            return SleepingLoader(load_s, *arguments)

        super().__init__(config, SleepingEncoder(encode_s, log), loader)
        self.storage = SlowStorage(config.output)
        self.storage.upload_s = upload_s


class ThreadDecoder:
    """A decoder in a thread of this process: takes as long to start as a process, and one of the cluster's cores."""

    cores = threading.Semaphore(0)
    start_s = DECODER_START_S

    def __init__(self, config, encoders, loader):
        self._decoder = Decoder(config, encoders, loader)

    def wait(self):
        """Wait for a core."""
        self.cores.acquire()
        time.sleep(self.start_s)

    def load(self, plan):
        """Load it here."""
        return self._decoder.load(plan)

    def close(self):
        """Give the core back."""
        self.cores.release()


def on_threads(num_gpus, times, log):
    """In place of the pool of actors: builders in threads."""

    def run(stage, config, work):
        builder_module.DecoderHandle = ThreadDecoder
        rows, reports = queue.Queue(), queue.Queue()
        for row in work:
            rows.put(row)
        builders = [SleepingBuilder(config, times, log) for _ in range(num_gpus)]
        at_a_time = stage.pool(config).rows_at_a_time(len(work), {"GPU": num_gpus}) if config.workers.decoders else 1

        def serve(builder):
            with contextlib.suppress(queue.Empty):
                while True:
                    reports.put(builder(rows.get_nowait()))

        with ThreadPoolExecutor(num_gpus * at_a_time) as threads:
            for _ in range(at_a_time):
                for builder in builders:
                    threads.submit(serve, builder)
            for _ in work:
                yield reports.get()
        for builder in builders:
            builder.close()

    return run


def on_ray(times, log, before):
    """The pool of actors, its builders sleeping."""
    import dataclasses

    from loomvideo.pipelines.prepare.pools import map_on_actors

    def run(stage, config, work):
        pool = stage.pool(config)
        if before:
            pool = dataclasses.replace(pool, rows=1)
        yield from map_on_actors(SleepingBuilder, (config, times, log), work, pool)

    return run


def busy(folder):
    """Share of time in which encoders encoded, once warm and of the whole run."""
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in Path(folder).iterdir()]
    lines = [sorted(spans) for spans in lines if spans]
    begins, ends = min(spans[0][0] for spans in lines), max(spans[-1][1] for spans in lines)

    def share(parts):
        there = sum(spans[-1][1] - spans[0][0] for spans in parts)
        return sum(b - a for spans in parts for a, b in spans) / there if parts else float("nan")

    long = [spans for spans in lines if len(spans) > 20]
    found = {"builders": len(lines), "encoded": sum(map(len, lines)), "seconds": ends - begins}
    found |= {"warm": share([spans[9:] for spans in long]), "late": share([spans[len(spans) // 2 :] for spans in long])}
    spent = sum(b - a for spans in lines for a, b in spans)
    return found | {"whole": spent / (len(lines) * (ends - begins))}


def rehearse(kind, num_gpus, arguments, before=False):
    """One run; returns its figures."""
    from loomvideo.jobs.command import job_config
    from loomvideo.pipelines.prepare import job
    from loomvideo.pipelines.prepare.config import PrepareConfig

    encode_s, load_s, upload = KINDS[kind]
    scale = arguments.encode_s / encode_s
    times = (arguments.encode_s, load_s * scale, upload * arguments.encode_s * SHARD_SAMPLES)
    folder = Path(tempfile.mkdtemp(prefix="rehearse-"))
    (folder / "log").mkdir()
    rows = [
        {"key": f"clip-{n:07d}", "task": "t2v", "dataset": "d", "target": f"{n}.mp4", "caption": "x", "split": "train"}
        for n in range(num_gpus * SHARD_SAMPLES * (max(arguments.shards // 2, 1) if before else arguments.shards))
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = job_config(PrepareConfig, "data-prepare", [
        "preset=tiny", f"input={folder}/samples.jsonl", f"output={folder}/out", f"shards.max_samples={SHARD_SAMPLES}",
        "workers.cpus=0", "workers.gpus=1", f"workers.decoders={0 if before else 40}",
        # Twelve samples of a pretended size.
        f"workers.ready_bytes={(2 if before else 12) * 9 * 96 * 96 * 3}",
    ])  # fmt: skip
    real = num_gpus <= MOST_ON_RAY and not arguments.threads
    original = job.run_stage
    if real:
        job.run_stage = on_ray(times, str(folder / "log"), before)
    else:
        ThreadDecoder.cores = threading.Semaphore(num_gpus * 22)
        job.run_stage = on_threads(num_gpus, times, str(folder / "log"))
    decoders = []
    try:
        result = job.prepare(config, on_progress=lambda report, total: decoders.append(report.get("decoders") or 0))
    finally:
        job.run_stage = original
    row = {"kind": kind, "gpus": num_gpus, "on": "ray" if real else "threads", "design": "before" if before else "now"}
    row |= busy(folder / "log") | {"decoders_a_gpu": max(decoders)}
    return row | {"written": result.summary().get("written", 0), "of": len(rows)}


def cluster(num_gpus, cores):
    """Logical nodes: one for each GPU, and two of CPUs; returns the cluster and what adds them."""
    import ray
    from ray.cluster_utils import Cluster

    # No process waits for work on every core that is made up: there would not be memory for them.
    os.environ.update(RAY_prestart_worker_first_driver="0")
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    # Its hooks belong to the main thread, and nodes are added and killed by others.
    made = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    ray.init(address=made.address, logging_level="error", log_to_driver=False)
    nodes = []

    def grow():
        for number in range(num_gpus + 2):
            gpus = {"num_gpus": 1} if number < num_gpus else {}
            nodes.append(made.add_node(num_cpus=cores, object_store_memory=200 << 20, **gpus))

    return made, nodes, grow


def crossing(num_bytes=145_000_000, rounds=20):
    """What a clip's pixels take from a decoder to its builder: by a pipe, the object store, and another node's."""
    import numpy as np
    import ray
    from ray.cluster_utils import Cluster

    yield {"by": "pipe"} | timed(PipedClip(num_bytes), num_bytes, rounds)
    store = {"object_store_memory": 1 << 30, "num_cpus": 1}
    made = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "resources": {"near": 1}} | store)
    made.add_node(resources={"far": 1}, **store)
    ray.init(address=made.address, logging_level="error", log_to_driver=False)

    @ray.remote
    class Source:
        def __init__(self):
            self.clip = np.random.default_rng(0).integers(0, 255, num_bytes, dtype=np.uint8)

        def get(self):
            return self.clip

    for place, name in (("near", "object store"), ("far", "object stores of two nodes")):
        source = Source.options(resources={place: 1}).remote()
        yield {"by": name} | timed(lambda source=source: ray.get(source.get.remote()), num_bytes, rounds)
        ray.kill(source)
    ray.shutdown()
    made.shutdown()


class PipedClip:
    """A process that sends a clip whenever it is asked, as the decoder's own does; called, it returns one."""

    CODE = (
        "import sys; d = bytes({}); i, o = sys.stdin.buffer, sys.stdout.buffer\nwhile i.read(1): o.write(d); o.flush()"
    )

    def __init__(self, num_bytes):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-c", self.CODE.format(num_bytes)], bufsize=0, **pipes)
        fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._num_bytes = num_bytes

    def __call__(self):
        """Ask for one and read it."""
        self._process.stdin.write(b".")
        data = memoryview(bytearray(self._num_bytes))
        done = 0
        while done < self._num_bytes:
            done += self._process.stdout.readinto(data[done:])
        return data


def timed(call, num_bytes, rounds):
    """Milliseconds of a call, and of CPU in this process and all that it started."""

    def cpu():
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    call()
    time.sleep(3.0)  # until what has just started is quiet
    idle, began = cpu(), time.perf_counter()
    time.sleep(3.0)
    idle = (cpu() - idle) / (time.perf_counter() - began)
    began, spent = time.perf_counter(), cpu()
    for _ in range(rounds):
        call()
    seconds = time.perf_counter() - began
    spent = cpu() - spent - idle * seconds
    return {"MB": num_bytes / 1e6, "GB_per_s": num_bytes * rounds / 1e9 / seconds, "ms_a_clip": 1e3 * seconds / rounds,
            "cpu_ms_a_clip": 1e3 * spent / rounds}  # fmt: skip


def show(row):
    """One line."""
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def main():
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--encode-s", type=float, default=0.5, help="seconds of sleep for the encoding of a sample")
    parser.add_argument("--shards", type=int, default=4, help=f"for each GPU, of {SHARD_SAMPLES} samples")
    parser.add_argument("--cores", type=int, default=6, help="of each node on Ray; two nodes have no GPU")
    parser.add_argument("--designs", nargs="+", choices=["now", "before"], default=["now", "before"])
    parser.add_argument("--grow", action="store_true", help="start on a cluster of no nodes")
    parser.add_argument("--kill", type=float, help="seconds after which a tenth of the nodes (one) is killed")
    parser.add_argument("--threads", action="store_true", help="no Ray, whatever the number of GPUs")
    parser.add_argument("--crossing", action="store_true", help="only measure Ray's object store")
    arguments = parser.parse_args()
    if arguments.crossing:
        for row in crossing():
            show(row)
        return
    for num_gpus in arguments.gpus:
        runs = [(kind, design) for kind in arguments.kinds for design in arguments.designs]
        if num_gpus > MOST_ON_RAY or arguments.threads:
            for kind, design in runs:
                show(rehearse(kind, num_gpus, arguments, design == "before"))
            continue
        for kind, design in runs:
            with nodes_for(num_gpus, arguments) as nodes:
                # A node that did not start in Ray's own time is not there.
                show(rehearse(kind, num_gpus, arguments, design == "before") | {"nodes_started": len(nodes)})


@contextlib.contextmanager
def nodes_for(num_gpus, arguments):
    """A cluster for one run, which grows or loses nodes as asked."""
    import ray

    made, nodes, grow = cluster(num_gpus, arguments.cores)
    timers = [threading.Timer(10.0, grow)] if arguments.grow else []
    if not arguments.grow:
        grow()
    if arguments.kill:
        timers.append(threading.Timer(arguments.kill, lambda: made.remove_node(nodes[0], allow_graceful=False)))
    for timer in timers:
        timer.start()
    try:
        yield nodes
    finally:
        for timer in timers:
            timer.cancel()
        ray.shutdown()
        made.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    main()
