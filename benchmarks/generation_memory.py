"""Real peaks of resident memory by way of using it: `python benchmarks/generation_memory.py [--model small]`.

Each way edits the same 17 frames of 256x256 with random weights in fp32 on the CPU, in a process of its own, which
reads the weights from their files as `loomvideo generate` does. Counted are pages that are the process's own (RssAnon,
looked at every 2 ms), less what it has before it loads anything; beside them the kernel's peak of all pages (VmHWM),
which has those of the mapped weight files too, that the kernel takes back when it needs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.loading import ModelSource, source_peaks
from loomvideo.model.parts import MODES
from loomvideo.model.peaks import Work
from loomvideo.model.pipeline import load_pipeline
from loomvideo.model.sizes import PIPELINE_FILE, model_size
from loomvideo.model.weights import save_dit

FRAMES, SIDE = 17, 256
MIB = 2**20


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def edit(weights: str, mode: str) -> None:
    """One edit in this process; prints its peaks."""
    libraries, mapped = status("RssAnon"), status("VmRSS")
    seen, ended = [libraries], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            seen.append(status("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    pipeline = load_pipeline(ModelSource(weights, kernels="eager", device="cpu", memory=mode))
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), np.uint8)
    loaded = status("RssAnon")
    frames = pipeline("make it red", "video_edit", source=clip, steps=1)
    ended.set()
    watching.join()
    made = {"loaded": loaded - libraries, "peak": max(seen) - libraries, "mapped too": status("VmHWM") - mapped}
    print(json.dumps({**made, "sum": int(frames.sum())}))


def main() -> None:
    """Write the weights, run every way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--edit", nargs=2, metavar=("WEIGHTS", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.edit:
        edit(*arguments.edit)
        return
    size = model_size(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_dit(LoomVideoDiT(size.dit), size.dit, Path(folder))
        (Path(folder) / PIPELINE_FILE).write_text(json.dumps({"model": size.name}))
        work = Work("video_edit", SIDE, SIDE, FRAMES)
        source = ModelSource(folder, kernels="eager", device="cpu")
        estimates = {peak.mode: peak.num_bytes for peak in source_peaks(source, work)}
        print("| `memory=` | after loading, MiB | peak | with mapped files | estimated |")
        print("|---|---|---|---|---|")
        sums = set()
        for mode in MODES:
            command = [sys.executable, __file__, "--edit", folder, mode]
            made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            sums.add(made.pop("sum"))
            figures = [*made.values(), estimates[mode]]
            print(f"| `{mode}` | " + " | ".join(f"{value / MIB:,.0f}" for value in figures) + " |", flush=True)
    if len(sums) > 1:
        raise SystemExit(f"the ways gave different frames: {sums}")


if __name__ == "__main__":
    main()
