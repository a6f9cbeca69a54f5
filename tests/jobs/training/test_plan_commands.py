"""What the plan prints for people who pay for the run."""

import re

import pytest

from loomvideo.jobs.training.plan_commands import PlanConfig, print_plan
from loomvideo.platform.errors import UserError


def rows(capsys, **changes):
    steps = {} if "method" in changes else {"steps": 1000}
    print_plan(PlanConfig(**{"ranks": [8]} | steps | changes))
    lines = capsys.readouterr().out.splitlines()
    cells = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)
    return {line[0]: line[1] for line in cells if len(line) == 2}


def test_price_energy_and_carbon_follow_the_gpu_hours(capsys):
    free = rows(capsys)
    assert "cost" not in free
    assert "carbon" not in free
    paid = rows(capsys, hourly_price=2.5, watts=1000.0, carbon_g_per_kwh=400.0)
    hours = float(paid["GPU hours"])
    assert paid["GPU hours"] == free["GPU hours"]
    assert float(paid["cost"]) == pytest.approx(2.5 * hours, abs=2)
    assert float(paid["energy"].split()[0]) == pytest.approx(hours, abs=1)
    assert float(paid["carbon"].split()[0]) == pytest.approx(0.4 * hours, abs=1)


def test_every_stage_has_its_own_money_and_carbon(capsys):
    prices = {"hourly_price": 2.5, "watts": 1000.0, "carbon_g_per_kwh": 400.0}
    paid = rows(capsys, stages={"images": 20000, "videos": 10000}, **prices)
    number = {name: float(text.split()[0].replace(",", "")) for name, text in paid.items() if ": " in name and text}
    assert number["images: cost"] == pytest.approx(2 * number["videos: cost"], rel=0.01)
    assert number["all: carbon"] == pytest.approx(number["images: carbon"] + number["videos: carbon"], abs=2)
    assert number["all: 30,000 steps"] == pytest.approx(3 * number["videos: 10,000 steps"], rel=0.01)
    with pytest.raises(UserError, match="stages: only method=train has any"):
        print_plan(PlanConfig(method="distill", stages={"a": 1}))


@pytest.mark.parametrize("method", ["distill", "prefer"])
def test_distilling_and_preferring_cost_too(capsys, method):
    paid = rows(capsys, method=method, hourly_price=2.5, watts=1000.0, carbon_g_per_kwh=400.0)
    hours = float(paid["GPU hours"].replace(",", ""))
    assert float(paid["cost"].replace(",", "")) == pytest.approx(2.5 * hours, abs=2)
    assert float(paid["carbon"].split()[0].replace(",", "")) == pytest.approx(0.4 * hours, abs=1)


def test_the_gpus_that_train_generate_before(capsys):
    shared = rows(capsys, method="prefer", ranks=[8, 64])
    half = rows(capsys, method="prefer", ranks=[64], generators=32)
    more = rows(capsys, method="prefer", ranks=[64], generators=128)
    generating = "generating 512 results of 64 prompts"
    minutes = {name: float(plan[generating].split()[0]) for name, plan in (("half", half), ("more", more))}
    # An actor makes whole prompts: with 64 of them half of 128 GPUs have none.
    assert minutes["half"] == pytest.approx(2 * minutes["more"], rel=0.02)
    # Of 64 and of the other 64, which only wait.
    assert float(more["GPU hours"]) == pytest.approx(128 * float(more["8 rounds"].split()[0]), rel=0.06)
    assert float(half["GPU hours"]) == pytest.approx(64 * float(half["8 rounds"].split()[0]), rel=0.06)
    assert "on 64 GPUs" in shared[generating]


def test_a_measured_network_counts(capsys):
    print_plan(PlanConfig(ranks=[64]))
    usual = capsys.readouterr().out
    print_plan(PlanConfig(ranks=[64], network_gb_per_s=1.0))
    assert capsys.readouterr().out != usual


def test_carbon_without_power_is_named():
    with pytest.raises(UserError, match="needs the power of a GPU; set watts"):
        print_plan(PlanConfig(carbon_g_per_kwh=400.0))
