"""What the driver of a prepare costs by the number of samples, encoding left out: `make bench-data`.

    python benchmarks/driver_scale.py --samples 1000 10000 100000 1000000
    python benchmarks/driver_scale.py --samples 1000 10000 --s3          # on an S3 emulator, its requests counted
    python benchmarks/driver_scale.py --membership 300000                # what +0.05 %, -0.05 % and new captions redo
    python benchmarks/driver_scale.py --files 20000 200000               # all of them in one folder: pairs with texts

The real :func:`prepare` runs in a process of its own for each size: it reads the input, plans, commits the plan, and
closes the accounts. Builders are replaced by a function that commits a shard's record and an empty tar of a size; its
time is taken off. ``loop_cpu_s`` parses the input's lines and nothing else, to say how fast the machine is.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TAR_BYTES = 1024


def write_samples(
    path: Path, numbers: list[int], caption: str = "a model in a red dress walks past a white wall"
) -> None:
    """A sample file of clips that are on no disk: that they are missing is looked up, as their time would be."""
    with path.open("w") as out:
        for number in numbers:
            row = {
                "key": f"clip-{number:09d}",
                "task": "t2v",
                "dataset": f"set-{number % 3}",
                "target": f"media/{number % 1000:03d}/clip-{number:09d}.mp4",
                "caption": f"{caption}, take {number}",
                "group": f"film-{number // 8}",
                "licence": "CC-BY-4.0",
                "extra": {"source_id": f"film-{number // 8}", "fps": 24},
            }
            out.write(json.dumps(row) + "\n")


class Builders:
    """In place of the builders: commits what a plan says."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, stage, config, work):
        """Commit every row of work."""
        from loomvideo.platform.shards.storage import Storage
        from loomvideo.platform.shards.writer import write_shared

        storage = Storage(config.output)
        for row in work:
            began = time.perf_counter()
            if row["unit"] == "shared":
                record = json.dumps({"sha256": write_shared(storage, {}), "recipe": row["recipe"]})
                storage.write_bytes("work/shared.json", record.encode())
            else:
                self._build(storage, row)
            self.seconds += time.perf_counter() - began
            yield {"stage": "encode", "unit": row["unit"], "feature_error": 0.0}

    def _build(self, storage, row) -> None:
        from loomvideo.pipelines.prepare.units import read_planned
        from loomvideo.platform.shards.index import index_table
        from loomvideo.platform.shards.manifest import shard_path
        from loomvideo.platform.shards.writer import RECORD_FOLDER, ShardRecord

        planned = read_planned(storage, row)
        rows = []
        for entry in planned:
            rows.append(index_entry(entry, row["unit"]))
        if storage.is_local:
            path = Path(storage.full_path(shard_path(row["unit"])))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                out.truncate(TAR_BYTES)
        else:
            storage.write_bytes(shard_path(row["unit"]), bytes(TAR_BYTES))
        for file in row["before"]:
            storage.delete(f"{RECORD_FOLDER}/{file}")
        facts = {"encoders": {"codec": "none"}, "feature_error": {"layers": [], "embedder": 0.0, "tokens": 0}}
        record = ShardRecord(
            row["unit"], row["split"], row["recipe"], "0" * 64, TAR_BYTES, index_table(rows), [], facts
        )  # fmt: skip
        path = f"{RECORD_FOLDER}/{record.commit.file}"
        if storage.is_local:
            # Without the sync to disk that a shard is worth.
            Path(storage.full_path(path)).parent.mkdir(parents=True, exist_ok=True)
            Path(storage.full_path(path)).write_bytes(record.to_bytes())
        else:
            storage.write_bytes(path, record.to_bytes())


def index_entry(entry: dict, shard: str) -> dict:
    """An index row as a builder would write it."""
    names = ["json", "mllm", "target"]
    return {
        "key": entry["key"], "shard": shard, "slot": entry["slot"], "offset": 0, "num_bytes": 4_640_000,
        "members": names, "member_offsets": [512, 2048, 4096], "member_bytes": [900, 1200, 4_600_000],
        "split": entry["split"], "task": "t2v", "dataset": entry["dataset"], "width": 832, "height": 480,
        "num_frames": 121, "fps": 24.0, "num_windows": 2, "dit_tokens": 12_090, "mllm_tokens": 40,
        "group": entry["key"][:-1], "licence": "CC-BY-4.0",
        **{f"fingerprint_{name}": f"{hash((entry['key'], name)) & 2**64 - 1:016x}" for name in ("mllm", "target")},
    }  # fmt: skip


