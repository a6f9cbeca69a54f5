"""Rounds of generated results: made, kept, gone on with, and read back for training."""

import base64
import dataclasses
import http.server
import io
import json
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from fixtures.dit_samples import random_model
from fixtures.stored_samples import MODEL as SIZE
from fixtures.stored_samples import stored_sample
from PIL import Image

from loomvideo.model.codec import build_codec
from loomvideo.model.few_steps import FEW_STEPS_KEY, FewSteps
from loomvideo.model.guidance import Guidance
from loomvideo.model.sampler import Branch, SchedulerConfig
from loomvideo.model.sizes import PIPELINE_FILE
from loomvideo.pipelines.evaluation.rewards import Rewarder
from loomvideo.pipelines.training.config import NFTConfig, ObjectiveConfig, SourcePreferenceConfig
from loomvideo.pipelines.training.nft import NFTRecipe
from loomvideo.pipelines.training.rollouts import RolloutMaker, choose_prompts
from loomvideo.pipelines.training.round_folder import Prompt, RoundDataset, finish_round
from loomvideo.pipelines.training.source_preference import SourcePreferenceRecipe
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import MixtureConfig
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import MODEL, Turn

CPU = torch.device("cpu")
NULL = torch.zeros(SIZE.dit.num_layers, 3, SIZE.dit.mllm_dim)


class Shards:
    """Two edits and a text-to-video sample."""

    digest = "d1"

    def __init__(self):
        tasks = ["image_edit", "image_edit", "t2v"]
        self.index = pa.table(
            {
                "key": ["a", "b", "c"], "task": tasks, "split": ["train"] * 3, "dataset": ["x"] * 3,
                "dit_tokens": [4, 4, 8], "num_frames": [1, 1, 5], "width": [64] * 3, "height": [64] * 3,
                "mllm_tokens": [5] * 3, "num_bytes": [9] * 3, "members": [["target", "source"]] * 3,
                "licence": ["CC0-1.0"] * 3,
            }
        )  # fmt: skip

    def read(self, row, select=None):
        key, task = (self.index.column(name)[row].as_py() for name in ("key", "task"))
        sample = stored_sample(key, task, size=8)
        sample.metadata["extra"] = {"edit": {"kind": "background" if key == "a" else "recolour"}}
        return sample


def test_a_round_is_kept_goes_on_and_is_read_as_a_dataset(tmp_path):
    shards = Shards()
    prompts = choose_prompts([shards], "train", MixtureConfig(), 5, seed=0, number=0)
    assert sorted(prompt.key for prompt in prompts) == ["a", "b"]
    with pytest.raises(UserError, match="no edits"):
        choose_prompts([shards], "train", MixtureConfig({"image_edit": 0}), 5, seed=0, number=0)
    with pytest.raises(UserError, match="no edits"):
        choose_prompts([shards], "train", MixtureConfig(datasets={"x": 0}), 5, seed=0, number=0)
    recolours = choose_prompts([shards], "train", MixtureConfig(), 5, seed=0, number=0, edits=["recolour"])
    assert [prompt.key for prompt in recolours] == ["b"]
    with pytest.raises(UserError, match=r"prefer.nft.edits=\['pattern'\].*leave it empty"):
        choose_prompts([shards], "train", MixtureConfig(), 5, seed=0, number=0, edits=["pattern"])
    config = NFTConfig(repeats=2, sampler_steps=2)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    maker = RolloutMaker(
        recipe, random_model(SIZE.dit), build_codec(SIZE.codec, CPU, torch.float32), [shards], config,
        Rewarder({"fidelity": 1.0}, {}), SchedulerConfig(),
    )  # fmt: skip
    facts = [maker.make(prompt, 0, tmp_path) for prompt in prompts]
    assert [len(fact["scores"]) for fact in facts] == [2, 2]
    # What is there is read, not made again.
    maker.dit = None
    assert [maker.make(prompt, 0, tmp_path) for prompt in prompts] == facts
    summary = finish_round(tmp_path, 0, facts, [shards], ["shards://x"], {"policy": "w"}, ["sharpness"])
    assert summary["results"] == 4
    assert summary["datasets"] == {"shards://x": "d1"}
    dataset = RoundDataset(tmp_path, open_parent=lambda url: shards)
    rows = dataset.index.to_pylist()
    assert {row["dataset"] for row in rows} == {"round-0000"}
    assert all((row["reward"] is None) == (row["split"] == "failed") for row in rows)
    sample = dataset.read(0)
    parent = shards.read(rows[0]["parent_row"])
    torch.testing.assert_close(sample.tensors["source"]["mean.0"], parent.tensors["source"]["mean.0"])
    assert sample.tensors["target"]["mean.0"].shape == parent.tensors["target"]["mean.0"].shape
    assert not torch.equal(sample.tensors["target"]["mean.0"], parent.tensors["target"]["mean.0"])
    if rows[0]["reward"] is not None:
        example = recipe.load_example(0, rows[0], sample, SampleRandom(0, rows[0]["key"], 0))
        assert example.reward == rows[0]["reward"]


