"""How tasks are sampled where nobody says: by a model size's own shift and scales, with and without a source."""

import dataclasses

import numpy as np
import pytest

from loomvideo.model import pipeline as pipeline_module
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.guidance import Guidance
from loomvideo.model.pipeline import pipeline_around
from loomvideo.model.sampler import SchedulerConfig
from loomvideo.model.sizes import model_size
from loomvideo.model.tasks import WORDINGS
from loomvideo.pipelines.generation.settings import Settings

SIZE = dataclasses.replace(
    model_size("tiny"),
    scheduler=SchedulerConfig(flow_shift=7.0),
    generate_scheduler=SchedulerConfig(flow_shift=3.0),
    edit_guidance=Guidance(1.5, 1.25),
    generate_guidance=Guidance(3.5, 1.75),
)


@pytest.mark.parametrize("name", ["small", "5b"])
def test_other_sizes_sample_every_task_as_published(name):
    size = model_size(name)
    assert size.generate_scheduler is None
    assert all(size.guidance(task) == Guidance.default(task) for task in WORDINGS)


def test_scales_go_by_source_and_media():
    assert SIZE.guidance("video_edit") == SIZE.guidance("ref_edit") == Guidance(1.5, 1.25)
    assert SIZE.guidance("mi2v") == Guidance(3.5, 1.75)
    assert SIZE.guidance("t2i") == SIZE.guidance("t2v") == Guidance(3.5, None)


def test_what_is_asked_for_goes_before():
    assert Settings().guidance(SIZE.guidance("t2i")) == Guidance(3.5, None)
    assert Settings(scale=1.0, visual_scale=2.0).guidance(SIZE.guidance("t2i")) == Guidance(1.0, None)
    assert Settings(visual_scale=2.0).guidance(SIZE.guidance("image_edit")) == Guidance(1.5, 2.0)


def test_a_pipeline_samples_by_its_size(monkeypatch):
    pipeline = pipeline_around(LoomVideoDiT(SIZE.dit), SIZE)
    used = []

    def sampled(dit, noise, branches, guidance, steps, scheduler, **rest):
        used.append((scheduler.flow_shift, guidance))
        return noise

    monkeypatch.setattr(pipeline_module, "sample", sampled)
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    pipeline.sample(pipeline.encode("t2i", "a red dress", size=(32, 32)))
    pipeline.sample(pipeline.encode("image_edit", "make it red", picture))
    pipeline.sample(pipeline.encode("t2i", "a red dress", size=(32, 32)), guidance=Guidance(1.0))
    assert used == [(3.0, Guidance(3.5, None)), (7.0, Guidance(1.5, 1.25)), (3.0, Guidance(1.0))]
    pipeline.generate_scheduler = None
    assert pipeline.scheduler_of("t2i") is pipeline.scheduler_of("video_edit")
