"""Fidelity and stability of videos without any network weights.

Every function takes uint8 RGB videos ``[frames, height, width, 3]`` (an image is a video of one frame) and returns
Python floats. Two videos that are compared must have the same shape: resize and trim them first, since most
surprising scores are differences of decoding. Masks are boolean ``[frames, height, width]`` and mark what counts.
"""

import itertools

import cv2
import numpy as np

MAX_PSNR_DB = 100.0
"""PSNR reported for identical videos, so that means over samples stay finite."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11
_SIGMA = 1.5
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2


def check_video(video: np.ndarray, name: str = "video") -> None:
    """Raise ``ValueError`` unless ``video`` is a non-empty uint8 array ``[frames, height, width, 3]``."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.size == 0:
        raise ValueError(f"{name}: expected uint8 [frames, height, width, 3], got {video.dtype} {list(video.shape)}")


def check_pair(video: np.ndarray, reference: np.ndarray) -> None:
    """Raise ``ValueError`` unless both are videos of one shape."""
    check_video(video)
    check_video(reference, "reference")
    if video.shape != reference.shape:
        raise ValueError(f"shapes differ: {list(video.shape)} against {list(reference.shape)}; resize or trim first")


def psnr_db(video: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB over all frames, or over ``mask``, at most :data:`MAX_PSNR_DB`.

    Returns:
        The PSNR of the mean squared error of the whole video; NaN when the mask is empty.
    """
    check_pair(video, reference)
    if mask is not None and not mask.any():
        return float("nan")
    total, count = 0.0, 0
    for i, (a, b) in enumerate(zip(video, reference, strict=True)):
        difference = (a.astype(np.float32) - b) ** 2
        kept = difference if mask is None else difference[mask[i]]
        total += float(kept.sum(dtype=np.float64))
        count += kept.size
    mse = total / count
    return MAX_PSNR_DB if mse == 0 else min(10 * float(np.log10(255**2 / mse)), MAX_PSNR_DB)


def ssim(video: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Structural similarity (Wang et al. 2004: 11x11 Gaussian, sigma 1.5), mean of channels and frames.

    With ``mask`` the similarity map is averaged over the marked pixels only; NaN when the mask is empty.
    """
    check_pair(video, reference)
    if min(video.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs sides of at least {_WINDOW} pixels, got {list(video.shape[1:3])}")
    inner = slice(_WINDOW // 2, -(_WINDOW // 2))
    total, count = 0.0, 0
    for i, (a, b) in enumerate(zip(video, reference, strict=True)):
        similarity, _ = _ssim_maps(a.astype(np.float64), b.astype(np.float64))
        kept = similarity[inner, inner] if mask is None else similarity[mask[i]]
        total += float(kept.sum())
        count += kept.size
    return total / count if count else float("nan")


def ms_ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Multi-scale SSIM (Wang et al. 2003) with the published scale weights, mean of channels and frames.

    Videos too small for five scales use the scales that fit an 11-pixel window, with weights scaled to sum to one;
    values of different resolutions are then not comparable.
    """
    check_pair(video, reference)
    scales = min(len(MS_SSIM_WEIGHTS), int(np.log2(min(video.shape[1:3]) / _WINDOW)) + 1)
    if scales < 1:
        raise ValueError(f"MS-SSIM needs sides of at least {_WINDOW} pixels, got {list(video.shape[1:3])}")
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    inner = slice(_WINDOW // 2, -(_WINDOW // 2))
    values = []
    for a, b in zip(video.astype(np.float64), reference.astype(np.float64), strict=True):
        product = np.ones(3)
        for scale in range(scales):
            similarity, contrast = _ssim_maps(a, b)
            last = scale == scales - 1
            mean = (similarity if last else contrast)[inner, inner].mean(axis=(0, 1))
            product *= np.maximum(mean, 0) ** weights[scale]
            if not last:
                a, b = (cv2.resize(x, (x.shape[1] // 2, x.shape[0] // 2), interpolation=cv2.INTER_AREA) for x in (a, b))
        values.append(product.mean())
    return float(np.mean(values))


def temporal_flicker(video: np.ndarray) -> float:
    """``(255 - mean absolute difference of consecutive frames) / 255`` as in VBench; 1 for a still or one frame."""
    check_video(video)
    if len(video) < 2:
        return 1.0
    differences = [cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(video)]
    return float((255 - np.mean(differences)) / 255)


def jitter(video: np.ndarray) -> float:
    """Mean absolute second difference over time, in grey levels: high for flicker, low for steady motion."""
    check_video(video)
    if len(video) < 3:
        return 0.0
    frames = video.astype(np.float32)
    return float(np.abs(frames[2:] - 2 * frames[1:-1] + frames[:-2]).mean())


def freeze_ratio(video: np.ndarray, threshold: float = 0.25) -> float:
    """Share of consecutive frame pairs that differ by less than ``threshold`` grey levels on average."""
    check_video(video)
    if len(video) < 2:
        return 0.0
    return float(np.mean([cv2.absdiff(a, b).mean() < threshold for a, b in itertools.pairwise(video)]))


def black_ratio(video: np.ndarray, level: float = 10.0, spread: float = 4.0) -> float:
    """Share of frames that are black: mean below ``level`` and standard deviation below ``spread`` grey levels."""
    check_video(video)
    return float(np.mean([frame.mean() < level and frame.std() < spread for frame in video]))


def sharpness(video: np.ndarray) -> float:
    """Mean variance of the Laplacian of luma, in squared grey levels."""
    check_video(video)
    return float(np.mean([cv2.Laplacian(_luma(frame), cv2.CV_32F).var() for frame in video]))


def brightness_drift(video: np.ndarray) -> float:
    """Absolute change of mean luma from the first to the last frame, in grey levels."""
    check_video(video)
    return float(abs(_luma(video[0]).mean() - _luma(video[-1]).mean()))


def block_edge_ratio(video: np.ndarray, reference: np.ndarray, period: int) -> float:
    """How much stronger steps between pixels are at every ``period``-th column and row than elsewhere.

    The mean squared step across block edges over that across all other columns and rows, divided by the same ratio of
    the reference, which has no blocks: 1 where the grid cannot be seen.

    Args:
        video: uint8 ``[frames, height, width, 3]``.
        reference: Like ``video``.
        period: Pixels from one edge to the next.
    """
    check_pair(video, reference)
    return _edge_contrast(video, period) / _edge_contrast(reference, period)


def _edge_contrast(video: np.ndarray, period: int) -> float:
    at_edges, elsewhere = [], []
    for axis in (1, 2):
        steps = (np.diff(video.astype(np.float32), axis=axis) ** 2).mean(axis=tuple({0, 1, 2, 3} - {axis}))
        is_edge = (np.arange(1, len(steps) + 1) % period) == 0
        at_edges.append(steps[is_edge])
        elsewhere.append(steps[~is_edge])
    # One grey level squared, so that flat pictures count as without blocks.
    return float((np.concatenate(at_edges).mean() + 1) / (np.concatenate(elsewhere).mean() + 1))


def _luma(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _ssim_maps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and contrast-structure maps ``[height, width, channels]`` of float64 images on a 0..255 scale."""

    def blur(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (_WINDOW, _WINDOW), _SIGMA, borderType=cv2.BORDER_REFLECT)

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return contrast * (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1), contrast
