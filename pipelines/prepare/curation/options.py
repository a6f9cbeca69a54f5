"""Thresholds of the stages that assess clips and pairs. Every score goes to the index; a limit of 0 drops nothing."""

from dataclasses import dataclass

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

SHOT_DETECTORS = ("off", "transnet", "scenedetect")


@dataclass
class QualityLimits:
    """What a clip or picture must be. Scores are explained in ``stages.quality``."""

    enabled: bool = option(True, "score clips and pictures")
    min_short_side: int = option(64, "pixels of the shorter side")
    max_aspect: float = option(4.0, "longer side over shorter side at most")
    min_duration_s: float = option(0.0, "seconds of a clip at least")
    max_duration_s: float = option(0.0, "seconds of a clip at most")
    min_motion: float = option(0.0, "optical flow in frame heights a second at least; 0.005 drops still clips")
    max_motion: float = option(0.0, "optical flow at most; 2 drops shaking cameras")
    max_frozen_share: float = option(0.9, "share of frames that repeat the one before, at most")
    max_black_share: float = option(0.3, "share of black frames at most")
    min_sharpness: float = option(4.0, "variance of the Laplacian at 320 pixels at least")
    min_brightness: float = option(12.0, "mean luma at least")
    max_brightness: float = option(245.0, "mean luma at most")
    min_contrast: float = option(4.0, "standard deviation of luma at least")
    max_blockiness: float = option(0.0, "steps at the borders of 8x8 blocks over steps elsewhere, at most")


@dataclass
class TextLimits:
    """Text laid over the picture."""

    enabled: bool = option(False, "find text with RapidOCR (extra: curate)")
    max_share: float = option(0.01, "share of the frame covered by text at most")
    num_frames: int = option(3, "frames looked at")
    side: int = option(320, "longer side of the frames in which text is found; it is read in full size")
    min_confidence: float = option(0.8, "of the reading: what is less sure is a pattern, not text")


@dataclass
class FaceLimits:
    """People, by their faces."""

    enabled: bool = option(False, "find faces with MTCNN (extra: curate)")
    min_faces: float = option(0.0, "faces at least; 1 leaves out clips without people who face the camera")
    max_faces: float = option(0.0, "faces at most; 1 leaves out groups")
    min_share: float = option(0.0, "share of the frame that the largest face covers, at least")
    min_confidence: float = option(0.95, "of a face")
    side: int = option(640, "longer side of the frames in which faces are looked for, from a thirtieth of it up")


@dataclass
class NsfwLimits:
    """What is not safe for work."""

    enabled: bool = option(False, "judge frames with open_nsfw (extra: curate)")
    max_score: float = option(0.8, "highest probability of a frame, at most; its authors call more than 0.8 likely")


@dataclass
class CameraLimits:
    """What the camera does. Scores are explained in ``stages.camera``."""

    enabled: bool = option(False, "follow the camera")
    max_pan: float = option(0.0, "frame heights a second at most")
    max_zoom: float = option(0.0, "zoom at most; 0.1 is 10 % a second")
    max_shake: float = option(0.0, "sudden part of the shift from frame to frame at most, in frame heights")


@dataclass
class PairLimits:
    """What source and target of an edit must have in common."""

    enabled: bool = option(True, "audit source/target pairs")
    max_fps_difference: float = option(
        0.5, "frames a second, of pairs of which neither frames nor seconds agree; others are brought in step"
    )
    max_length_difference: float = option(0.1, "difference of durations as a share of the longer one")
    max_offset_frames: int = option(1, "shift in time that is accepted")
    realign: bool = option(True, "leave out the start of whichever side is early, instead of dropping a shifted pair")
    max_one_sided_cuts: float = option(0.5, "cuts without a counterpart; below 1 accepts none")
    min_change: float = option(2.0, "largest change of any part of the frame, in levels; less is no edit")
    min_relation: float = option(0.3, "agreement of edges in the parts that agree best; less is another video")
    min_motion_ratio: float = option(0.1, "target's motion over the source's; less is a still target")


