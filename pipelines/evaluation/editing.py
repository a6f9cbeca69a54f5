"""What an edit changed and what it left alone: edit masks, locality, strength, preservation, garment colour.

Preservation rewards doing nothing, so it is always reported beside :func:`edit_strength`. Masks are boolean
``[frames, height, width]``.
"""

from collections.abc import Mapping

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from loomvideo.pipelines.evaluation.metrics import check_pair, check_video, psnr_db, ssim

CHANGE_THRESHOLD = 20.0


def change_mask(video: np.ndarray, source: np.ndarray, threshold: float = CHANGE_THRESHOLD) -> np.ndarray:
    """Pixels whose colour changed by more than ``threshold`` grey levels (largest channel), opened and closed."""
    check_pair(video, source)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    masks = []
    for a, b in zip(video, source, strict=True):
        difference = cv2.absdiff(cv2.GaussianBlur(a, (3, 3), 0), cv2.GaussianBlur(b, (3, 3), 0)).max(-1)
        changed = (difference > threshold).astype(np.uint8)
        changed = cv2.morphologyEx(changed, cv2.MORPH_OPEN, kernel)
        masks.append(cv2.morphologyEx(changed, cv2.MORPH_CLOSE, kernel, iterations=2).astype(bool))
    return np.stack(masks)


def edit_strength(video: np.ndarray, source: np.ndarray) -> float:
    """Mean absolute change from the source in grey levels; 0 when the source was copied."""
    check_pair(video, source)
    return float(np.mean([cv2.absdiff(a, b).mean() for a, b in zip(video, source, strict=True)]))


def edited_area(video: np.ndarray, source: np.ndarray) -> float:
    """Share of pixels in :func:`change_mask`."""
    return float(change_mask(video, source).mean())


def edit_locality(video: np.ndarray, source: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Share of the change that lies where it should: inside ``mask``, or in the largest connected region of change.

    Returns:
        1 for a perfectly local edit, NaN when nothing changed.
    """
    changed = change_mask(video, source)
    if not changed.any():
        return float("nan")
    if mask is not None:
        return float((changed & mask).sum() / changed.sum())
    largest = 0
    for frame in changed:
        count, _, sizes, _ = cv2.connectedComponentsWithStats(frame.astype(np.uint8))
        largest += sizes[1:, cv2.CC_STAT_AREA].max() if count > 1 else 0
    return float(largest / changed.sum())


def preservation(video: np.ndarray, source: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM against the source outside ``mask``, the region that an edit may change.

    The mask is grown by five pixels, the reach of the SSIM window.
    """
    kernel = np.ones((11, 11), np.uint8)
    outside = np.stack([cv2.dilate(frame.astype(np.uint8), kernel) == 0 for frame in mask])
    return {
        "outside_psnr_db": psnr_db(video, source, outside),
        "outside_ssim": ssim(video, source, outside) if outside.any() else float("nan"),
    }


def mean_lab(video: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean CIELAB colour ``[3]`` of the marked pixels; NaN when there is none."""
    check_video(video)
    pixels = video[mask]
    return rgb2lab(pixels[None] / 255.0)[0].mean(0) if len(pixels) else np.full(3, np.nan)


def garment_delta_e(
    video: np.ndarray, mask: np.ndarray, reference: np.ndarray, reference_mask: np.ndarray | None = None
) -> float:
    """CIEDE2000 between the garment's mean colour and the reference product's; about 2 is just noticeable.

    Args:
        video: ``[frames, height, width, 3]`` with the garment in ``mask``.
        mask: ``[frames, height, width]``.
        reference: The target video or product picture ``[frames, height, width, 3]``.
        reference_mask: Its garment; without one the pixels that are not near-white paper, as in flat-lay pictures.
    """
    if reference_mask is None:
        reference_mask = reference.min(-1) < 240
    a, b = mean_lab(video, mask), mean_lab(reference, reference_mask)
    return float(deltaE_ciede2000(a, b))


def nearest_colour(
    video: np.ndarray,
    mask: np.ndarray,
    palette: Mapping[str, tuple[int, int, int]],
    without: str | None = None,
    mixed: bool = False,
) -> str:
    """The named colour that most marked pixels are nearest to, in CIELAB.

    Args:
        video: ``[frames, height, width, 3]``.
        mask: ``[frames, height, width]``, not empty.
        palette: RGB, 0 to 255, by name.
        without: A name that does not count, such as the second colour of a pattern.
        mixed: Half-way between a colour and ``without`` is that colour too, as in a pattern finer than pixels.
    """
    check_video(video)
    names = list(palette)
    colours = np.array([palette[name] for name in names]) / 255.0
    if mixed and without in palette:
        colours = np.concatenate([colours, (colours + colours[names.index(without)]) / 2])
    centres = rgb2lab(colours[None])[0]
    pixels = rgb2lab(video[mask][None] / 255.0)[0]
    nearest = ((pixels[:, None] - centres) ** 2).sum(-1).argmin(1) % len(names)
    counts = np.bincount(nearest, minlength=len(names))
    if without in palette:
        counts[names.index(without)] = 0
    return names[int(counts.argmax())]


def colour_histogram_distance(video: np.ndarray, reference: np.ndarray, bins: int = 8) -> float:
    """Hellinger distance, 0 to 1, of the joint RGB histograms of two videos of any shapes."""
    histograms = []
    for frames in (video, reference):
        check_video(frames)
        counts = np.zeros(bins**3)
        for frame in frames:
            codes = (frame.reshape(-1, 3).astype(np.int64) * bins) // 256
            counts += np.bincount(codes @ (bins**2, bins, 1), minlength=bins**3)
        histograms.append(np.sqrt(counts / counts.sum()))
    return float(np.sqrt(max(0.0, 1 - float(histograms[0] @ histograms[1]))))


def edge_f1(video: np.ndarray, source: np.ndarray) -> float:
    """F1 of Canny edges against the source's, with one pixel of tolerance: is the structure kept?"""
    check_pair(video, source)
    kernel = np.ones((3, 3), np.uint8)
    scores = []
    for a, b in zip(video, source, strict=True):
        edges = [cv2.Canny(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), 60, 150) > 0 for x in (a, b)]
        grown = [cv2.dilate(e.astype(np.uint8), kernel) > 0 for e in edges]
        if not edges[0].any() or not edges[1].any():
            scores.append(float(edges[0].any() == edges[1].any()))
            continue
        precision, recall = edges[0][grown[1]].sum() / edges[0].sum(), edges[1][grown[0]].sum() / edges[1].sum()
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(np.mean(scores))
