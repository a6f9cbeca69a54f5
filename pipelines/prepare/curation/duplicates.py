"""Exact and perceptual duplicates.

A video is a few hashed key frames and the colours of its parts; two samples are duplicates when most key frames of one
have a counterpart in the other and their colours agree (hashes are of brightness alone: a coat in red and the same coat
in blue have the same). Captions play no part.

Candidates are found by locality-sensitive hashing: every table takes some bytes of the hashes and sorts all frames by
them, so that frames which differ in other bytes only come to lie side by side. Work and memory grow with the samples,
and no bucket is ever full: in one of more frames than are compared with each other, those most alike lie together, and
a chain of pairs leads to the sample that is kept.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence

import cv2
import numpy as np

from loomvideo.pipelines.prepare.curation.options import DuplicateLimits

NUM_KEY_FRAMES = 8
NUM_BYTES = 8
# Up to how many frames: the bytes of a hash that a table takes, and how many frames of a bucket each is compared with.
# With one byte two hashes that differ in up to seven bits always share a bucket, with two in up to six, with three in
# up to five (in six with 92 %).
TABLES = ((4_096, 1, 64), (500_000, 2, 32), (2**62, 3, 16))
# Mean colours of a grid's cells that may differ in one of them: a clip darker by a sixth stays below.
MAX_COLOUR_LEVELS = 16
COLOUR_GRID = 4
_PAIRS_AT_A_TIME = 1 << 18
# Samples of one group that are kept and that every later one is compared with.
_FIRST_OF_GROUP = 16
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


def colours(frames: np.ndarray) -> str:
    """Blue and red differences of a 4x4 grid's cells, averaged over the key frames: 32 bytes in hexadecimal."""
    count = min(len(frames), NUM_KEY_FRAMES)
    chosen = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
    grids = [cv2.resize(frames[i], (COLOUR_GRID, COLOUR_GRID), interpolation=cv2.INTER_AREA) for i in chosen]
    mean = np.stack(grids).mean(0).round().astype(np.uint8)
    return cv2.cvtColor(mean, cv2.COLOR_RGB2YCrCb)[..., 1:].tobytes().hex()


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
    signatures: Sequence[np.ndarray],
    labels: Sequence[Hashable],
    limits: DuplicateLimits,
    shades: Sequence[str] | None = None,
) -> dict[int, int]:
    """Positions of samples that look like an earlier one, and that one's position.

    Args:
        signatures: The signature of each sample's target, in the order of preference.
        labels: Samples with different labels are never duplicates: for edits the instruction and the source.
        limits: Distance and votes.
        shades: The :func:`colours` of each target; None compares no colours.

    Returns:
        ``{position: position of the sample that is kept}``; nothing is a duplicate of a duplicate.
    """
    table = np.zeros((len(signatures), NUM_KEY_FRAMES), np.uint64)
    for position, frames in enumerate(signatures):
        table[position, : len(frames)] = frames
    codes: dict[Hashable, int] = {}
    label = np.fromiter((codes.setdefault(name, len(codes)) for name in labels), np.int64, len(labels))
    shade = None
    if shades is not None:
        shade = np.frombuffer(bytes.fromhex("".join(shades)), np.uint8).reshape(len(signatures), -1)
    first, second = _candidates(table, label, limits.max_distance)
    alike: dict[int, list[int]] = defaultdict(list)
    group = _Groups()
    for start in range(0, len(first), _PAIRS_AT_A_TIME):
        a, b = first[start : start + _PAIRS_AT_A_TIME], second[start : start + _PAIRS_AT_A_TIME]
        held = (_votes(table, b, a, limits) >= 0) & _agree(shade, a, b)
        for one, other in zip(a[held].tolist(), b[held].tolist(), strict=True):
            alike[other].append(one)
            group.join(one, other)
    repeats: dict[int, int] = {}
    kept: dict[int, list[int]] = defaultdict(list)
    for position in sorted({*alike, *itertools.chain.from_iterable(alike.values())}):
        # What an earlier one repeats may be an earlier one still, and in a long bucket the chain goes the other way.
        of_group = kept[group.find(position)]
        found = {repeats.get(one, one) for one in alike.get(position, ())} | {*of_group[:_FIRST_OF_GROUP]}
        earlier = np.array(sorted(found), np.int64)
        votes = _votes(table, np.full(len(earlier), position), earlier, limits)
        votes[~_agree(shade, earlier, np.full(len(earlier), position))] = -1
        if len(votes) and votes.max() >= 0:
            repeats[position] = int(earlier[int(votes.argmax())])
        else:
            of_group.append(position)
    return repeats


class _Groups:
    """Samples that pairs connect (union-find), each group named after its smallest."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def find(self, position: int) -> int:
        while (parent := self._parent.get(position, position)) != position:
            self._parent[position] = self._parent.get(parent, parent)
            position = parent
        return position

    def join(self, one: int, other: int) -> None:
        a, b = self.find(one), self.find(other)
        self._parent[max(a, b)] = min(a, b)


def _agree(shade: np.ndarray | None, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether the colours of pairs agree."""
    if shade is None or not len(first):
        return np.ones(len(first), bool)
    return np.abs(shade[first].astype(np.int16) - shade[second]).max(1) <= MAX_COLOUR_LEVELS


def _candidates(table: np.ndarray, label: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of samples, the earlier one first, of which some frame has a counterpart in the other."""
    owner, column = np.nonzero(table != NO_HASH)
    hashes = table[owner, column]
    # By hash within every bucket: sorting by bucket is stable.
    order = np.argsort(hashes, kind="stable")
    hashes, owner = hashes[order], owner[order]
    kinds = label[owner]
    width, window = next((width, window) for most, width, window in TABLES if len(hashes) <= most)
    parts = hashes.view(np.uint8).reshape(len(hashes), NUM_BYTES)
    pairs = np.zeros(0, np.int64)
    for chosen in itertools.combinations(range(NUM_BYTES), width):
        keys = kinds.astype(np.uint64) << np.uint64(8 * width)
        for shift, byte in enumerate(chosen):
            keys |= parts[:, byte].astype(np.uint64) << np.uint64(8 * shift)
        order = np.argsort(keys, kind="stable")
        keys, some, whose = keys[order], hashes[order], owner[order]
        found = [pairs]
        at = np.arange(len(keys) - 1)
        for step in range(1, window + 1):
            at = at[: np.searchsorted(at, len(keys) - step)]
            at = at[keys[at] == keys[at + step]]
            if not len(at):
                break
            near = at[np.bitwise_count(some[at] ^ some[at + step]) <= max_distance]
            a, b = whose[near], whose[near + step]
            found.append((np.minimum(a, b) * len(table) + np.maximum(a, b))[a != b])
        pairs = np.unique(np.concatenate(found))
    return pairs // len(table), pairs % len(table)


def _votes(table: np.ndarray, later: np.ndarray, earlier: np.ndarray, limits: DuplicateLimits) -> np.ndarray:
    """How many key frames of the later samples have a counterpart in the earlier; -1 where that is too few."""
    a, b = table[later], table[earlier]
    near = np.bitwise_count(a[:, :, None] ^ b[:, None, :]) <= limits.max_distance
    known = a != NO_HASH
    votes = (near & (b != NO_HASH)[:, None, :]).any(2) & known
    count = votes.sum(1)
    return np.where(count >= limits.min_votes * known.sum(1), count, -1)


def distance(a: np.uint64, b: np.uint64) -> int:
    """Bits in which two hashes differ."""
    return int(a ^ b).bit_count()