def test_prompts_without_a_source_are_sampled_with_their_own_shift(monkeypatch):
    config = NFTConfig(repeats=2, sampler_steps=2)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    codec = build_codec(SIZE.codec, CPU, torch.float32)
    maker = RolloutMaker(
        recipe, random_model(SIZE.dit), codec, [Shards()], config, Rewarder({"fidelity": 1.0}, {}),
        SchedulerConfig(9.0), generate_scheduler=SchedulerConfig(2.0),
    )  # fmt: skip
    monkeypatch.setattr("loomvideo.pipelines.training.rollouts.sample", lambda *given: given[5].flow_shift)
    branch, noise = Branch(NULL), torch.zeros(SIZE.dit.in_channels, 1, 2, 2)
    assert maker._sample([noise], {"full": branch}, Guidance(1.0)) == 2.0
    assert maker._sample([noise], {"full": dataclasses.replace(branch, source=noise)}, Guidance(1.0)) == 9.0


def test_results_of_a_prompt_take_guidance_scales_in_turn(tmp_path):
    config = NFTConfig(repeats=3, sampler_steps=1, scales=[1.0, 1.5])
    assert [config.scale_of(repeat) for repeat in range(3)] == [1.0, 1.5, 1.0]
    assert NFTConfig(scale=1.2).scale_of(5) == 1.2
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    codec = build_codec(SIZE.codec, CPU, torch.float32)
    options = (
        recipe,
        random_model(SIZE.dit),
        codec,
        [Shards()],
        config,
        Rewarder({"fidelity": 1.0}, {}),
        SchedulerConfig(),
    )
    scales, starts = [], []
    maker = RolloutMaker(*options)

    def sampled(noises, branches, guidance):
        scales.append(guidance.scale)
        starts.append(noises[0])
        return noises[0]

    maker._sample = sampled
    maker._pixels = lambda latents: np.zeros((1, 16, 16, 3), np.uint8)
    maker.make(Prompt(0, 0, "a"), 0, tmp_path)
    assert scales == [1.0, 1.5, 1.0]
    assert not torch.equal(starts[0], starts[1])
    maker.config = NFTConfig(repeats=2, sampler_steps=1, scales=[1.0, 1.5], same_noise=True)
    maker.make(Prompt(0, 0, "a"), 0, tmp_path / "same")
    assert torch.equal(starts[3], starts[4])
    assert torch.equal(starts[3], starts[0])
    with pytest.raises(UserError, match=r"prefer.nft.same_noise: 3 results.*prefer.nft.scales"):
        NFTConfig(repeats=3, scales=[1.0, 1.5, 1.0], same_noise=True).check()
    with pytest.raises(UserError, match=r"prefer.nft.scales: guidance is folded"):
        RolloutMaker(*options, few_steps=FewSteps.of([1000.0], 1.0))


