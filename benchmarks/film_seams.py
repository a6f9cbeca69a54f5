"""Thirty seconds of the sample world, edited whole: are the joints of the windows visible?

    python benchmarks/film_seams.py runs/finetune-edit/NAME/weights [--seconds 30] [--out runs/films]

A held-out figure moves for that long, with a tone as sound. `whole=true` edits it in windows of the tiny preset; the
change between neighbouring frames is measured where windows meet and everywhere else, in the source and in the edit,
and for comparison in windows that were edited by themselves and put one after another. A picture shows both.
"""

import argparse
import dataclasses
import json
import time
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
import psutil

from loomvideo.jobs.command import job_config
from loomvideo.jobs.generation.config import GenerateConfig
from loomvideo.jobs.weights.model_choice import model_source
from loomvideo.model.film import film_windows
from loomvideo.pipelines.evaluation.metrics import psnr_db
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.requests import Request
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.sample_data.fashion import random_look
from loomvideo.pipelines.sample_data.figures import FPS, Renderer, random_figure

matplotlib.use("Agg")
SIDE, SHOWN = 96, 10
HELD_OUT = (0, 1, 1)
"""What the seeds of the sample data's held-out figures begin with."""


def make_film(path: Path, figure: int, num_frames: int) -> tuple[str, str, np.ndarray]:
    """Write the film; returns an instruction to recolour its first garment, how the figure moves, and the true edit."""
    random = np.random.default_rng([*HELD_OUT, figure])
    person = random_figure(random)
    look = random_look(person.outfit, random)
    renderer = Renderer(person, look, SIDE, SIDE)
    tone = (np.sin(np.arange(48000 * num_frames // FPS) / 20) * 8000).astype(np.int16)[None]
    with av.open(str(path), "w") as made:
        video = made.add_stream("libx264", rate=FPS, options={"crf": "10"})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        sound = made.add_stream("aac", rate=48000)
        sound.layout = "mono"
        for number in range(num_frames):
            made.mux(video.encode(av.VideoFrame.from_ndarray(renderer.frame(number), format="rgb24")))
        made.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        made.mux(sound.encode(frame))
        made.mux(sound.encode(None))
    garment = look.garments[0]
    colour = "red" if garment.colour != "red" else "blue"
    edited = Renderer(person, look.wearing(dataclasses.replace(garment, colour=colour)), SIDE, SIDE)
    return f"make the {garment.type} {colour}", person.motion, np.stack([edited.frame(n) for n in range(num_frames)])


def frames_of(path: Path) -> np.ndarray:
    """All frames, uint8 [frames, height, width, 3]."""
    media = open_media(str(path))
    return np.concatenate(list(media.read(range(media.info.num_frames))))


def changes(frames: np.ndarray) -> np.ndarray:
    """Mean absolute change onto each frame but the first, of 255."""
    return np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))


def one_by_one(generator: FileGenerator, request: Request, num_frames: int) -> np.ndarray:
    """Windows that know nothing of each other, one after another."""
    source, parts = frames_of(Path(request.source)), []
    for start in range(0, len(source), num_frames):
        clip = source[start : start + num_frames]
        missing = generator.pipeline.grid.covering_frames(len(clip)) - len(clip)
        clip = np.concatenate([clip, np.repeat(clip[-1:], missing, axis=0)])
        conditions = generator.pipeline.encode("video_edit", request.prompt, clip)
        settings = generator.settings
        latents = generator.pipeline.sample(
            conditions,
            settings.steps,
            generator.guidance("video_edit"),
            start,
            settings.batch_branches,
        )
        parts.append(generator.pipeline.decode(latents))
    return np.concatenate(parts)[: len(source)]


def told(values: np.ndarray) -> dict[str, float]:
    """Mean, 95th percentile and largest."""
    figures = {"mean": values.mean(), "p95": np.percentile(values, 95), "max": values.max()}
    return {name: round(float(value), 2) for name, value in figures.items()}


def picture(path: Path, source: np.ndarray, edited: np.ndarray, joints: np.ndarray, alone: np.ndarray) -> None:
    """Frames of both over the film's length, those around a joint, and the changes between frames."""
    import matplotlib.pyplot as plt

    over = np.linspace(0, len(source) - 1, SHOWN).round().astype(int)
    middle = int(joints[len(joints) // 2])
    around = np.arange(middle - SHOWN // 2, middle + SHOWN // 2)
    figure, axes = plt.subplots(5, 1, figsize=(10, 7.6), height_ratios=[1, 1, 1, 1, 2.2])
    rows = ((source, over, "source, over the film"), (edited, over, "edited"),
            (source, around, f"source, frames {around[0]} to {around[-1]}"),
            (edited, around, f"edited, windows meet at frame {middle}"))  # fmt: skip
    for axis, (frames, indices, title) in zip(axes, rows, strict=False):
        axis.imshow(np.hstack(list(frames[indices])))
        axis.set_title(title, fontsize=9, loc="left")
        axis.axis("off")
    seconds, at = np.arange(1, len(source)) / FPS, changes(edited)
    axes[4].plot(seconds, alone[: len(seconds)], lw=0.6, color="#d0d0d0", label="windows one by one")
    axes[4].plot(seconds, at, lw=0.7, color="#185ca8", label="edited whole")
    axes[4].plot(joints / FPS, at[joints - 1], ".", ms=3, color="#b3261e", label="its joints")
    axes[4].set_xlabel("seconds")
    axes[4].set_ylabel("change onto a frame")
    axes[4].legend(fontsize=8, ncols=3, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Make, edit and measure each film; print one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a training run, or a weights folder")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--figures", type=int, nargs="+", default=[0], help="numbers of held-out figures")
    parser.add_argument("--set", nargs="*", default=[], help="keys of generate, such as num_frames=17")
    parser.add_argument("--out", type=Path, default=Path("runs/films"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    words = ["preset=tiny", f"checkpoint={arguments.checkpoint}", "whole=true", *arguments.set]
    config = job_config(GenerateConfig, "generate", words)
    generator = FileGenerator.load(model_source(config), config)
    memory: list[float] = []
    for number in arguments.figures:
        source, out = (arguments.out / f"{name}-{number}.mp4" for name in ("source", "edited"))
        total = round(arguments.seconds * FPS)
        instruction, motion, target = make_film(source, number, total)
        request = Request("edit", instruction, str(out), str(source))
        began, cpu = time.perf_counter(), time.process_time()
        generator.generate(request, lambda step, of: memory.append(psutil.Process().memory_info().rss / 2**20))
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        before, after = frames_of(source), frames_of(out)
        alone = one_by_one(generator, request, config.num_frames)
        windows = film_windows(total, config.num_frames, config.overlap, generator.pipeline.grid)
        joints = np.array(sorted({start for w in windows[1:] for start in (w.start, w.start + w.shared)} - {total}))
        cuts = np.arange(config.num_frames, total, config.num_frames)
        made, quarter = changes(after), len(memory) // 4
        others = np.delete(made, joints - 1)
        # Frames of one latent change less among themselves than from one to the next.
        stride = generator.pipeline.grid.temporal_stride
        borders = np.setdiff1d(np.arange(1, total, stride), joints)
        with av.open(str(out)) as container:
            seconds = [float(stream.duration * stream.time_base) for stream in container.streams]
        picture(arguments.out / f"film-{number}.png", before, after, joints, changes(alone))
        figures = {
            "instruction": instruction, "motion": motion, "frames": len(after), "windows": len(windows),
            "psnr_db whole, one by one": [round(psnr_db(film, target), 2) for film in (after, alone)],
            "source": told(changes(before)), "at joints": told(made[joints - 1]), "elsewhere": told(others),
            "elsewhere, onto another latent": told(made[borders - 1]),
            "one by one, at cuts": told(changes(alone)[cuts - 1]),
            "one by one, elsewhere": told(np.delete(changes(alone), cuts - 1)),
            "streams_s": [round(value, 2) for value in seconds],
            "rss_mib first quarter, end": [round(max(memory[:quarter])), round(max(memory[quarter:]))],
            "wall_s": round(wall_s), "cpu_s": round(cpu_s),
        }  # fmt: skip
        print(json.dumps(figures), flush=True)
        memory.clear()
    generator.close()


if __name__ == "__main__":
    main()
