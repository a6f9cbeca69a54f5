import collections
import json

import numpy as np
import pyarrow as pa
import pytest

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import MixtureConfig, PackConfig
from loomvideo.platform.training.order import SampleOrder, SampleSizes, build_sources
from loomvideo.platform.training.packing import PackPlanner, fill_and_imbalance, packs_of_rank


def index(rows):
    """Rows (key, task, dataset, split, tokens) as an index table."""
    names = ("key", "task", "dataset", "split", "dit_tokens")
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def order(rows, mixture=None, seed=0, sizes=None, variant=None):
    table = index(rows)
    sizes = sizes or SampleSizes.plain(table.column("dit_tokens").to_numpy())
    return SampleOrder(build_sources([table], [sizes], "train", mixture or MixtureConfig()), seed, variant)


def quadratic(rows):
    """Sizes of rows whose attention costs as much as all else at 24,000 tokens."""
    tokens = np.array([row[-1] for row in rows])[:, None]
    return SampleSizes(tokens, np.zeros_like(tokens), tokens + tokens**2 / 24_000)


def mixed_rows():
    lengths = {
        "t2i": [256, 704],
        "t2v": [2304, 5184, 9750],
        "video_edit": [2304, 9750, 12090],
        "image_edit": [704, 768],
    }
    rng = np.random.default_rng(0)
    return [
        (f"{task}-{number}", task, f"set{number % 2}", "train", int(rng.choice(lengths[task])))
        for task in lengths
        for number in range(200)
    ]


def test_order_follows_the_mixture_and_visits_each_sample_once_an_epoch():
    rows = [(f"a{n}", "t2v", "x", "train", 10) for n in range(30)]
    rows += [(f"b{n}", "t2i", "x", "train", 10) for n in range(10)] + [("c", "t2i", "y", "train", 10)]
    rows += [("held-out", "t2i", "x", "heldout", 10)]
    stream = order(rows, MixtureConfig(tasks={"t2v": 3.0}, datasets={"x": 4.0}))
    draws = [stream.next() for _ in range(400)]
    count = collections.Counter(stream.sources[draw.source].name for draw in draws)
    assert count["t2v/x"] == pytest.approx(300, abs=3)
    assert count["t2i/x"] == pytest.approx(80, abs=3)
    assert count["t2i/y"] == pytest.approx(20, abs=3)
    visits = collections.Counter((draw.key, draw.visit) for draw in draws)
    assert max(visits.values()) == 1
    of_a = collections.Counter(draw.key for draw in draws if draw.key.startswith("a"))
    assert max(of_a.values()) - min(of_a.values()) <= 1
    assert "held-out" not in {draw.key for draw in draws}


def test_by_size_draws_every_sample_alike():
    rows = [(f"a{n}", "t2v", "x", "train", 10) for n in range(30)]
    rows += [(f"b{n}", "t2i", "x", "train", 10) for n in range(8)] + [("c", "t2i", "y", "train", 10)] * 2
    stream = order(rows, MixtureConfig(by_size=True))
    count = collections.Counter(stream.sources[stream.next().source].name for _ in range(400))
    assert count["t2v/x"] == pytest.approx(300, abs=3)
    assert count["t2i/x"] == pytest.approx(80, abs=3)
    assert count["t2i/y"] == pytest.approx(20, abs=3)


def test_unknown_or_empty_mixtures_are_user_errors():
    rows = [("a", "t2v", "x", "train", 10)]
    with pytest.raises(UserError, match=r"training.mixture.tasks.t2x: the shards have t2v"):
        order(rows, MixtureConfig(tasks={"t2x": 1.0}))
    with pytest.raises(UserError, match="no sample to train on"):
        order(rows, MixtureConfig(tasks={"t2v": 0.0}))


@pytest.mark.parametrize("num_packs", [2, 8, 64])
def test_packs_are_full_balanced_and_drop_nothing(num_packs):
    config = PackConfig(tokens=42000)
    stream = order(mixed_rows(), sizes=quadratic(mixed_rows()))
    planner = PackPlanner(stream, config, num_packs)
    fills, imbalances, seen = [], [], []
    for _ in range(12):
        packs = planner.next_step()
        assert len(packs) == num_packs
        fill, imbalance = fill_and_imbalance(packs, config)
        fills.append(fill)
        imbalances.append(imbalance)
        seen += [(draw.source, draw.number) for pack in packs for draw in pack]
    assert np.mean(fills) >= 0.95
    assert np.mean(imbalances) < 0.03
    held = [tuple(item) for item in planner.state()["held"]]
    drawn = [
        (source.name, n) for source, count in zip(stream.sources, stream.counts, strict=True) for n in range(count)
    ]
    assert sorted([(stream.sources[source].name, n) for source, n in seen] + held) == sorted(drawn)


