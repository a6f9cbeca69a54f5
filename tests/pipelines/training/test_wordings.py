"""Several wordings of a text: encoded with the sample, one of them drawn at every visit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fixtures.raw import prepare_config, raw_samples, without_ray

from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.config import FeatureOptions
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.features import streamed_inputs
from loomvideo.pipelines.prepare.job import prepare
from loomvideo.pipelines.prepare.staleness import stale_parts
from loomvideo.pipelines.prepare.verify import shape_problems
from loomvideo.pipelines.sources.samples import parse_sample
from loomvideo.pipelines.training import dit_recipe
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.randomness import SampleRandom

MODEL = model_size("tiny")
OTHERS = {"sample-000": ["flip it", "mirror the whole video from left to right"], "sample-003": ["a moving bar"]}


def wordings_added(config) -> None:
    path = Path(config.input)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"texts": OTHERS.get(row["key"], [])}) + "\n" for row in rows))


@dataclasses.dataclass
class Prepared:
    """A dataset before and after two of its samples got other wordings, and with streamed features."""

    before: dict
    first_draws: dict
    stale: set
    work: dict
    again: str
    stored: ShardDataset
    streamed: ShardDataset


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordings")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        raw_samples(folder / "raw", 4)
        config = prepare_config(folder / "raw", folder / "out")
        config.clips = dataclasses.replace(config.clips, windows=2, num_frames=5)
        prepare(config)
        dataset = ShardDataset.open(config.output)
        assert not any("texts" in name for name in dataset.index.column_names)
        before = {key: dataset.read(row) for key, row in dataset.rows_by_key.items()}
        recipe = recipe_of(dataset)
        draws = {(key, visit): told(recipe, dataset, key, visit) for key in OTHERS for visit in range(3)}
        wordings_added(config)
        stale = {part.name for part in stale_parts(config)}
        work = dict(prepare(config).work)
        again = prepare(config).reason
        streamed = dataclasses.replace(config, output=str(folder / "streamed"), features=FeatureOptions("streamed"))
        prepare(streamed)
        datasets = ShardDataset.open(config.output), ShardDataset.open(streamed.output)
        return Prepared(before, draws, stale, work, again, *datasets)


def alike(one, other) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=0.05, atol=0.05)


def recipe_of(dataset, **options):
    objective = ObjectiveConfig(drop_all=0.0, drop_text=0.0)
    return LoomVideoRecipe("tiny", objective, [dataset.shared()["null"]], **options)


def told(recipe, dataset, key, visit):
    """What a visit is conditioned on, and its noised latents."""
    row = dataset.rows_by_key[key]
    random = SampleRandom(0, key, visit)
    values = dataset.index.slice(row, 1).to_pylist()[0]
    example = recipe.load_example(0, values, recipe.read(dataset, row, values, random), random)
    return example.sample.mllm_states, example.sample.latents


def test_adding_wordings_encodes_them_and_no_latents(prepared):
    before, after, work = prepared.before, prepared.stored, prepared.work
    assert prepared.stale == set(OTHERS)
    assert (work["made.mllm"], work.get("made.target", 0), work.get("made.source", 0)) == (2, 0, 0)
    assert prepared.again == "up to date"
    for key, row in after.rows_by_key.items():
        old, new = before[key], after.read(row)
        assert list(shape_problems(new, MODEL.grid)) == []
        if key not in OTHERS:
            assert old.metadata == new.metadata
            assert all(new.tensors["mllm"][name].equal(states) for name, states in old.tensors["mllm"].items())
        # More prompts of a sample in one batch: other last bits.
        assert all(alike(new.tensors["mllm"][name], states) for name, states in old.tensors["mllm"].items())
    counts = dict(zip(after.index["key"].to_pylist(), after.index["score_texts"].to_pylist(), strict=True))
    assert {key: count for key, count in counts.items() if count} == {"sample-000": 3.0, "sample-003": 2.0}
    edit = after.read(after.rows_by_key["sample-000"])
    # Two windows, three wordings; of pictures without text there is one state a window.
    assert {name for name in edit.tensors["mllm"] if name.startswith("full")} == {f"full.{i}" for i in range(6)}
    assert {name for name in edit.tensors["mllm"] if name.startswith("visual")} == {"visual.0", "visual.1"}
    assert edit.metadata["texts"] == ["mirror it", *OTHERS["sample-000"]]


@pytest.mark.parametrize("whole_read_bytes", [10**9, 0])
def test_a_visit_draws_a_wording_and_the_same_visit_the_same(prepared, monkeypatch, whole_read_bytes):
    monkeypatch.setattr(dit_recipe, "WHOLE_READ_BYTES", whole_read_bytes)
    dataset = prepared.stored
    recipe = recipe_of(dataset)
    stored = dataset.read(dataset.rows_by_key["sample-000"])
    drawn = set()
    for visit in range(40):
        states, _ = told(recipe, dataset, "sample-000", visit)
        (entry,) = [n for n in range(6) if stored.tensors["mllm"][f"full.{n}"].equal(states)]
        drawn.add(entry)
        random = SampleRandom(0, "sample-000", visit)
        assert entry % 2 == int(2 * random.uniform("window"))
        assert entry // 2 == int(3 * random.uniform("text"))
        assert told(recipe, dataset, "sample-000", visit)[0].equal(states)
    assert drawn == set(range(6))


def test_the_draw_of_a_wording_shifts_no_other(prepared):
    dataset = prepared.stored
    for (key, visit), (states, latents) in prepared.first_draws.items():
        now = told(recipe_of(dataset), dataset, key, visit)
        # Noise, window and level stay.
        assert now[1].equal(latents)
        first = int(SampleRandom(0, key, visit).uniform("text") * (1 + len(OTHERS[key]))) == 0
        assert alike(now[0], states) == first


class Pool:
    """Computes streamed states in this process."""

    def __init__(self):
        self.encoder = SampleEncoder(MODEL, FeatureOptions())

    def states(self, member, entry, variant):
        inputs = streamed_inputs(member, entry, variant, self.encoder.processor)
        return self.encoder.mllm.encode([inputs])[0].bfloat16()


@pytest.mark.parametrize("whole_read_bytes", [10**9, 0])
def test_streamed_wordings_share_their_pictures(prepared, monkeypatch, whole_read_bytes):
    monkeypatch.setattr(dit_recipe, "WHOLE_READ_BYTES", whole_read_bytes)
    stored, dataset = prepared.stored, prepared.streamed
    member = dataset.read(dataset.rows_by_key["sample-000"]).tensors["mllm"]
    assert sorted(name for name in member if name.startswith("pixel_values")) == [
        "pixel_values_videos.0",
        "pixel_values_videos.1",
    ]
    assert "input_ids.5" in member
    recipe = recipe_of(dataset, features=Pool())
    for visit in range(8):
        ours, kept = (told(recipe, data, "sample-000", visit)[0] for data in (dataset, stored))
        assert alike(ours, kept)


def test_texts_that_are_none():
    line = {"key": "a", "task": "t2i", "dataset": "d", "target": "a.png", "caption": "a dress"}
    assert parse_sample(json.dumps(line | {"texts": [" a red dress "]}), "f:1").texts == ["a red dress"]
    assert "texts" not in parse_sample(json.dumps(line), "f:1").to_json()
    for texts, message in ((["a dress"], "none twice"), ([""], "is empty"), ({"a": 1}, "list of texts")):
        with pytest.raises(UserError, match=message):
            parse_sample(json.dumps(line | {"texts": texts}), "f:1")
