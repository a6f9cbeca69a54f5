"""Films in windows: what covers what, what holds neighbours together, and that memory is one window's."""

import numpy as np
import pytest
import torch

from loomvideo.model.codec import LatentGrid, build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.few_steps import FewSteps
from loomvideo.model.film import Window, edit_film, film_windows, seam_energy
from loomvideo.model.guidance import Guidance
from loomvideo.model.kernels import set_backend
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sampler import Anchor
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError

SIZE = model_size("tiny")
GRID = SIZE.grid
STRIDE = GRID.temporal_stride
SIDE = 2 * max(GRID.side_multiples)
LONG, SHARED = GRID.frames(4), GRID.frames(2)


@pytest.fixture(scope="module")
def pipeline():
    set_backend("eager")
    torch.manual_seed(0)
    dit = LoomVideoDiT(SIZE.dit)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.02)
    return LoomVideoPipeline(dit, build_codec(SIZE.codec), FrozenMLLM.of_size(SIZE), SIZE.scheduler)


def smooth_film(total):
    """A slow pan over a smooth picture: neighbouring frames differ a little, everywhere alike."""
    x = np.linspace(0, 6, 4 * total + SIDE)
    row = (127 + 100 * np.sin(x)).astype(np.uint8)
    frames = np.stack([np.broadcast_to(row[4 * number : 4 * number + SIDE], (SIDE, SIDE)) for number in range(total)])
    return np.repeat(frames[..., None], 3, axis=-1)


@pytest.mark.parametrize("total", [1, 2, STRIDE + 1, LONG - 1, LONG, LONG + 1, 5 * LONG + 3])
def test_windows_cover_every_frame_once(total):
    windows = film_windows(total, LONG, SHARED, GRID)
    end = 0
    for window in windows:
        assert window.start + window.shared == end
        assert window.num_frames == GRID.whole_frames(window.num_frames) > window.shared
        end = window.start + window.num_frames
    assert total <= end < total + STRIDE


def test_impossible_windows_are_refused():
    with pytest.raises(UserError, match="overlap=9"):
        film_windows(100, 9, 9, GRID)
    with pytest.raises(UserError, match="overlap"):
        film_windows(100, LONG, SHARED + 1, GRID)


def test_an_anchor_with_all_weight_is_reached_by_every_number_of_steps(pipeline):
    conditions = pipeline.encode("t2v", "a coat", size=(SIDE, SIDE), num_frames=LONG)
    target = torch.randn(conditions.latent_shape[0], 2, *conditions.latent_shape[2:])
    free = pipeline.sample(conditions, 3)
    drawn = pipeline.sample(conditions, 3, anchor=Anchor(target, torch.tensor([1.0, 0.0])))
    assert (drawn[:, 0] - target[:, 0]).abs().max() < 1e-4
    assert (drawn[:, 1] - target[:, 1]).abs().mean() > 0.1
    assert not torch.equal(drawn[:, 2:], free[:, 2:])


def test_a_distilled_model_is_drawn_too(pipeline):
    conditions = pipeline.encode("t2v", "a coat", size=(SIDE, SIDE), num_frames=LONG)
    target = torch.randn(conditions.latent_shape[0], 2, *conditions.latent_shape[2:])
    few = LoomVideoPipeline(parts=pipeline.parts, few_steps=FewSteps((1000.0, 500.0)))
    drawn = few.sample(conditions, 2, anchor=Anchor(target, torch.tensor([1.0, 0.0])))
    assert torch.allclose(drawn[:, 0], target[:, 0], atol=1e-5)
    assert not torch.allclose(drawn[:, 1], target[:, 1], atol=1e-1)


def test_a_distilled_model_takes_its_own_steps_and_says_so_once(pipeline, caplog):
    conditions = pipeline.encode("t2v", "a coat", size=(SIDE, SIDE), num_frames=LONG)
    few = LoomVideoPipeline(parts=pipeline.parts, few_steps=FewSteps((1000.0, 500.0)))
    own = few.sample(conditions, 2)
    assert not caplog.messages
    assert torch.equal(few.sample(conditions, 30, Guidance(5.0)), own)
    few.sample(conditions, 20)
    assert len(caplog.messages) == 1
    assert "steps=30: this checkpoint was distilled to 2 steps" in caplog.messages[0]


def test_a_film_of_one_window_is_the_ordinary_edit(pipeline):
    source = smooth_film(LONG)
    (frames,) = edit_film(
        pipeline,
        lambda start, stop: source[start:stop],
        LONG,
        film_windows(LONG, LONG, SHARED, GRID),
        lambda frames: pipeline.encode("video_edit", "blue", frames),
        lambda conditions, noise, anchor: pipeline.sample(conditions, 2, noise=noise, anchor=anchor),
        seed=5,
    )
    assert np.array_equal(frames, pipeline("blue", "video_edit", source=source, steps=2, seed=5))


def test_joints_are_no_more_visible_than_the_film_itself(pipeline):
    """With a model that only knows the source and wavers from window to window: what is left is the joining."""
    total = 6 * LONG
    source, asked = smooth_film(total), []
    wavering = iter(torch.linspace(-0.3, 0.3, 50).tolist()[::3])

    def read(start, stop):
        asked.append((start, stop))
        return source[start:stop]

    def sample(conditions, noise, anchor):
        latents = conditions.branches["full"].source + next(wavering)
        if anchor is None:
            return latents
        count = anchor.latents.shape[1]
        weights = anchor.weights[None, :, None, None]
        latents[:, :count] += weights * (anchor.latents - latents[:, :count])
        return latents

    windows = film_windows(total, LONG, SHARED, GRID)
    assert len(windows) > 4
    pieces = list(
        edit_film(pipeline, read, total, windows, lambda frames: pipeline.encode("video_edit", "x", frames), sample)
    )
    assert max(map(len, pieces)) <= LONG
    assert asked[0] == (0, LONG)
    assert [start for start, _ in asked[1:]] == [stop for _, stop in asked[:-1]]  # each frame once
    film = np.concatenate(pieces)
    assert film.shape == source.shape
    joints = [window.start for window in windows[1:]] + [window.start + window.shared for window in windows[1:]]
    at_joints, elsewhere = seam_energy(film, joints)
    assert at_joints <= elsewhere


def test_seam_energy_sees_a_cut():
    film = smooth_film(20)
    film[10:] = 255 - film[10:]
    at_joints, elsewhere = seam_energy(film, [10])
    assert at_joints > 2 * elsewhere


def test_neighbours_share_a_sixth_unless_told():
    wan = LatentGrid(4, 16)
    assert [film_windows(500, frames, 0, wan)[1].shared for frames in (97, 49, 9, 5)] == [17, 9, 5, 1]


def test_windows_state_what_they_share():
    assert film_windows(LONG + 1, LONG, SHARED, GRID)[1] == Window(STRIDE, LONG, LONG - STRIDE)
