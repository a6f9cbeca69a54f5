"""The generator behind the page is loaded for the largest request that its limits allow."""

import dataclasses

import pytest

from loomvideo.model.loading import ModelSource
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.serving import model_generator
from loomvideo.pipelines.serving.model_generator import PageGenerator
from loomvideo.pipelines.serving.requests import RequestLimits


@pytest.mark.parametrize(("gib", "mode"), [(80, "resident"), (24, "sequential"), (10, "offload")])
def test_memory_is_chosen_for_the_largest_request(gib, mode, monkeypatch):
    loaded = []

    class Loaded:
        settings = Settings()

        @staticmethod
        def load(source, settings):
            loaded.append((source, settings))
            return Loaded

    monkeypatch.setattr(model_generator, "FileGenerator", Loaded)
    source = ModelSource("weights", "5b", memory="auto", device="cuda", memory_bytes=gib * 2**30)
    PageGenerator.load(source, Settings(), RequestLimits())
    assert loaded[0][0].memory == mode
    assert loaded[0][1] == Settings()
    assert dataclasses.replace(loaded[0][0], memory="auto", codec_limit_bytes=0) == source
