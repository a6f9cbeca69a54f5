"""The gallery of a made-up dataset of a million rows: what writing it takes, and what a browser takes to use it.

python benchmarks/gallery.py --rows 1000000 --folder /tmp/gallery
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from loomvideo.pipelines.gallery.parts import FOLDER, GalleryWriter, sampled, write_part
from loomvideo.pipelines.gallery.report import REPORT_FILE, page
from loomvideo.pipelines.gallery.rows import GalleryRow
from loomvideo.platform.shards.storage import Storage

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.browser import CHROMIUM, browser_page

TASKS = ("video_edit", "t2v", "image_edit", "ref_edit", "mi2v", "t2i")
REASONS = ("no_op", "temporal_offset", "blurred", "missing_file", "near_duplicate")
WORDS = (
    "a", "woman", "in", "red", "blue", "striped", "dress", "walks", "before", "forest", "brick", "wall", "beach",
    "city", "night", "coat", "jacket", "shirt",
)  # fmt: skip
SHOWN = "document.body.dataset.shown === (location.hash || '#')"
VIEWS = {
    "first page": "",
    "a reason": "reason=blurred",
    "a reason, a range of a score, ordered by it": "reason=blurred&by=aesthetic&low=0.2&sort=falling",
    "all rows ordered by a score": "by=sharpness&sort=rising",
    "a page in the middle": "page=10000",
}


def rows(count: int) -> Iterator[GalleryRow]:
    """Clips with captions of 14 words and four scores; a tenth left out."""
    random = np.random.default_rng(0)
    for number in range(count):
        lost, edit = number % 10 == 3, number % 6 in (0, 2, 3)
        scores = random.random(4).tolist()
        path = f"media/{number // 1000}/clip-{number:07d}"
        yield GalleryRow(
            key=f"clip-{number:07d}-{number * 2654435761 % 2**32:08x}", dataset=f"set-{number % 7}",
            task=TASKS[number % 6], split="" if lost else "train", outcome="filtered" if lost else "written",
            reason=REASONS[number // 10 % 5] if lost else "", message="", group=f"group-{number // 4}", licence="CC0",
            text=" ".join(WORDS[i] for i in random.integers(0, len(WORDS), 14)),
            size=None if lost else [832, 480], frames=None if lost else 81, fps=None if lost else 16.0,
            target=f"{path}-target.mp4", source=f"{path}-source.mp4" if edit else None, references=[],
            scores=dict(zip(("aesthetic", "sharpness", "agreement", "motion"), scores, strict=True)),
        )  # fmt: skip


def main() -> None:
    """Write the gallery, open it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", default="/tmp/gallery")
    options = parser.parse_args()
    storage = Storage(options.folder)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time()
    for _ in rows(options.rows):
        pass
    made_s, began = time.process_time() - began, time.process_time()
    writer = GalleryWriter(storage)
    writer.add_all(rows(options.rows))
    facts = writer.finish() | {"digest": "made-up", "base": "raw", "strips": 0, "texts": True, "meanings": {}}
    sampled(writer.codes(), 240)
    write_part(storage, "strips", b"{}")
    text = page(f"{options.rows} made-up rows", "", facts)
    storage.write_bytes(REPORT_FILE, text.encode())
    sizes = storage.sizes(FOLDER)
    figures = {
        "rows": options.rows,
        "write_cpu_s": time.process_time() - began - made_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "of_it_before_mb": before,
        "files": len(sizes),
        "mb": sum(sizes.values()) / 1e6,
        "page_kb": len(text) / 1e3,
        "first_rows_kb": sizes["rows-000000.js"] / 1e3,
    }
    print(json.dumps(figures, indent=1))
    if CHROMIUM is None:
        return
    with tempfile.TemporaryDirectory() as profile, browser_page(Path(profile) / "profile") as tab:
        for name, view in VIEWS.items():
            began = time.perf_counter()
            if view:
                tab.evaluate(f"location.hash = {view!r}")
            else:
                tab.open((Path(options.folder) / REPORT_FILE).absolute().as_uri())
            tab.wait_for(SHOWN, 300)
            found = tab.evaluate("document.querySelector('#found').textContent")
            taken_s, usage = time.perf_counter() - began, tab.send("Runtime.getHeapUsage")
            held = (usage["usedSize"] + usage.get("backingStorageSize", 0)) / 1e6
            print(f"{name}: {taken_s:.1f} s, {found}, {held:.0f} MB of script memory", flush=True)


if __name__ == "__main__":
    main()