def test_no_sample_waits_long():
    planner = PackPlanner(order(mixed_rows(), sizes=quadratic(mixed_rows())), PackConfig(tokens=24000), 2)
    drawn_at, waited = {}, []
    for step in range(60):
        packs = planner.next_step()
        for name, number in planner.state()["held"]:
            drawn_at.setdefault((name, number), step)
        for pack in packs:
            for draw in pack:
                key = (planner.order.sources[draw.source].name, draw.number)
                waited.append(step - drawn_at.get(key, step))
    assert max(waited) <= 12


def test_state_is_small_json_and_continues_exactly():
    whole = PackPlanner(order(mixed_rows()), PackConfig(tokens=20000), 4)
    parts = PackPlanner(order(mixed_rows()), PackConfig(tokens=20000), 4)
    for _ in range(5):
        whole.next_step()
        parts.next_step()
    state = json.dumps(parts.state())
    assert len(state) < 5000
    resumed = PackPlanner(order(mixed_rows()), PackConfig(tokens=20000), 4)
    resumed.load_state(json.loads(state))
    for _ in range(5):
        assert whole.next_step() == resumed.next_step()


def test_oversize_samples_travel_alone_and_the_hard_limit_is_an_error():
    rows = [("long", "t2v", "x", "train", 5000), *((f"s{n}", "t2i", "x", "train", 300) for n in range(20))]
    planner = PackPlanner(order(rows), PackConfig(tokens=1000), 2)
    packs = [pack for _ in range(10) for pack in planner.next_step()]
    assert any(pack[0].key == "long" for pack in packs)
    assert all(len(pack) == 1 for pack in packs if pack[0].key == "long")
    with pytest.raises(UserError, match="max_tokens=4000: a sample has 5000 tokens"):
        PackPlanner(order(rows), PackConfig(tokens=1000, max_tokens=4000), 2)


def test_context_tokens_have_a_limit_of_their_own():
    rows = [(f"s{n}", "t2i", "x", "train", 100) for n in range(40)]
    context = np.array([[300 if n % 2 else 20] for n in range(40)])
    sizes = SampleSizes(np.full((40, 1), 100), context, np.full((40, 1), 100.0))
    planner = PackPlanner(order(rows, sizes=sizes), PackConfig(tokens=1000, max_context_tokens=1000), 4)
    packs = [pack for _ in range(8) for pack in planner.next_step()]
    assert max(sum(draw.context_tokens for draw in pack) for pack in packs) <= 1000
    assert sum(len(pack) for pack in packs) > 0.6 * 10 * len(packs)
    with pytest.raises(UserError, match="max_context_tokens=100: a sample has 300 context tokens"):
        PackPlanner(order(rows, sizes=sizes), PackConfig(tokens=1000, max_context_tokens=100), 4)


def test_a_visit_costs_what_its_variant_costs():
    rows = [(f"s{n}", "t2i", "x", "train", 100) for n in range(6)]
    tokens = np.tile([100, 60], (6, 1))
    sizes = SampleSizes(tokens, tokens // 2, tokens * 2.0)
    stream = order(rows, seed=3, sizes=sizes, variant=lambda random: random.visit % 2)
    for _ in range(24):
        draw = stream.next()
        whole = draw.visit % 2 == 0
        assert (draw.tokens, draw.context_tokens, draw.cost) == ((100, 50, 200.0) if whole else (60, 30, 120.0))


def test_excluded_samples_are_passed_over():
    rows = [(f"s{n}", "t2i", "x", "train", 100) for n in range(5)]
    planner = PackPlanner(order(rows), PackConfig(tokens=300), 1)
    keys = {draw.key for _ in range(10) for draw in planner.next_step({"s1"})[0]}
    assert keys == {"s0", "s2", "s3", "s4"}
    with pytest.raises(UserError, match="every sample is quarantined"):
        planner.next_step({f"s{n}" for n in range(5)})


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_pack_counts_once_on_any_world_size(world_size):
    ranks = [packs_of_rank(4, rank, world_size) for rank in range(world_size)]
    assert sorted(place for rank in ranks for place, counts in rank if counts) == [0, 1, 2, 3]
    assert len({len(rank) for rank in ranks}) == 1
