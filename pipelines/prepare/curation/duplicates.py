"""Exact and perceptual duplicates.

A video is a few hashed key frames; two samples are duplicates when most key frames of one have a counterpart in the
other. Candidates come from an index over bands of the hashes, so the work grows with the matches, not with the square
of the samples.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import cv2
import numpy as np

from loomvideo.pipelines.prepare.curation.options import DuplicateLimits

NUM_KEY_FRAMES = 8
# Eight bands of eight bits: two hashes that differ in up to seven bits agree in at least one band.
NUM_BANDS = 8
# A band value shared by more frames than this is no evidence, only work.
MAX_BUCKET = 1000
NO_HASH = np.uint64(0)


def perceptual_hash(frame: np.ndarray) -> np.uint64:
    """64 signs of the lowest DCT frequencies of a frame's luma; ``NO_HASH`` when the frame is almost flat.

    Args:
        frame: uint8 [h, w, 3].
    """
    luma = cv2.cvtColor(cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    if luma.std() < 3.0:
        return NO_HASH
    low = cv2.dct(luma.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    value = np.uint64(int("".join("1" if bit else "0" for bit in bits), 2))
    return value if value != NO_HASH else np.uint64(1)


def signature(frames: np.ndarray) -> np.ndarray:
    """Hashes of up to eight key frames spread over a clip, uint64 [key frames]."""
    count = min(len(frames), NUM_KEY_FRAMES)
    # The middles of equal parts: the very first and last frames are often black or titles.
    chosen = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
    return np.array([perceptual_hash(frames[i]) for i in chosen], np.uint64)


def exact_duplicates(identities: Sequence[Hashable]) -> dict[int, int]:
    """Positions of repeats and of the first with the same identity, for example (file hashes, text)."""
    first: dict[Hashable, int] = {}
    repeats = {}
    for position, identity in enumerate(identities):
        if identity in first:
            repeats[position] = first[identity]
        else:
            first[identity] = position
    return repeats


def near_duplicates(
    signatures: Sequence[np.ndarray], labels: Sequence[Hashable], limits: DuplicateLimits
) -> dict[int, int]:
    """Positions of samples that look like an earlier one, and that one's position.

    Args:
        signatures: The signature of each sample's target, in the order of preference.
        labels: Samples with different labels are never duplicates: for edits the instruction and the source, for
            others one label.
        limits: Distance and votes.

    Returns:
        ``{position: position of the sample that is kept}``; nothing is a duplicate of a duplicate.
    """
    index: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    repeats: dict[int, int] = {}
    for position, (frames, label) in enumerate(zip(signatures, labels, strict=True)):
        known = [hash_ for hash_ in frames if hash_ != NO_HASH]
        if not known:
            continue
        votes: Counter[int] = Counter()
        for hash_ in known:
            near = {
                other
                for band in _bands(hash_)
                for other, other_hash in index.get((label, *band), ())
                if distance(hash_, other_hash) <= limits.max_distance
            }
            votes.update(near)
        # The earliest of those with most votes.
        best = min(votes, key=lambda other: (-votes[other], other), default=None)
        if best is not None and votes[best] >= limits.min_votes * len(known):
            repeats[position] = best
            continue
        for hash_ in set(known):
            for band in _bands(hash_):
                bucket = index[(label, *band)]
                if len(bucket) < MAX_BUCKET:
                    bucket.append((position, hash_))
    return repeats


def distance(a: np.uint64, b: np.uint64) -> int:
    """Bits in which two hashes differ."""
    return int(a ^ b).bit_count()


def _bands(hash_: np.uint64) -> list[tuple[int, int]]:
    value = int(hash_)
    width = 64 // NUM_BANDS
    return [(band, (value >> (band * width)) & ((1 << width) - 1)) for band in range(NUM_BANDS)]