def serve_brightness(port=0):
    """A reward server on a port: how bright a result is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in sent["result"]]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"rewards": {"brightness": float(np.mean(pictures))}}).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_server_that_breaks_within_a_round_leaves_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("loomvideo.pipelines.evaluation.rewards.FIRST_PAUSE_S", 0.01)
    shards, config = Shards(), NFTConfig(repeats=2, sampler_steps=1)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    prompts = choose_prompts([shards], "train", MixtureConfig(), 2, seed=0, number=0)
    codec, policy, found = build_codec(SIZE.codec, CPU, torch.float32), random_model(SIZE.dit), []
    for breaks in (False, True):
        server = serve_brightness()
        port = server.server_port
        rewarder = Rewarder({"brightness": 1.0}, {}, f"http://127.0.0.1:{port}", patience_s=60)
        maker = RolloutMaker(recipe, policy, codec, [shards], config, rewarder, SchedulerConfig())
        folder, facts, restarted = tmp_path / str(breaks), [maker.make(prompts[0], 0, tmp_path / str(breaks))], []
        if breaks:
            server.shutdown()
            server.server_close()
            threading.Timer(0.3, lambda port=port, into=restarted: into.append(serve_brightness(port))).start()
        facts.append(maker.make(prompts[1], 0, folder))
        for each in restarted or [server]:
            each.shutdown()
            each.server_close()
        assert bool(restarted) == breaks
        finish_round(folder, 0, facts, [shards], ["shards://x"], {}, [])
        dataset = RoundDataset(folder, open_parent=lambda url: shards)
        student = random_model(SIZE.dit)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for visit in range(2):
            examples = [
                recipe.load_example(0, row, dataset.read(place), SampleRandom(0, row["key"], visit))
                for place, row in enumerate(dataset.index.to_pylist())
            ]
            batch = recipe.collate(examples).to(CPU, torch.float32)
            recipe.turn_loss(Turn(0, MODEL), {MODEL: student, "old": policy, "reference": policy}, batch).sum.backward()
            optimizer.step()
        found.append(((folder / "index.parquet").read_bytes(), student.state_dict()))
    (rounds, weights), (other_rounds, other_weights) = found
    assert rounds == other_rounds
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert not torch.equal(weights["proj_out.weight"], policy.state_dict()["proj_out.weight"])


def test_what_a_server_that_was_away_did_not_score_is_made_again(tmp_path):
    shards, config = Shards(), NFTConfig(repeats=2, sampler_steps=1)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    server = serve_brightness()
    url, made = f"http://127.0.0.1:{server.server_port}", []

    def make():
        codec, rewarder = build_codec(SIZE.codec, CPU, torch.float32), Rewarder({"brightness": 1.0}, {}, url, 0.0)
        maker = RolloutMaker(recipe, random_model(SIZE.dit), codec, [shards], config, rewarder, SchedulerConfig())
        made.append(maker.make(Prompt(0, 0, "a"), 0, tmp_path))

    server.shutdown()
    server.server_close()
    make()
    with pytest.raises(UserError, match=r"could be scored and compared: .*when whoever scores is back, run again"):
        finish_round(tmp_path, 0, made, [shards], ["shards://x"], {}, [])
    server = serve_brightness(server.server_port)
    make()
    server.shutdown()
    server.server_close()
    make()
    lost, scored, read = made
    assert all(score["away"] and score["total"] is None for score in lost["scores"])
    assert all(score["total"] > 0 for score in scored["scores"])
    assert read == scored


def test_two_datasets_may_have_a_key_in_common(tmp_path):
    both, config = [Shards(), Shards()], NFTConfig(repeats=2, sampler_steps=1)
    both[1].read = lambda row, select=None: stored_sample("other", "image_edit", size=8)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL, NULL])
    maker = RolloutMaker(
        recipe, random_model(SIZE.dit), build_codec(SIZE.codec, CPU, torch.float32), both, config,
        Rewarder({"fidelity": 1.0}, {}), SchedulerConfig(),
    )  # fmt: skip
    prompts = [Prompt(0, 0, "a"), Prompt(1, 0, "a"), Prompt(1, 1, "b")]
    facts = [maker.make(prompt, 0, tmp_path) for prompt in prompts]
    assert [fact["prompt"]["dataset"] for fact in facts] == [0, 1, 1]
    assert facts[0]["scores"] != facts[1]["scores"]
    finish_round(tmp_path, 0, facts, both, ["shards://x", "shards://y"], {}, [])
    dataset = RoundDataset(tmp_path, open_parent=lambda url: both[url.endswith("y")])
    rows = dataset.index.to_pylist()
    assert [row["key"] for row in rows] == ["a-d0-r0-0", "a-d0-r0-1", "a-d1-r0-0", "a-d1-r0-1", "b-r0-0", "b-r0-1"]
    made = [dataset.read(place).tensors["target"]["mean.0"] for place in (0, 2)]
    assert not torch.equal(*made)
    (tmp_path / "results/a.json").write_text("{}")
    with pytest.raises(UserError, match=r"made by an earlier version.*remove the round"):
        RoundDataset(tmp_path)


@pytest.mark.parametrize("kind", [NFTRecipe, SourcePreferenceRecipe])
def test_a_distilled_start_stays_one_of_few_steps(tmp_path, kind):
    given = (NFTConfig(), "") if kind is NFTRecipe else (SourcePreferenceConfig(),)
    recipe = kind(*given, "tiny", ObjectiveConfig(), [NULL], str(tmp_path))
    assert (recipe.few_steps, recipe.note()) == (None, {})
    steps = FewSteps.of([1000.0, 500.0], 2.0)
    (tmp_path / PIPELINE_FILE).write_text(json.dumps({"model": "tiny", FEW_STEPS_KEY: steps.to_dict()}))
    recipe = kind(*given, "tiny", ObjectiveConfig(), [NULL], str(tmp_path))
    assert recipe.few_steps == steps
    assert recipe.note() == {FEW_STEPS_KEY: steps.to_dict()}


def test_results_of_a_reference_edit_are_measured_beside_their_references(tmp_path):
    shards = Shards()
    shards.index = shards.index.set_column(1, "task", pa.array(["ref_edit", "image_edit", "t2v"]))
    config = NFTConfig(repeats=2, sampler_steps=1)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    seen = []

    class Looking(Rewarder):
        def scores(self, videos, inputs):
            seen.append(inputs)
            return super().scores(videos, inputs)

    maker = RolloutMaker(
        recipe, random_model(SIZE.dit), build_codec(SIZE.codec, CPU, torch.float32), [shards], config,
        Looking({"reference_color_distance": -1.0}, {}), SchedulerConfig(),
    )  # fmt: skip
    with_reference, without = (maker.make(Prompt(0, row, key), 0, tmp_path) for row, key in ((0, "a"), (1, "b")))
    assert [len(inputs.references) for inputs in seen] == [1, 0]
    assert seen[0].references[0].ndim == 3
    # The judge is told that this is an edit.
    assert seen[0].item.source
    assert all(score["total"] < 0 for score in with_reference["scores"])
    assert {score["failure"] for score in without["scores"]} == {
        "reference_color_distance: not defined for this sample"
    }
