import itertools

import pytest

from loomvideo.jobs.command import job_config, preset_file, preset_names
from loomvideo.jobs.training.config import TrainingJobConfig, job_schema

JOBS = ("pretrain", "finetune-edit", "distill", "prefer")
PRESETS = [(job, name) for job in JOBS for name in preset_names(job)]


@pytest.mark.parametrize(("job", "name"), PRESETS)
def test_presets_load_and_pass_their_checks(job, name):
    config = job_config(job_schema(job), job, [f"preset={name}", "data.shards=[shards]"])
    config.check()
    assert config.model == name.split("-")[0]


def test_published_stages_differ_as_published():
    one, two, three = (job_config(TrainingJobConfig, "pretrain", [f"preset=5b-stage{n}"]) for n in (1, 2, 3))
    assert [c.objective.use_source_embedding for c in (one, two, three)] == [False, True, True]
    assert [c.objective.shift_scale for c in (one, two, three)] == [0.65, 0.5, 0.5]
    assert [c.training.optimizer.warmup_steps for c in (one, two, three)] == [100, 1000, 1000]
    assert [c.training.ema.decay for c in (one, two, three)] == [0.0, 0.9999, 0.9999]


@pytest.mark.parametrize(("job", "name"), PRESETS)
def test_every_key_of_a_preset_is_commented(job, name):
    lines = preset_file(job, name).read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if line.lstrip()[:1] not in ("#", "") and not line.endswith(":"):
            assert before.lstrip().startswith("# "), line
