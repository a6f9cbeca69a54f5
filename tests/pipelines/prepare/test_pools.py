"""What the pools of the stages reserve."""

from loomvideo.jobs.command import job_config
from loomvideo.pipelines.prepare import stages
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.stages import ASSESS, ENCODE, run_stage


def test_workers_that_assess_reserve_their_own_cpus():
    config = job_config(PrepareConfig, "data-prepare", ["preset=5b", "input=x", "output=y"])
    assert ENCODE.pool(config).cpus == 8
    assert ENCODE.pool(config).gpus == 1
    assert (ASSESS.pool(config).cpus, ASSESS.pool(config).gpus, ASSESS.pool(config).size) == (1.0, 0.0, 0)


def test_workers_in_other_folders_find_what_relative_paths_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(stages, "map_on_actors", lambda worker, arguments, work, pool: given.extend(arguments) or [])
    list(run_stage(ENCODE, PrepareConfig(input="samples.jsonl", output="s3://bucket/shards"), []))
    assert given[0].input == str(tmp_path / "samples.jsonl")
    assert (given[0].output, given[0].codec_folder) == ("s3://bucket/shards", "")
