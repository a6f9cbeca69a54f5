"""Which metrics a sample gets: everything that its inputs allow, under stable names."""

from collections.abc import Callable

import numpy as np

from loomvideo.pipelines.evaluation import editing, metrics, motion
from loomvideo.pipelines.evaluation.controls import MEASURED
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.sample_data.garments import COLOURS

VERSION = 4
"""Raised when any metric changes, so that stored values are not mixed with new ones."""


def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
    """Judge-free metrics of one result, by name; those that do not apply are absent, undefined ones are NaN.

    Preservation (``outside_*``) is measured only for edits that should leave the rest alone, always beside
    ``edit_strength``. With a target, ``edit_psnr_db`` is against it, ``copy_psnr_db`` is what the source would get, and
    ``asked_area`` is the share of pixels that the edit should change. ``garment_colour_right`` is 1 where the named
    colour nearest to most pixels of the edited region is the one asked for.

    Args:
        video: uint8 ``[frames, height, width, 3]``.
        inputs: The item's media in the same size.
    """
    values = {
        "sharpness": metrics.sharpness(video),
        "black_ratio": metrics.black_ratio(video),
    }
    if len(video) > 1:
        values |= {
            "flicker": metrics.temporal_flicker(video),
            "jitter": metrics.jitter(video),
            "freeze_ratio": metrics.freeze_ratio(video),
            "brightness_drift": metrics.brightness_drift(video),
            "motion_amount": motion.motion_amount(video),
            "warp_error": motion.warp_error(video),
        }
    if inputs.source is not None:
        values |= _against_source(video, inputs)
    if inputs.target is not None:
        values |= _against_target(video, inputs)
    if inputs.references:
        distances = [editing.colour_histogram_distance(video, picture[None]) for picture in inputs.references]
        values["reference_color_distance"] = float(min(distances))
    return values


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


def _against_source(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
    source = inputs.source
    values = {
        "edit_strength": editing.edit_strength(video, source),
        "edited_area": editing.edited_area(video, source),
        "source_psnr_db": metrics.psnr_db(video, source),
        "source_ssim": metrics.ssim(video, source),
        "edge_f1": editing.edge_f1(video, source),
    }
    if len(video) > 1:
        fidelity = motion.motion_fidelity(video, source)
        values |= {
            "flow_endpoint_error": fidelity.endpoint_error,
            "flow_direction_cosine": fidelity.direction_cosine,
            "flow_magnitude_ratio": fidelity.magnitude_ratio,
        }
    if inputs.item.aligned:
        region = edit_region(inputs)
        values["edit_locality"] = editing.edit_locality(video, source, region)
        if region is not None:
            values |= editing.preservation(video, source, region)
    return values


def _against_target(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
    target = inputs.target
    values = {"target_color_distance": editing.colour_histogram_distance(video, target)}
    if inputs.source is not None:
        # Without a source the target is one of many right answers, so pixels say nothing.
        values["edit_psnr_db"] = metrics.psnr_db(video, target)
        values["edit_ssim"] = metrics.ssim(video, target)
        values["edit_ms_ssim"] = metrics.ms_ssim(video, target)
        values["copy_psnr_db"] = metrics.psnr_db(inputs.source, target)
        values["gain_psnr_db"] = values["edit_psnr_db"] - values["copy_psnr_db"]
        changed = editing.change_mask(target, inputs.source)
        values["asked_area"] = float(changed.mean())
        periods = [period for period in inputs.block_periods if period < max(target.shape[1:3])]
        if periods:
            values["block_edge_ratio"] = max(metrics.block_edge_ratio(video, target, period) for period in periods)
        region = edit_region(inputs)
        if inputs.item.extra.get("garment") and region is not None and region.any():
            values["garment_delta_e"] = editing.garment_delta_e(video, region, target, region)
        colour = inputs.item.extra.get("colour")
        if colour and changed.any():
            named = editing.nearest_colour(video, changed, COLOURS, without=inputs.item.extra.get("accent"))
            values["garment_colour_right"] = float(named == colour)
    return values


def edit_region(inputs: LoadedItem) -> np.ndarray | None:
    """Where the edit may change pixels: a given mask of every frame, else where the target differs from the source."""
    if inputs.mask is not None and inputs.source is not None and len(inputs.mask) == len(inputs.source):
        return inputs.mask
    if inputs.target is not None and inputs.source is not None:
        return editing.change_mask(inputs.target, inputs.source)
    return None


ExtraMeasure = Callable[[np.ndarray, LoadedItem], dict[str, float | np.ndarray]]