@dataclass
class DuplicateLimits:
    """When two samples are the same."""

    exact: bool = option(True, "drop samples whose files and text are byte for byte those of another")
    perceptual: bool = option(
        False,
        "drop what looks like another sample whatever its caption; edits only of one source and instruction",
    )
    max_distance: int = option(6, "bits of 64 in which hashes of equal frames may differ, at most 7")
    min_votes: float = option(0.75, "share of key frames that must agree")


@dataclass
class ShotOptions:
    """Cutting long videos into shots; paired data are never cut."""

    detector: str = option("off", "off, transnet (TransNetV2) or scenedetect (PySceneDetect); extra: curate")
    threshold: float = option(0.0, "0: the detector's own (0.5 for transnet, 3.0 for scenedetect)")
    min_duration_s: float = option(1.0, "shorter shots are left out")
    max_duration_s: float = option(20.0, "longer shots are cut into equal parts")
    margin_frames: int = option(2, "frames left out at each end of a shot")


@dataclass
class StageOptions:
    """Everything that assesses samples before they are encoded."""

    quality: QualityLimits = option(QualityLimits, "")
    text: TextLimits = option(TextLimits, "")
    faces: FaceLimits = option(FaceLimits, "")
    nsfw: NsfwLimits = option(NsfwLimits, "")
    camera: CameraLimits = option(CameraLimits, "")
    pairs: PairLimits = option(PairLimits, "")
    duplicates: DuplicateLimits = option(DuplicateLimits, "")
    shots: ShotOptions = option(ShotOptions, "")
    score_only: bool = option(False, "write scores and reasons, drop nothing")
    keep_reasons: list[str] = option([], "reason codes that do not drop a sample")

    def check(self) -> None:
        """Raise UserError for values that mean nothing."""
        if self.shots.detector not in SHOT_DETECTORS:
            raise UserError(f"shots.detector={self.shots.detector}: choose one of {', '.join(SHOT_DETECTORS)}")
        if not 0 <= self.duplicates.max_distance <= 7:
            raise UserError(f"duplicates.max_distance={self.duplicates.max_distance}: must lie in 0..7")
        if not 0 < self.duplicates.min_votes <= 1:
            raise UserError(f"duplicates.min_votes={self.duplicates.min_votes}: must lie in (0, 1]")
        if self.text.num_frames < 1:
            raise UserError(f"text.num_frames={self.text.num_frames}: must be at least 1")
        unknown = sorted(set(self.keep_reasons) - set(REASONS))
        if unknown:
            raise UserError(f"keep_reasons: {unknown[0]!r} is none of {', '.join(REASONS)}")


REASONS = {
    "too_small": "the shorter side is below quality.min_short_side",
    "extreme_aspect": "the sides differ by more than quality.max_aspect",
    "too_short": "shorter than quality.min_duration_s",
    "too_long": "longer than quality.max_duration_s",
    "still": "less motion than quality.min_motion",
    "shaky": "more motion than quality.max_motion",
    "frozen": "too many repeated frames",
    "black": "too many black frames",
    "blurred": "less sharp than quality.min_sharpness",
    "underexposed": "darker than quality.min_brightness",
    "overexposed": "brighter than quality.max_brightness",
    "flat": "less contrast than quality.min_contrast",
    "blocky": "more blockiness than quality.max_blockiness",
    "text_overlay": "more text than text.max_share",
    "no_face": "fewer faces than faces.min_faces",
    "many_faces": "more faces than faces.max_faces",
    "small_face": "the largest face is smaller than faces.min_share",
    "nsfw": "more likely not safe for work than nsfw.max_score",
    "camera_pan": "the camera pans faster than camera.max_pan",
    "camera_zoom": "the camera zooms faster than camera.max_zoom",
    "camera_shake": "the camera shakes more than camera.max_shake",
    "fps_mismatch": "source and target have different frame rates, and neither their frames nor their seconds agree",
    "length_mismatch": "source and target have different durations",
    "temporal_offset": "source and target are shifted in time",
    "one_sided_cut": "a cut in source or target that the other does not have",
    "no_op": "the target is the source",
    "unrelated": "source and target have nothing in common",
    "static_target": "the source moves and the target does not",
    "exact_duplicate": "the same files and text as another sample",
    "near_duplicate": "looks like another sample",
}
