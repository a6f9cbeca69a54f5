"""The one table of metrics: what each is called and measured in, which way is better, and what a verdict makes of it.

A metric that a function measures needs a row here to be compared, gated, charted or shown on top of a report.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What is known of a metric.

    Attributes:
        name: The name in figures.
        unit: The unit of its values; empty for shares, ratios and scores of networks.
        higher_is_better: None where more is not simply better.
        headline: Whether it is shown on top; in the order of the table.
        floor: What a sample without a result counts for in means over every planned sample; None: it has no such mean.
        margin: Loss of the mean that a gate takes as no loss, in its unit; None: a gate must be told one.
        idle: Whether a model gains by doing nothing, so that a gate on it must be asked for.
        label: The name in words; empty for the name itself.
        spread: Deviation of the differences of two runs between sources that is taken for planning; None where none is
            usual.
    """

    name: str
    unit: str = ""
    higher_is_better: bool | None = None
    headline: bool = False
    floor: float | None = None
    margin: float | None = None
    idle: bool = False
    label: str = ""
    spread: float | None = None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("judge", "1 to 5", True, headline=True, margin=0.1, spread=1.0),
        Metric("judge_macro", "1 to 5", True, headline=True, margin=0.1),
        Metric("judge_worst", "1 to 5", True, headline=True, floor=1.0, margin=0.1),
        Metric("judge_min", "1 to 5", True, headline=True, margin=0.15),
        Metric("checklist", "", True, headline=True, margin=0.03, label="share of the checklist fulfilled"),
        Metric("checklist_worst", "", True, headline=True, floor=0.0, margin=0.03),
        Metric("gain_psnr_db", "dB", True, headline=True, margin=0.5, label="gain over copying (dB)"),
        Metric("edit_psnr_db", "dB", True, headline=True, margin=0.5),
        Metric("copy_psnr_db", "dB"),
        Metric("wrong_instruction_psnr_db", "dB"),
        Metric("no_source_psnr_db", "dB"),
        Metric("edit_ssim", "", True, headline=True, margin=0.01),
        Metric("edit_ms_ssim", "", True, margin=0.01),
        Metric(
            "garment_colour_right", "", True, headline=True, margin=0.05, label="share of garments in the colour asked"
        ),
        Metric(
            "garments_drawn_right", "", True, headline=True, margin=0.05, label="share of captions with garments right"
        ),
        Metric("asked_area"),
        Metric("block_edge_ratio", "", False, margin=0.05),
        Metric("outside_psnr_db", "dB", True, headline=True, margin=0.5, idle=True),
        Metric("outside_ssim", "", True, margin=0.01, idle=True),
        Metric("edit_strength", "grey levels", headline=True),
        Metric("edited_area"),
        Metric("edit_locality", "", True, margin=0.03, idle=True),
        Metric("garment_delta_e", "CIEDE2000", False, headline=True, margin=1.0),
        Metric("warp_error", "grey levels", False, headline=True, margin=0.3, idle=True),
        Metric("flow_direction_cosine", "", True, headline=True, margin=0.03, idle=True),
        Metric("flow_endpoint_error", "pixels", False, margin=0.2, idle=True),
        Metric("flow_magnitude_ratio"),
        Metric("reference_color_distance", "", False, headline=True, margin=0.02),
        Metric("target_color_distance", "", False, margin=0.02),
        Metric("source_psnr_db", "dB"),
        Metric("source_ssim"),
        Metric("edge_f1"),
        Metric("flicker", "", True, margin=0.005, idle=True),
        Metric("jitter", "grey levels", False, margin=0.3, idle=True),
        Metric("freeze_ratio", "", False, margin=0.02),
        Metric("black_ratio", "", False, margin=0.01),
        Metric("brightness_drift", "grey levels", False, margin=1.0, idle=True),
        Metric("sharpness", "grey levels squared"),
        Metric("motion_amount", "pixels"),
        Metric("lpips_target", "", False, margin=0.02),
        Metric("lpips_source"),
        Metric("stlpips_target", "", False, margin=0.005),
        Metric("stlpips_source"),
        Metric("clip_text", "", True, margin=0.005),
        Metric("clip_frames", idle=True),
        Metric("clip_reference", "", True, margin=0.01),
        Metric("dino_subject", idle=True),
        Metric("dino_reference", "", True, margin=0.01),
        Metric("lite_subject", idle=True),
        Metric("lite_reference", "", True, margin=0.01),
        Metric("nsfw", "", False),
        Metric("kid_dino", "", False),
        Metric("kid_lite", "", False),
        Metric("kvd", "", False),
        Metric("fvd", "", False),
    )
}
"""Every metric that has a direction, a place on top or a margin, in the order shown."""


def metric(name: str) -> Metric:
    """What is known of a metric; one that is not in the table has no direction.

    An axis of a judge (``judge/AXIS``) and the mean of category means (``NAME_macro``) are taken as their metric.
    """
    if name in METRICS:
        return METRICS[name]
    if name.startswith("judge/"):
        return Metric(name, "1 to 5", True, margin=METRICS["judge"].margin)
    if name.startswith("checklist/"):
        return Metric(name, "", True, margin=METRICS["checklist"].margin)
    base = METRICS.get(name.removesuffix("_macro"))
    if base is not None:
        return Metric(name, base.unit, base.higher_is_better, margin=base.margin, idle=base.idle)
    return Metric(name)


def headline_metrics() -> tuple[Metric, ...]:
    """The metrics shown on top, in order."""
    return tuple(m for m in METRICS.values() if m.headline)


def ranking_metrics() -> tuple[Metric, ...]:
    """Metrics by which single samples are ranked, the most telling first."""
    return tuple(m for m in headline_metrics() if m.higher_is_better is not None and m.floor is None)
