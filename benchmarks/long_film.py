"""A synthetic film of many shots cut into clips: bytes read, time and memory: `python benchmarks/long_film.py`.

    python benchmarks/long_film.py --minutes 20 --shots 200 --detector scenedetect

The film is made of moving gradients of other colours. Its shots are found and cut by the real
worker of `loomvideo data cut`, which counts what FFmpeg asks it for.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from loomvideo.pipelines.clips.cutter import CutOptions, Part
from loomvideo.pipelines.clips.worker import FilmProcess
from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.prepare.curation.options import ShotOptions


def make_film(path: Path, num_frames: int, num_shots: int, width: int, height: int, fps: int) -> list[int]:
    """Write the film; returns the first frames of all shots but the first."""
    cuts = [round(num_frames * shot / num_shots) for shot in range(1, num_shots)]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "28", "g": "250", "sc_threshold": "0"}
        shot, pixels = -1, None
        for number in range(num_frames):
            if pixels is None or (shot < len(cuts) and number == cuts[shot]):
                shot += 1
                colour = np.random.default_rng(shot).uniform(0.3, 1.0, 3)
                wave = 0.5 + 0.5 * np.sin((x * (1 + shot % 3) + y * (1 + shot % 5)) / 23 + shot)
                pixels = (wave[..., None] * colour * 255).astype(np.uint8)
            pixels = np.roll(pixels, 1, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    return cuts


def main() -> None:
    """Make the film, cut it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--shots", type=int, default=200)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--height", type=int, default=90)
    parser.add_argument("--fps", type=int, default=24)
    parser.add_argument("--detector", default="scenedetect", help="scenedetect, transnet, or off: the shots are named")
    options = parser.parse_args()
    num_frames = round(options.minutes * 60 * options.fps)
    with tempfile.TemporaryDirectory() as folder:
        path, scratch = Path(folder) / "film.mp4", Path(folder) / "clips"
        scratch.mkdir()
        cuts = make_film(path, num_frames, options.shots, options.width, options.height, options.fps)
        shots = ShotOptions(detector=options.detector, margin_frames=2)
        process = FilmProcess(CutOptions(0, 16, shots), 60)
        names = []
        if options.detector == "off":
            names = [f"frames={a},{b}" for a, b in zip([0, *cuts], [*cuts, num_frames], strict=True)]
        parts = [Part(name, split_fragment(f"x#{name}")[1]) for name in names]
        began = time.perf_counter()
        clips = list(process.cut(str(path), parts, options.detector != "off", scratch))
        wall_s = time.perf_counter() - began
        counted = clips[-1][1].num_bytes
        process.close()
        made = [clip for clip, _ in clips[:-1]]
        starts = [split_fragment(f"x#{clip.part}")[1].frames[0] for clip in made]
        near = sum(min(abs(cut + 2 - start) for start in starts) <= 2 for cut in cuts) if names == [] else len(cuts)
        size = path.stat().st_size
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            json.dumps(
                {
                    "film_megabytes": size / 1e6,
                    "frames": num_frames,
                    "clips": len(made),
                    "cuts_found": f"{near} of {len(cuts)}",
                    "read_of_film": counted / size,
                    "cpu_s": used.ru_utime + used.ru_stime,
                    "wall_s": wall_s,
                    "peak_mb": used.ru_maxrss / 1024,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
