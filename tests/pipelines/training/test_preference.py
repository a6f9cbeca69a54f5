"""Preference losses against plain formulas; rewards that fail; rounds that are kept and go on."""

import base64
import dataclasses
import http.server
import io
import json
import math
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from fixtures.stored_samples import MODEL as SIZE
from fixtures.stored_samples import stored_sample
from PIL import Image

from loomvideo.model.codec import build_codec
from loomvideo.model.few_steps import FewSteps
from loomvideo.model.flow import EPS, noised_and_target
from loomvideo.model.guidance import Guidance
from loomvideo.model.sampler import Branch, SchedulerConfig
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.rewards import Rewarder, RewardError, Score, group_rewards
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.training.config import NFTConfig, ObjectiveConfig, SourcePreferenceConfig
from loomvideo.pipelines.training.nft import NFTRecipe, nft_loss
from loomvideo.pipelines.training.rollouts import Prompt, RolloutMaker, RoundDataset, choose_prompts, finish_round
from loomvideo.pipelines.training.source_preference import (
    LEAST_DIFFERENCE,
    REFERENCE,
    SourcePreferenceRecipe,
    preference_loss,
)
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import MODEL, Turn

CPU = torch.device("cpu")
NULL = torch.zeros(SIZE.dit.num_layers, 3, SIZE.dit.mllm_dim)
TURN = Turn(0, MODEL)


def network(std=0.08):
    torch.manual_seed(3)
    model = SourcePreferenceRecipe(SourcePreferenceConfig(), "tiny", ObjectiveConfig(), []).build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


# -- the source as rejected sample ----------------------------------------------------------------------------------


