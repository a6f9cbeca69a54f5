"""Garments that a caption names, found in a picture without a judge."""

import dataclasses

import numpy as np
import pytest

from loomvideo.pipelines.evaluation.drawn_garments import UPPER_CLASS, drawn_garments, garments_right
from loomvideo.pipelines.sample_data.fashion import random_look
from loomvideo.pipelines.sample_data.figures import Look, Renderer, random_figure
from loomvideo.pipelines.sample_data.garments import COLOURS, Garment


def drawing(garments: tuple[Garment, ...], outfit: str, side: int = 96, frames: int = 1) -> np.ndarray:
    figure = dataclasses.replace(random_figure(np.random.default_rng(5)), outfit=outfit)
    renderer = Renderer(figure, Look(garments, "studio"), side, side)
    return np.stack([renderer.frame(number) for number in range(frames)])


@pytest.mark.parametrize("side", [96, 192])
def test_a_figure_wears_what_it_wears_and_nothing_else(side):
    shirt, skirt = Garment("shirt", "red"), Garment("skirt", "blue", "stripes", "white")
    picture = drawing((shirt, skirt), "blouse", side)
    worn = [garment.attributes() for garment in (shirt, skirt)]
    assert garments_right(picture, worn)
    for wrong in (
        worn[:1],
        [worn[0] | {"colour": "green"}, worn[1]],
        [worn[0], worn[1] | {"colour": "white"}],
        [{"type": "dress", "colour": "red"}],
    ):
        assert not garments_right(picture, wrong)
    masks = drawn_garments(picture)
    assert all(mask.shape == (1, side, side) and 0.02 < mask.mean() < 0.4 for mask in masks.values())
    assert not np.logical_and(*masks.values()).any()


def test_films_are_looked_at_whole():
    dress = Garment("dress", "purple", "checks", "white")
    film = drawing((dress,), "dress", frames=5)
    assert garments_right(film, [dress.attributes()])
    assert not garments_right(
        np.concatenate([film[:1], np.full_like(film, 128)]), [{"type": "skirt", "colour": "purple"}]
    )


def test_specks_of_a_place_are_no_garment():
    figure = dataclasses.replace(random_figure(np.random.default_rng(5)), outfit="coat")
    forest = Renderer(figure, Look((Garment("coat", "green"),), "forest"), 96, 96)
    assert drawn_garments(forest.empty_scene()[None]) == {}
    assert not garments_right(forest.empty_scene()[None], [{"type": "coat", "colour": "green"}])
    assert set(drawn_garments(forest.frame(0)[None])) == {UPPER_CLASS}


def test_most_figures_of_the_sample_world_are_read():
    random = np.random.default_rng(11)
    right = 0
    for _ in range(24):
        figure = random_figure(random)
        look = random_look(figure.outfit, random)
        picture = Renderer(figure, look, 96, 96).frame(0)[None]
        right += garments_right(picture, [garment.attributes() for garment in look.garments])
        assert {garment.colour for garment in look.garments} <= set(COLOURS)
    assert right >= 22
