"""What the plan prints for people who pay for the run."""

import pytest

from loomvideo.jobs.training.plan_commands import PlanConfig, print_plan
from loomvideo.platform.errors import UserError


def rows(capsys, **changes):
    print_plan(PlanConfig(ranks=[8], steps=1000, **changes))
    lines = capsys.readouterr().out.splitlines()
    return {line[:56].strip(): line[56:].strip() for line in lines}


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


def test_a_measured_network_counts(capsys):
    print_plan(PlanConfig(ranks=[64]))
    usual = capsys.readouterr().out
    print_plan(PlanConfig(ranks=[64], network_gb_per_s=1.0))
    assert capsys.readouterr().out != usual


def test_carbon_without_power_is_named():
    with pytest.raises(UserError, match="needs the power of a GPU; set watts"):
        print_plan(PlanConfig(carbon_g_per_kwh=400.0))
