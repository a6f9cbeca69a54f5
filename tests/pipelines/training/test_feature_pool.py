"""Streamed MLLM features train like stored ones, in the planned order, also when an actor dies."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray
import torch

from loomvideo.model.conditioning.inputs import build_inputs
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.features import stored_members, streamed_members
from loomvideo.pipelines.training.config import FeaturePoolConfig, ObjectiveConfig
from loomvideo.pipelines.training.feature_pool import FeatureActor, FeaturePool, feature_pool
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom

MODEL = model_size("tiny")


@pytest.fixture(scope="module")
def actor():
    threads = torch.get_num_threads()
    yield FeatureActor(MODEL, 0, 1)
    torch.set_num_threads(threads)


def samples(mllm, task):
    """The same sample with its features stored and streamed."""
    generator = torch.Generator().manual_seed(len(task))
    source = torch.randint(0, 256, (5, 64, 64, 3), generator=generator, dtype=torch.uint8) if "edit" in task else None
    inputs = {
        f"{variant}.0": build_inputs(task, "make the shirt red", source, [], variant, mllm.tokenizer, mllm.processor)
        for variant in (("full",) if source is None else ("full", "visual"))
    }
    latents = torch.randn((MODEL.dit.in_channels, 2, 4, 4), generator=generator).bfloat16()
    tensors = {"target": {"mean.0": latents}} | ({} if source is None else {"source": {"mean.0": latents + 1}})
    states = dict(zip(inputs, mllm.encode(list(inputs.values())), strict=True))
    members = {"stored": stored_members(states, "bf16"), "streamed": streamed_members(inputs, mllm.processor)}
    metadata = {"task": task, "num_windows": 1, "mllm_index": [0]}
    return [
        ShardSample("a", metadata | {"features": kind}, tensors | {"mllm": member}) for kind, member in members.items()
    ]


class Here:
    """Answers like a pool, from this process."""

    def __init__(self, actor):
        self.pool = FeaturePool([SimpleNamespace(states=SimpleNamespace(remote=actor.states))])

    def states(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "get", lambda value: value)
            return self.pool.states(*arguments)


@pytest.mark.parametrize("task", ["t2v", "video_edit"])
@pytest.mark.parametrize("drops", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_losses_are_those_of_stored_features(actor, task, drops):
    objective = ObjectiveConfig(drop_all=drops[0], drop_text=drops[1])
    null = torch.randn(MODEL.dit.num_layers, 3, MODEL.dit.mllm_dim)
    recipe = LoomVideoRecipe("tiny", objective, [null], features=Here(actor))
    model = recipe.build_model()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    losses = []
    for sample in samples(actor.mllm, task):
        example = recipe.load_example(0, {}, sample, SampleRandom(0, "a", 0))
        pack = recipe.collate([example])
        assert pack.batch.mllm_states.dtype == torch.bfloat16
        losses.append(float(recipe.loss(model, pack.to(torch.device("cpu"), torch.float32)).sum.detach()))
    # Prompts of one call share a batch when they are stored, which moves the last bits before rounding.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_requests_that_arrive_together_share_a_batch_and_one_bad_prompt_fails_alone(actor, packed):
    member = {}
    for entry, text in enumerate(("red", "a blue coat", "make the whole shirt green and the trousers white")):
        inputs = build_inputs("t2v", text, None, [], "full", actor.mllm.tokenizer, actor.mllm.processor)
        member |= streamed_members({f"full.{entry}": inputs}, actor.mllm.processor)
    alone = [actor.states(numpy(member), entry, "full") for entry in range(3)]
    bad = {"input_ids.3": torch.tensor([10**6])}
    asked_together = FeatureActor(MODEL, 0, 1, packed)
    assert asked_together.mllm.is_packed is packed
    with ThreadPoolExecutor(8) as threads:
        order = (2, 0, 1, 2, 3, 1, 0, 2)
        # The first occupies the actor, so that the others meet in its queue.
        asked = [threads.submit(asked_together.states, numpy(member | bad), entry, "full") for entry in order]
    for answer, entry in zip(asked, order, strict=True):
        if entry == 3:
            assert isinstance(answer.exception(), IndexError)
        else:
            assert torch.allclose(*(bfloat16(bits) for bits in (answer.result(), alone[entry])), rtol=0.02, atol=0.02)
    assert max(asked_together.batch_sizes) > 1


def numpy(member):
    return {name: values.numpy() for name, values in member.items()}


def bfloat16(bits):
    return torch.from_numpy(bits).view(torch.bfloat16).float()


def test_an_actor_without_gpus_stays_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    threads = torch.get_num_threads()
    assert FeatureActor(MODEL, 0, 1).mllm.device.type == "cpu"
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"features.gpus=1: no CUDA device can be used here; set features.gpus=0"):
        FeatureActor(MODEL, 1, 1)


@pytest.mark.slow
def test_a_pool_survives_its_actors_and_refuses_another_mllm(ray_cluster, actor):
    _, streamed = samples(actor.mllm, "video_edit")
    member = streamed.tensors["mllm"]
    manifest = SimpleNamespace(features={"mode": "text"}, encoders={"mllm": actor.mllm.fingerprint})
    dataset = SimpleNamespace(manifest=manifest, storage=SimpleNamespace(url="here"))
    with feature_pool(FeaturePoolConfig(), MODEL, [dataset]) as pool:
        first = pool.states(member, 0, "full")
        assert torch.equal(first.bfloat16().float(), first)
        assert torch.equal(first, Here(actor).states(member, 0, "full"))
        ray.kill(pool.actors[0], no_restart=False)
        assert torch.equal(ray.cloudpickle.loads(ray.cloudpickle.dumps(pool)).states(member, 0, "full"), first)
    manifest.encoders = {"mllm": "another"}
    refused = pytest.raises(UserError, match="here: prepared for MLLM another, the pool has")
    with refused, feature_pool(FeaturePoolConfig(), MODEL, [dataset]):
        pass
    stored = SimpleNamespace(manifest=SimpleNamespace(features={"mode": "stored"}))
    with feature_pool(FeaturePoolConfig(), MODEL, [stored]) as pool:
        assert pool is None
