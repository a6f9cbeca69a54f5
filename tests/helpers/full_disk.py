"""Fills a tiny file system and lets every kind of writer meet it; prints what each one says, a JSON line a kind.

unshare --map-root-user --mount python tests/helpers/full_disk.py FOLDER
"""

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

NOISE = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
ROOM_BYTES = 1 << 20


def film(folder):
    from loomvideo.pipelines.generation.results import write_result

    write_result(folder / "film.mp4", [NOISE] * 9, {"prompt": "x"})


def picture(folder):
    from loomvideo.pipelines.generation.results import write_result

    write_result(folder / "picture.png", [NOISE.reshape(1, 288, 288, 3)], {"prompt": "x"})


def weights(folder):
    from loomvideo.model.dit import LoomVideoDiT
    from loomvideo.model.sizes import model_size
    from loomvideo.model.weights import save_dit

    model = LoomVideoDiT(model_size("tiny").dit)
    save_dit(model, model.config, folder / "weights")


def adapter(folder):
    import torch

    from loomvideo.model.adapters import Adapter, save_as

    layers = {"blocks.0.attn1.to_q": (torch.randn(64, 1000), torch.randn(1000, 64), 1.0)}
    save_as(Adapter("a", layers), folder / "adapter.safetensors", "comfyui", torch.float32)


def run_folder(folder):
    from loomvideo.platform.runs import RunFolder

    RunFolder.open(folder, "pretrain", "one").write_json("result.json", {"text": "x" * 200_000})


def dataset(folder):
    from loomvideo.platform.shards.storage import Storage

    Storage(folder / "shards").write_bytes("manifest.json", bytes(200_000))


def table(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from loomvideo.platform.shards.storage import Storage

    with Storage(folder / "shards").staged("plan.parquet") as path:
        pq.write_table(pa.table({"a": NOISE.ravel()}), path, compression="none", use_dictionary=False)


def evaluation(folder):
    from loomvideo.pipelines.evaluation.store import Store, write_lossless

    def fill(entry):
        write_lossless(entry / "film.mkv", NOISE, 24.0)
        return {}

    Store(folder / "store").make("generated", "k" * 32, fill)


def samples(folder):
    from loomvideo.pipelines.sources.samples import Sample, write_jsonl

    write_jsonl([Sample("k", "t2v", "d", "a.mp4", caption="x" * 200_000)], folder / "samples.jsonl")


def extracted(folder):
    from loomvideo.pipelines.sources.tables import Extractor

    Extractor(str(folder / "extracted")).write(bytes(200_000), "a.png")


def answers(folder):
    from loomvideo.pipelines.vlm.clients import Reply
    from loomvideo.pipelines.vlm.session import AnswerCache

    AnswerCache(folder / "answers").put("k" * 32, Reply("x" * 200_000, "m", 1, 1, 0.1), {})


def kernels(folder):
    from loomvideo.platform.nodes.artifacts import ArtifactKey, ArtifactStore

    key = ArtifactKey("thing", "source", {"machine": "m"}, "compiler 1")
    ArtifactStore(folder / "kernels").get(key, lambda there: (there / "a.so").write_bytes(bytes(200_000)))


def tracking(folder):
    from loomvideo.platform.runs import RunFolder
    from loomvideo.platform.tracking import Tracker

    Tracker(RunFolder.open(folder, "pretrain", "two"), f"sqlite:///{folder}/mlflow.db")


def uploads(folder):
    from loomvideo.pipelines.serving.store import ServiceStore
    from loomvideo.pipelines.serving.uploads import UploadLimits, UploadReader

    store, reader = ServiceStore(str(folder / "serve.db")), UploadReader(UploadLimits())
    try:
        store.add_upload(reader.check((folder.parent / "noise.png").read_bytes()), UploadLimits())
    finally:
        reader.close()


def served(folder):
    """A generation whose result has no room is told to who asked, and the server goes on."""
    from loomvideo.pipelines.serving.jobs import JobQueue, Result
    from loomvideo.pipelines.serving.requests import GenerationRequest, RequestLimits
    from loomvideo.pipelines.serving.store import ServiceStore

    async def backend(request):
        yield Result(bytes(300_000), "image/png")

    async def ask():
        jobs = JobQueue(backend, RequestLimits(), ServiceStore(str(folder / "jobs.db")))
        job = jobs.submit(GenerationRequest("t2i", "a dress"))
        await jobs._tasks[job.id]
        return jobs.get(job.id)

    job = asyncio.run(ask())
    raise RuntimeError(f"{job.status}: {job.error}")


def command(folder):
    """A command whose writer names no file: the last resort names the folder that is full."""
    from loomvideo.jobs import cli

    os.chdir(folder)
    sys.argv = [
        "loomvideo",
        "data",
        "sample",
        f"output={folder / 'sample'}",
        "real=false",
        "workers=1",
        "num_train=40",
        "num_heldout=4",
    ]
    errors = folder.parent / "errors.txt"
    with errors.open("w") as out, contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        cli.main()
    raise RuntimeError(errors.read_text().strip())


KINDS = (film, picture, weights, adapter, run_folder, dataset, table, evaluation, samples, extracted, answers,
         kernels, tracking, uploads, served, command)  # fmt: skip


def meet(kind, folder):
    """What a writer says of a file system with 64 KiB left."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", str(folder)], check=True)
    left = {tracking: 512, uploads: 256, served: 256}.get(kind, 64) << 10  # databases begin with some room
    (folder / "others").write_bytes(bytes(ROOM_BYTES - left))
    try:
        kind(folder)
    except Exception as error:
        return type(error).__name__, str(error), sorted(p.name for p in folder.rglob("*") if p.is_file())
    finally:
        os.chdir("/")
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    return "nothing", "", []


def main() -> None:
    """Every kind, or those named."""
    from PIL import Image

    logging.disable(logging.CRITICAL)
    place = Path(sys.argv[1])
    Image.fromarray(NOISE.reshape(288, 288, 3)).save(place / "noise.png")
    (place / "disk").mkdir(exist_ok=True)
    for kind in KINDS:
        if len(sys.argv) > 2 and kind.__name__ not in sys.argv[2:]:
            continue
        print(json.dumps([kind.__name__, *meet(kind, place / "disk")]), flush=True)


if __name__ == "__main__":
    main()
