"""What the pools of the stages reserve."""

from loomvideo.jobs.command import job_config
from loomvideo.pipelines.prepare import stages
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.pools import Pool
from loomvideo.pipelines.prepare.stages import ASSESS, ENCODE, run_stage


def test_workers_that_assess_reserve_their_own_cpus():
    config = job_config(PrepareConfig, "data-prepare", ["preset=5b", "input=x", "output=y"])
    # Decoders may take every CPU: a builder needs none reserved to get its GPU.
    assert (ENCODE.pool(config).cpus, ENCODE.pool(config).gpus) == (0, 1)
    assert config.workers.decoders > 0
    assert (ASSESS.pool(config).cpus, ASSESS.pool(config).gpus, ASSESS.pool(config).size) == (1.0, 0.0, 0)


def test_two_shards_at_a_time_only_where_that_leaves_no_builder_without():
    pool = Pool(0, 0, 1, rows=2)
    assert pool.rows_at_a_time(31, {"GPU": 8.0, "CPU": 100.0}) == 1
    assert pool.rows_at_a_time(32, {"GPU": 8.0, "CPU": 100.0}) == 2
    assert pool.rows_at_a_time(32, {"CPU": 100.0}) == 2, "nodes with GPUs are still to come"
    assert Pool(4, 1, rows=2).rows_at_a_time(8, {"CPU": 2.0}) == 2
    assert Pool(2, 1, rows=2).rows_at_a_time(7, {"CPU": 64.0}) == 1


def test_workers_in_other_folders_find_what_relative_paths_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(stages, "map_on_actors", lambda worker, arguments, work, pool: given.extend(arguments) or [])
    list(run_stage(ENCODE, PrepareConfig(input="samples.jsonl", output="s3://bucket/shards"), []))
    assert given[0].input == str(tmp_path / "samples.jsonl")
    assert (given[0].output, given[0].codec_folder) == ("s3://bucket/shards", "")
