"""Which metrics a sample gets: everything that its inputs allow, under stable names."""

from collections.abc import Callable, Collection
from functools import cache, partial

import numpy as np

from loomvideo.pipelines.evaluation import editing, metrics, motion
from loomvideo.pipelines.evaluation.controls import MEASURED
from loomvideo.pipelines.evaluation.drawn_garments import garments_right
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.sample_data.garments import COLOURS

VERSION = 5
"""Raised when any metric changes, so that stored values are not mixed with new ones."""

NAMES = frozenset(
    {
        "sharpness", "black_ratio", "flicker", "jitter", "freeze_ratio", "brightness_drift", "motion_amount",
        "warp_error", "edit_strength", "edited_area", "source_psnr_db", "source_ssim", "edge_f1",
        "flow_endpoint_error", "flow_direction_cosine", "flow_magnitude_ratio", "edit_locality", "outside_psnr_db",
        "outside_ssim", "target_color_distance", "edit_psnr_db", "edit_ssim", "edit_ms_ssim", "copy_psnr_db",
        "gain_psnr_db", "asked_area", "block_edge_ratio", "garment_delta_e", "garment_colour_right",
        "garments_drawn_right", "reference_color_distance"
    }
)  # fmt: skip
"""All that :func:`measure` knows."""

Measures = dict[str, Callable[[], float]]


def measure(video: np.ndarray, inputs: LoadedItem, only: Collection[str] | None = None) -> dict[str, float]:
    """Judge-free metrics of one result, by name; those that do not apply are absent, undefined ones are NaN.

    Preservation (``outside_*``) is measured only for edits that should leave the rest alone, always beside
    ``edit_strength``. With a target, ``edit_psnr_db`` is against it, ``copy_psnr_db`` is what the source would get, and
    ``asked_area`` is the share of pixels that the edit should change. ``garment_colour_right`` is 1 where the named
    colour nearest to most pixels of the edited region is the one asked for; ``garments_drawn_right`` where a result
    from words alone wears the garments of its caption (:mod:`~loomvideo.pipelines.evaluation.drawn_garments`).

    Args:
        video: uint8 ``[frames, height, width, 3]``.
        inputs: The item's media in the same size.
        only: Names of what is wanted, where all would cost more than is looked at; None for all.
    """
    found: Measures = {
        "sharpness": partial(metrics.sharpness, video),
        "black_ratio": partial(metrics.black_ratio, video),
    }
    if len(video) > 1:
        found |= {
            "flicker": partial(metrics.temporal_flicker, video),
            "jitter": partial(metrics.jitter, video),
            "freeze_ratio": partial(metrics.freeze_ratio, video),
            "brightness_drift": partial(metrics.brightness_drift, video),
            "motion_amount": partial(motion.motion_amount, video),
            "warp_error": partial(motion.warp_error, video),
        }
    if inputs.source is not None:
        found |= _against_source(video, inputs.source, inputs)
    if inputs.target is not None:
        found |= _against_target(video, inputs.target, inputs)
    if worn := inputs.item.extra.get("worn"):
        found["garments_drawn_right"] = lambda: float(garments_right(video, worn))
    if inputs.references:
        found["reference_color_distance"] = partial(_reference_distance, video, inputs)
    return {name: value() for name, value in found.items() if only is None or name in only}


def measure_checked(video: np.ndarray, inputs: LoadedItem) -> tuple[dict[str, float | None], list[str]]:
    """Metrics and plain faults; no metrics for a result of another shape, null for undefined ones (NaN is no JSON)."""
    found = defects(video, inputs)
    if not comparable(video, inputs):
        return {}, found
    values = measure(video, inputs)
    return {name: None if np.isnan(value) else value for name, value in values.items()}, found