def peak_mb() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def config_for(input_file: Path, output: str):
    """A prepare of the tiny model."""
    from loomvideo.jobs.command import job_config
    from loomvideo.pipelines.prepare.config import PrepareConfig

    arguments = [f"input={input_file}", f"output={output}", "preset=tiny", "shards.max_samples=256"]
    return job_config(PrepareConfig, "data-prepare", arguments)


def counted_requests() -> Counter[str]:
    """Counts the calls of s3fs to its store from now on."""
    import s3fs

    calls: Counter[str] = Counter()
    original = s3fs.S3FileSystem._call_s3

    async def call(self, method, *arguments, **options):
        calls[method] += 1
        return await original(self, method, *arguments, **options)

    s3fs.S3FileSystem._call_s3 = call
    return calls


def measure(num_samples: int, folder: str) -> dict[str, float]:
    """Plan, finish and a run with nothing to do, of one size."""
    from loomvideo.pipelines.prepare import job

    calls = counted_requests() if "://" in folder else Counter()
    work = Path(tempfile.mkdtemp(prefix="driver-"))
    file = work / "samples.jsonl"
    write_samples(file, list(range(num_samples)))
    began = time.process_time()
    for line in file.open():
        json.loads(line)
    loop_s = time.process_time() - began
    config = config_for(file, folder or str(work / "out"))
    builders = Builders()
    marks: list[float] = []

    def run(stage, config, rows):
        marks.append((time.perf_counter(), time.process_time(), sum(calls.values()), peak_mb()))
        yield from builders(stage, config, rows)
        marks.append((time.perf_counter(), time.process_time(), sum(calls.values()), peak_mb()))

    job.run_stage = run
    before_mb, began, began_cpu = peak_mb(), time.perf_counter(), time.process_time()
    job.prepare(config)
    finished, finished_cpu, requests = time.perf_counter(), time.process_time(), sum(calls.values())
    (planned, planned_cpu, planned_calls, planned_mb), (built, built_cpu, built_calls, _) = marks
    first_mb, again, cpu = peak_mb(), time.perf_counter(), time.process_time()
    result = job.prepare(config)
    if result.reason != job.UP_TO_DATE:
        raise RuntimeError(f"the second run did something: {result.reason}")
    row = {
        "samples": num_samples, "loop_cpu_s": loop_s, "plan_s": planned - began, "plan_cpu_s": planned_cpu - began_cpu,
        "finish_s": finished - built, "finish_cpu_s": finished_cpu - built_cpu, "rerun_s": time.perf_counter() - again,
        "rerun_cpu_s": time.process_time() - cpu, "start_MB": before_mb, "planned_MB": planned_mb, "peak_MB": first_mb,
        "peak_after_rerun_MB": peak_mb(),
    }  # fmt: skip
    if calls:
        row |= {"plan_requests": planned_calls, "finish_requests": requests - built_calls,
                "rerun_requests": sum(calls.values()) - requests}  # fmt: skip
    return row


