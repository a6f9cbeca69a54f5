"""What the pools of the stages reserve."""

from loomvideo.jobs.command import job_config
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.stages import ASSESS, ENCODE


def test_workers_that_assess_reserve_their_own_cpus():
    config = job_config(PrepareConfig, "data-prepare", ["preset=5b", "input=x", "output=y"])
    assert ENCODE.pool(config).cpus == 8
    assert ENCODE.pool(config).gpus == 1
    assert (ASSESS.pool(config).cpus, ASSESS.pool(config).gpus, ASSESS.pool(config).size) == (1.0, 0.0, 0)