def measure_control(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
    """The one figure of a control (:mod:`~loomvideo.pipelines.evaluation.controls`)."""
    if inputs.target is None or inputs.source is None or not comparable(video, inputs):
        return {}
    return {MEASURED: metrics.psnr_db(video, inputs.target)}


def comparable(video: np.ndarray, inputs: LoadedItem) -> bool:
    """Whether a result has the size and length that was asked for."""
    return video.shape[1:3] == inputs.size[::-1] and len(video) == inputs.num_frames


def defects(video: np.ndarray, inputs: LoadedItem) -> list[str]:
    """Plain faults of a result that no mean should hide: wrong size or length, black, frozen, source copied."""
    found = []
    width, height = inputs.size
    if video.shape[1:3] != (height, width):
        found.append(f"size {video.shape[2]}x{video.shape[1]} instead of {width}x{height}")
    if len(video) != inputs.num_frames:
        found.append(f"{len(video)} frames instead of {inputs.num_frames}")
    if metrics.black_ratio(video) > 0.5:
        found.append("black")
    moving = inputs.source is None or metrics.freeze_ratio(inputs.source) < 0.5
    if len(video) > 2 and moving and metrics.freeze_ratio(video) > 0.9:
        found.append("frozen")
    same_shape = inputs.source is not None and inputs.source.shape == video.shape
    if same_shape and editing.edit_strength(video, inputs.source) < 0.5:
        found.append("source copied")
    return found


def _against_source(video: np.ndarray, source: np.ndarray, inputs: LoadedItem) -> Measures:
    found: Measures = {
        "edit_strength": partial(editing.edit_strength, video, source),
        "edited_area": partial(editing.edited_area, video, source),
        "source_psnr_db": partial(metrics.psnr_db, video, source),
        "source_ssim": partial(metrics.ssim, video, source),
        "edge_f1": partial(editing.edge_f1, video, source),
    }
    if len(video) > 1:
        fidelity = cache(partial(motion.motion_fidelity, video, source))
        found |= {
            "flow_endpoint_error": lambda: fidelity().endpoint_error,
            "flow_direction_cosine": lambda: fidelity().direction_cosine,
            "flow_magnitude_ratio": lambda: fidelity().magnitude_ratio,
        }
    if inputs.item.aligned:
        region = edit_region(inputs)
        found["edit_locality"] = partial(editing.edit_locality, video, source, region)
        if region is not None:
            kept = cache(partial(editing.preservation, video, source, region))
            found |= {
                "outside_psnr_db": lambda: kept()["outside_psnr_db"],
                "outside_ssim": lambda: kept()["outside_ssim"],
            }
    return found


def _against_target(video: np.ndarray, target: np.ndarray, inputs: LoadedItem) -> Measures:
    source = inputs.source
    found: Measures = {"target_color_distance": partial(editing.colour_histogram_distance, video, target)}
    if source is not None:
        # Without a source the target is one of many right answers, so pixels say nothing.
        own, copied = cache(partial(metrics.psnr_db, video, target)), cache(partial(metrics.psnr_db, source, target))
        changed = editing.change_mask(target, source)
        found |= {
            "edit_psnr_db": own,
            "edit_ssim": partial(metrics.ssim, video, target),
            "edit_ms_ssim": partial(metrics.ms_ssim, video, target),
            "copy_psnr_db": copied,
            "gain_psnr_db": lambda: own() - copied(),
            "asked_area": lambda: float(changed.mean()),
        }
        periods = [period for period in inputs.block_periods if period < max(target.shape[1:3])]
        if periods:
            found["block_edge_ratio"] = lambda: max(metrics.block_edge_ratio(video, target, each) for each in periods)
        region = edit_region(inputs)
        if inputs.item.extra.get("garment") and region is not None and region.any():
            found["garment_delta_e"] = partial(editing.garment_delta_e, video, region, target, region)
        if inputs.item.extra.get("colour") and changed.any():
            found["garment_colour_right"] = partial(_colour_right, video, changed, inputs)
    return found


def _colour_right(video: np.ndarray, changed: np.ndarray, inputs: LoadedItem) -> float:
    extra = inputs.item.extra
    return float(editing.nearest_colour(video, changed, COLOURS, without=extra.get("accent")) == extra["colour"])


def _reference_distance(video: np.ndarray, inputs: LoadedItem) -> float:
    distances = [editing.colour_histogram_distance(video, picture[None]) for picture in inputs.references]
    return float(min(distances))


def edit_region(inputs: LoadedItem) -> np.ndarray | None:
    """Where the edit may change pixels: a given mask of every frame, else where the target differs from the source."""
    if inputs.mask is not None and inputs.source is not None and len(inputs.mask) == len(inputs.source):
        return inputs.mask
    if inputs.target is not None and inputs.source is not None:
        return editing.change_mask(inputs.target, inputs.source)
    return None


ExtraMeasure = Callable[[np.ndarray, LoadedItem], dict[str, float | np.ndarray]]