def one_folder(num_files: int) -> dict[str, float]:
    """Listing, reading as samples and planning of one folder that holds so many files: pictures in pairs, and texts."""
    from PIL import Image

    from loomvideo.pipelines.prepare import job
    from loomvideo.pipelines.sources import open_source
    from loomvideo.pipelines.sources.base import Root

    work = Path(tempfile.mkdtemp(prefix="folder-"))
    folder = work / "pairs"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(work / "picture.png")
    picture = (work / "picture.png").read_bytes()
    for number in range(num_files // 3):
        (folder / f"{number:06d}_src.png").write_bytes(picture)
        (folder / f"{number:06d}_tgt.png").write_bytes(picture)
        (folder / f"{number:06d}.txt").write_text(f"make dress {number} blue")
    marks = [time.process_time()]
    count = len(Root(str(folder)).names())
    marks.append(time.process_time())
    samples = sum(1 for _ in open_source(str(folder)))
    marks.append(time.process_time())
    builders, planned = Builders(), []

    def run(stage, config, rows):
        planned.append(time.process_time())
        yield from builders(stage, config, rows)

    job.run_stage = run
    job.prepare(config_for(folder, str(work / "out")))
    shutil.rmtree(folder)
    list_s, read_s = (after - before for before, after in itertools.pairwise(marks))
    return {"files": count, "list_cpu_s": list_s, "samples": samples, "read_cpu_s": read_s,
            "plan_cpu_s": planned[0] - marks[-1], "peak_MB": peak_mb()}  # fmt: skip


def membership(num_samples: int) -> list[dict[str, float]]:
    """What the plan of a large input redoes after small changes; planned for real, its units committed empty."""
    from loomvideo.pipelines.prepare.units import Dealing, commit_plan, kept_plan, plan_units, remove_unplanned
    from loomvideo.platform.shards.commits import Commit
    from loomvideo.platform.shards.storage import Storage

    storage = Storage(tempfile.mkdtemp(prefix="membership-"))
    some = round(num_samples * 0.0005)
    texts = {f"clip-{number:09d}": "a red dress" for number in range(num_samples)}
    added = {f"clip-{number:09d}": "a red dress" for number in range(num_samples, num_samples + some)}
    steps = [("first", texts), (f"+{some}", texts := texts | added)]
    gone = set(list(texts)[7 :: len(texts) // some][:some])
    steps.append((f"-{some}", texts := {key: text for key, text in texts.items() if key not in gone}))
    other = dict.fromkeys(list(texts)[3 :: len(texts) // some][:some], "a red dress, seen from far away at dusk " * 9)
    steps.append((f"{some} new captions", texts | other))
    rows, known, placed = [], {}, {}
    for name, texts in steps:
        plan = plan_units(storage, "encode", "work/records", table(texts), Dealing("", 106), ("recipe",))
        commit_plan(storage, plan)
        kept = kept_plan(storage, "encode", ["key", "unit"])
        now = dict(zip(kept["key"].to_pylist(), kept["unit"].to_pylist(), strict=True))
        stale = [plan.units[number] for number in plan.stale]
        visited = {unit.name for unit in stale}
        rows.append({
            "step": name, "samples": len(texts), "shards": len(plan.units), "shards_visited": len(stale),
            "encoded": sum(known.get(key) != text for key, text in texts.items() if now[key] in visited),
            "moved": sum(key in placed and placed[key] != unit for key, unit in now.items()),
        })  # fmt: skip
        folder = Path(storage.full_path("work/records"))
        folder.mkdir(parents=True, exist_ok=True)
        for number in plan.stale:
            (folder / Commit(plan.units[number].name, plan.recipes[number]).file).touch()
        remove_unplanned(storage, plan)
        known, placed = dict(texts), now
    return rows


def table(texts: dict[str, str]):
    """Inputs of these keys and texts."""
    import pyarrow as pa

    from loomvideo.pipelines.prepare.inputs import SAMPLE_SCHEMA, Inputs

    samples = [json.dumps({"key": key, "caption": text}) for key, text in texts.items()]
    count = len(texts)
    columns = {"key": list(texts), "dataset": ["set"] * count, "split": ["train"] * count, "num_bytes": [1] * count,
               "sample": samples, "media": [""] * count, "assessed": ["{}"] * count}  # fmt: skip
    return Inputs(pa.table(columns, schema=SAMPLE_SCHEMA), [])


def in_its_own_process(arguments: list[str]) -> list[dict]:
    """Run this file again and read its last line."""
    out = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--membership", type=int, help="samples of which some are added, removed, captioned anew")
    parser.add_argument("--files", type=int, nargs="*", help="files of one folder")
    parser.add_argument("--s3", action="store_true", help="the dataset on an S3 emulator")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        if arguments.files:
            rows = [one_folder(arguments.files[0])]
        elif arguments.membership:
            rows = membership(arguments.membership)
        else:
            rows = [measure(arguments.samples[0], arguments.one)]
        print(json.dumps(rows))
        return
    if arguments.membership:
        show(in_its_own_process(["--membership", str(arguments.membership), "--one", ""]))
        return
    if arguments.files:
        for number in arguments.files:
            show(in_its_own_process(["--files", str(number), "--one", ""]))
        return
    server = None
    if arguments.s3:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(port=0)
        server.start()
        host, port = server.get_host_and_port()
        os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing",
                       "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
        import fsspec

        fsspec.filesystem("s3").mkdir("driver-bench")
    rows = []
    for number in arguments.samples:
        folder = f"s3://driver-bench/{number}" if arguments.s3 else ""
        rows += in_its_own_process(["--samples", str(number), "--one", folder])
        show(rows[-1:])
    if server is not None:
        server.stop()


def show(rows: list[dict]) -> None:
    """One line a row."""
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