def pairs(tasks=("image_edit", "ref_edit")):
    recipe = SourcePreferenceRecipe(SourcePreferenceConfig(), "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    examples = [recipe.load_example(0, {}, stored_sample(t, t), SampleRandom(0, t, 0)) for t in tasks]
    return recipe, examples, recipe.collate(examples).to(CPU, torch.float32)


def test_both_of_a_pair_share_noise_and_level_and_the_start_is_undecided():
    recipe, examples, batch = pairs()
    for example in examples:
        assert example.preferred.timestep == example.rejected.timestep
        t = example.preferred.source_scale
        source = example.preferred.source
        # (1 - t) (target - source) is all that the noised latents differ by; velocities differ by source - target.
        difference = example.preferred.latents - example.rejected.latents
        torch.testing.assert_close(
            difference, (1 - t) * (example.targets[1] - example.targets[0]), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(example.rejected.source, source)
    model = network()
    out = recipe.turn_loss(TURN, {MODEL: model, REFERENCE: model}, batch)
    assert float(out.sum.detach()) == pytest.approx(len(examples) * math.log(2))
    assert batch.num_loss_elements == len(examples) == len(out.per_sample_sum)


def test_preference_loss_is_the_plain_formula_and_knows_no_runaway():
    config = SourcePreferenceConfig(beta=2.0, cap=0.5, anchor=3.0)
    preferred, rejected = (torch.tensor(values, requires_grad=True) for values in ([-0.1, 0.2], [0.1, 5.0]))
    loss = preference_loss(preferred, rejected, config)
    plain = [-math.log(1 / (1 + math.exp(-2 * 0.2))), -math.log(1 / (1 + math.exp(-2 * 0.5))) + 3 * 0.2]
    assert loss.tolist() == pytest.approx(plain)
    loss.sum().backward()
    # Above the cap nothing is gained by being worse at the source, and the target's own error is charged.
    assert rejected.grad[0] < 0 == rejected.grad[1]
    assert preferred.grad[1] == 3.0
    assert preferred.grad[0] > 0


def test_relative_errors_are_parts_of_what_lies_between_target_and_source():
    recipe, examples, batch = pairs()
    recipe.preference = SourcePreferenceConfig(beta=2.0, cap=1.5, anchor=3.0, relative=True)
    to_source, half = 0.3, len(batch.target) // 2
    # The start lies 0.3 of the way back to the source for both samples of a pair, the model on the target.
    towards = batch.target[half:] - batch.target[:half]
    start = torch.cat([batch.target[:half] + to_source * towards] * 2)
    arrived = torch.cat([batch.target[:half]] * 2)
    out = recipe.turn_loss(TURN, {MODEL: lambda _: arrived, REFERENCE: lambda _: start}, batch)
    for number, example in enumerate(examples):
        between = float((example.targets[1] - example.targets[0]).square().mean())
        part = between / (between + LEAST_DIFFERENCE)
        # (1 - 0.7^2) + 0.3^2 = 2 * 0.3 of the squared difference.
        assert float(out.per_sample_sum[number]) == pytest.approx(math.log1p(math.exp(-2.0 * 0.6 * part)), rel=1e-4)
    assert float(out.figures["margin"]) == pytest.approx(2 * to_source * len(examples), rel=0.2)


def test_a_task_without_source_is_named():
    recipe, _, _ = pairs()
    with pytest.raises(UserError, match=r"t2v has no source.*mixture.tasks"):
        recipe.load_example(0, {}, stored_sample("a", "t2v"), SampleRandom(0, "a", 0))


# -- DiffusionNFT ---------------------------------------------------------------------------------------------------


def test_nft_loss_moves_to_good_samples_and_away_from_bad_ones():
    torch.manual_seed(0)
    old, target = torch.randn(6), torch.randn(6)
    for reward in (0.0, 0.3, 1.0):
        same = nft_loss(old, old, target, torch.tensor(reward), beta=0.7)
        torch.testing.assert_close(same, (old - target).square())
        velocity = old.clone().requires_grad_()
        nft_loss(velocity, old, target, torch.tensor(reward), beta=0.7).sum().backward()
        # At the old policy the gradient is 2 beta (2 r - 1) (v - v*): none for an average sample.
        torch.testing.assert_close(velocity.grad, 2 * 0.7 * (2 * reward - 1) * (old - target))
    plain = 0.25 * (0.3 * old + 0.7 * target - target) ** 2
    found = nft_loss(target, old, target, torch.tensor(0.25), beta=0.7)
    torch.testing.assert_close(found, plain + 0.75 * (1.7 * old - 0.7 * target - target) ** 2)


def test_nft_raises_the_reward_of_a_flow_of_two_dimensions():
    """A policy whose samples are N(mean, 0.5^2), with its exact velocity: three rounds move the mean to the goal."""
    goal, spread = torch.tensor([2.0, -1.0]), 0.5

    def velocity(mean, noised, t):
        kept, noise_share = 1 - t, EPS + (1 - EPS) * t
        gain = spread**2 * kept / (spread**2 * kept**2 + noise_share**2)
        clean = mean + gain * (noised - kept * mean)
        return (1 - EPS) * (noised - kept * clean) / noise_share - clean

    def distance_after(beta, liked, rounds=3):
        generator = torch.Generator().manual_seed(0)
        mean = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([mean], lr=0.05)
        for _ in range(rounds):
            old = mean.detach().clone()
            made = old + spread * torch.randn(64, 2, generator=generator)
            scores = [Score({}, total=liked * -float((each - goal).norm())) for each in made]
            reward = torch.tensor(group_rewards(scores, 1.0))[:, None]
            for _ in range(25):
                t = torch.rand(64, 1, generator=generator)
                noised, target = noised_and_target(made, torch.randn(64, 2, generator=generator), t)
                loss = nft_loss(velocity(mean, noised, t), velocity(old, noised, t), target, reward, beta)
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
        return float((mean.detach() - goal).norm())

    start = float(goal.norm())
    assert distance_after(1.0, liked=1) < start - 0.7
    # A smaller beta goes further in the same rounds; a reward turned around leads away.
    assert distance_after(0.4, liked=1) < start - 1.4
    assert distance_after(1.0, liked=-1) > start + 0.5


def test_nft_recipe_weighs_samples_by_their_rewards():
    recipe = NFTRecipe(NFTConfig(beta=1.0), "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    rewards = (1.0, 0.0)
    examples = [
        recipe.load_example(0, {"reward": reward}, stored_sample(key, "video_edit"), SampleRandom(0, key, 0))
        for key, reward in zip("ab", rewards, strict=True)
    ]
    batch = recipe.collate(examples).to(CPU, torch.float32)
    old, model = network(), network(0.07)
    out = recipe.turn_loss(TURN, {MODEL: model, "old": old, "reference": old}, batch)
    with torch.no_grad():
        v, v_old = model(batch.batch), old(batch.batch)
        each = [(v - batch.target).square(), (2 * v_old - v - batch.target).square()]
        rows = batch.batch.video_row_ids.long()
        expected = [each[number][rows == number].sum() for number in (0, 1)]
    torch.testing.assert_close(out.per_sample_sum, torch.stack(expected))
    assert float(out.figures["drift"]) == pytest.approx(float((v - v_old).square().sum()), rel=1e-4)


# -- rewards --------------------------------------------------------------------------------------------------------


def loaded(size=32):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, (1, size, size, 3), dtype=np.uint8)
    target = source.copy()
    target[:, 8:20, 8:20] = (200, 30, 30)
    item = EvalItem("t", "k", "image_edit", "", "red", aligned=True, extra={"garment": True})
    return LoadedItem(item, source, (), target, None, (size, size), 1, 24.0)


def test_a_reward_that_fails_is_counted_and_is_never_a_number():
    inputs = loaded()
    rewarder = Rewarder({"garment_colour": 1.0, "outside": 0.5}, {"outside_psnr_db": 25})
    good = rewarder.score(inputs.target, inputs)
    assert good.total == pytest.approx(good.rewards["garment_colour"] + 0.5 * good.rewards["outside"])
    assert good.rewards["garment_colour"] == pytest.approx(0, abs=1e-3)
    nothing_changed = rewarder.score(inputs.target, LoadedItem(**{**vars(inputs), "target": inputs.source}))
    assert nothing_changed.total is None
    assert "garment_delta_e" in nothing_changed.failure
    wrong = rewarder.score(inputs.target[:, :16], inputs)
    assert wrong.total is None
    assert wrong.failure
    noise = np.random.default_rng(1).integers(0, 255, inputs.target.shape, dtype=np.uint8)
    assert rewarder.score(noise, inputs).floored == ("outside_psnr_db",)
    assert group_rewards([good, nothing_changed, wrong], 1.0) == [None, None, None]
    without = Rewarder({"garment_colour": 1.0, "outside": 0.0, "beauty": 0.0}, {}).score(inputs.target, inputs)
    assert set(without.rewards) == {"garment_colour"}
    with pytest.raises(UserError, match="give at least one reward"):
        Rewarder({"outside": 0.0}, {})
    # Only what is looked at is measured.
    assert set(good.metrics) == {"garment_delta_e", "outside_psnr_db"}
    with pytest.raises(UserError, match=r"beauty is none of garment_colour.*rewards.server"):
        Rewarder({"beauty": 1.0}, {})
    with pytest.raises(UserError, match=r"rewards.floors: outside_psnr is no metric.*mean outside_psnr_db\?"):
        Rewarder({"outside": 1.0}, {"outside_psnr": 25})
    with pytest.raises(UserError, match=r"rewards.watched: beauty is no metric.*there are asked_area"):
        Rewarder({"outside": 1.0}, {}, watched=["beauty"])


def test_rewards_of_a_group_compare_with_its_mean():
    scores = [Score({}, total=value) for value in (1.0, 2.0, 3.0)]
    assert group_rewards(scores, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert group_rewards(scores, 2.0)[2] == pytest.approx(0.5 + 1 / (4 * np.std([1, 2, 3])))
    failed = Score({}, failure="x")
    assert group_rewards([*scores, failed], 1.0)[3] is None
    floored = Score({}, total=9.0, floored=("f",))
    assert group_rewards([*scores, floored], 1.0) == [*group_rewards(scores, 1.0), 0.0]
    assert group_rewards([Score({}, total=2.0)] * 3, 1.0) == [0.5] * 3


def test_a_server_that_is_down_for_a_while_changes_nothing(monkeypatch):
    monkeypatch.setattr("loomvideo.pipelines.evaluation.rewards.FIRST_PAUSE_S", 0.01)
    answers = ["down", "nonsense", "ok", "ok"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers.pop(0)
            self.send_response(503 if answer == "down" else 200)
            self.end_headers()
            body = {"rewards": {"beauty": 0.25 + len(sent["result"])}} if answer == "ok" else {"rewards": {}}
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        inputs, url = loaded(), f"http://127.0.0.1:{server.server_port}"
        broken = Rewarder({"beauty": 2.0}, {}, url).score(inputs.target, inputs)
        whole = Rewarder({"beauty": 2.0}, {}, url).score(inputs.target, inputs)
        assert broken == whole
        assert whole.total == 2.5
    finally:
        server.shutdown()
        server.server_close()
    gone = Rewarder({"beauty": 2.0}, {}, url, patience_s=0.0).score(inputs.target, inputs)
    assert gone.total is None
    assert url in gone.failure
    assert issubclass(RewardError, Exception)


# -- rounds ---------------------------------------------------------------------------------------------------------


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
    prompts = choose_prompts([shards], "train", {}, 5, seed=0, number=0)
    assert sorted(prompt.key for prompt in prompts) == ["a", "b"]
    with pytest.raises(UserError, match="no edits"):
        choose_prompts([shards], "train", {"image_edit": 0}, 5, seed=0, number=0)
    recolours = choose_prompts([shards], "train", {}, 5, seed=0, number=0, edits=["recolour"])
    assert [prompt.key for prompt in recolours] == ["b"]
    with pytest.raises(UserError, match=r"prefer.nft.edits=\['pattern'\].*leave it empty"):
        choose_prompts([shards], "train", {}, 5, seed=0, number=0, edits=["pattern"])
    config = NFTConfig(repeats=2, sampler_steps=2)
    recipe = NFTRecipe(config, "", "tiny", ObjectiveConfig(shift_base_tokens=1), [NULL])
    maker = RolloutMaker(
        recipe, network(), build_codec(SIZE.codec, CPU, torch.float32), [shards], config,
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
        recipe, network(), codec, [Shards()], config, Rewarder({"fidelity": 1.0}, {}), SchedulerConfig(9.0),
        generate_scheduler=SchedulerConfig(2.0),
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
    options = recipe, network(), codec, [Shards()], config, Rewarder({"fidelity": 1.0}, {}), SchedulerConfig()
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
    prompts = choose_prompts([shards], "train", {}, 2, seed=0, number=0)
    codec, policy, found = build_codec(SIZE.codec, CPU, torch.float32), network(), []
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
        student = network()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for visit in range(2):
            examples = [
                recipe.load_example(0, row, dataset.read(place), SampleRandom(0, row["key"], visit))
                for place, row in enumerate(dataset.index.to_pylist())
            ]
            batch = recipe.collate(examples).to(CPU, torch.float32)
            recipe.turn_loss(TURN, {MODEL: student, "old": policy, "reference": policy}, batch).sum.backward()
            optimizer.step()
        found.append(((folder / "index.parquet").read_bytes(), student.state_dict()))
    (rounds, weights), (other_rounds, other_weights) = found
    assert rounds == other_rounds
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert not torch.equal(weights["proj_out.weight"], policy.state_dict()["proj_out.weight"])


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
        recipe, network(), build_codec(SIZE.codec, CPU, torch.float32), [shards], config,
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
