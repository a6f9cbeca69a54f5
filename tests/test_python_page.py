"""docs/python.md: what it shows runs, from samples to a film, in one process."""

import pytest
from fixtures.pages import blocks, replaced

from loomvideo.jobs import distill, prefer, prepare, pretrain
from loomvideo.platform.errors import UserError

SMALL = {
    'training={"steps": 2200}': 'training={"steps": 2, "optimizer": {"warmup_steps": 1}, "pack": {"tokens": 400}}',
    'run="edits"': 'run="edits", **{"training.steps": 2, "training.pack.tokens": 400}',
    'run="fast"': 'run="fast", **{"training.steps": 6, "distill.critic_warmup": 1, "training.pack.tokens": 400}, '
    'evaluation={"num_edits": 0}',
    'run="liked"': 'run="liked", **{"training.steps": 2, "training.pack.tokens": 800}, evaluation={"num_edits": 0}',
    'suites=["sample"]': 'suites=["sample"], limit=2, **{"generation.steps": 2}',
    'out="dress.mp4"': 'out="dress.mp4", steps=2',
    "steps=20": "steps=2",
}


@pytest.mark.slow
@pytest.mark.walkthrough
@pytest.mark.timeout(900)
def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, ray_cluster):
    from loomvideo.pipelines.sample_data.config import SampleDataConfig
    from loomvideo.pipelines.sample_data.generate import make_sample_data

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = SampleDataConfig(num_train=12, num_heldout=6, width=64, height=64, real=False, workers=1)
    make_sample_data(tmp_path / "data" / "sample", small)
    names: dict[str, object] = {}
    exec(replaced("\n".join(blocks("python.md", "python")), SMALL), names)
    assert names["shards"].summary()["written"] == 18
    assert names["first"].steps == names["edits"].steps == 2
    assert names["edits"].folder == tmp_path / "runs" / "finetune-edit" / "edits"
    assert (names["edits"].weights / "config.json").is_file()
    assert (names["fast"].steps, names["liked"].steps) == (6, 2)
    assert names["scores"].checkpoint == "finetune-edit/edits"
    assert names["made"].file.stat().st_size > 0
    assert names["frames"].shape == names["blue"].shape == (9, 96, 96, 3)
    assert names["sample"].key in names["dataset"].index.column("key").to_pylist()


def test_keyword_arguments_are_checked_like_the_command_line():
    with pytest.raises(UserError, match=r"keyword arguments: unknown key inptu; did you mean input\?"):
        prepare(inptu="samples.jsonl")
    with pytest.raises(UserError, match=r"keyword arguments: training.steps='many' has the wrong type, expected int"):
        pretrain(training={"steps": "many"})
    with pytest.raises(UserError, match=r"keyword arguments: unknown key distill\.schedul; did you mean"):
        distill(distill={"schedul": [1000]})
    with pytest.raises(UserError, match=r"prefer\.method=dpo: use source or nft"):
        prefer(prefer={"method": "dpo"}, data={"shards": ["nowhere"]})
    with pytest.raises(UserError, match="preset=7b: not found for pretrain; use one of 5b-stage1"):
        pretrain(preset="7b")
