"""``loomvideo evaluate``, ``compare``, ``gate``, ``arena``, ``agreement``: measure checkpoints and decide."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loomvideo.jobs.command import config_command
from loomvideo.jobs.evaluation.config import EvaluateConfig
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError

app = typer.Typer()

RUN_HELP = "an evaluation run: evaluate/NAME, NAME or its folder"


class _EvaluateGroup(TyperGroup):
    """``evaluate KEY=VALUE…`` is ``evaluate run KEY=VALUE…``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


evaluate_app = typer.Typer(cls=_EvaluateGroup)
app.add_typer(evaluate_app, name="evaluate", help="Run benchmarks on a checkpoint; `evaluate prune` clears the store.")


@config_command(evaluate_app, "run", "evaluate", lambda: EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Run benchmarks on a checkpoint: generate, measure, judge, and report to MLflow; a rerun resumes.

    `run` may be left out. `loomvideo evaluate prune` removes what no evaluation refers to any more.
    """
    from loomvideo.jobs.evaluation.job import run

    run(config)


@evaluate_app.command("prune")
def prune(
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store; default: evaluation-store in the runs folder")] = "",
    days: Annotated[float, typer.Option(help="keep what is younger: a run under way has no record yet")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
) -> None:
    """Print what the store of results takes, and remove what no finished evaluation refers to.

    Answers of judges stay, since they were paid for.
    """
    from loomvideo.pipelines.evaluation.prune import prune

    folder = Path(store) if store else runs / "evaluation-store"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such store of results; name it with --store, or its runs with --runs")
    usages = prune(folder, runs, days, not dry_run)
    done = "could be removed" if dry_run else "removed"
    usage = table("kind", "entries", "MB", done, "MB", title=str(folder), figures=True)
    for u in usages:
        usage.add_row(u.kind, str(u.entries), f"{u.size_bytes / 1e6:.1f}", str(u.unused), f"{u.unused_bytes / 1e6:.1f}")
    console().print(usage)
    total, freed = (sum(getattr(u, name) for u in usages) / 1e6 for name in ("size_bytes", "unused_bytes"))
    print(f"{total - freed:.1f} of {total:.1f} MB are in use")


@app.command("compare")
def compare(
    run_a: Annotated[str, typer.Argument(help=f"the baseline: {RUN_HELP}")],
    run_b: Annotated[str, typer.Argument(help=f"the candidate: {RUN_HELP}")],
    metrics: Annotated[str, typer.Option(help="metrics to test, comma-separated; fewer give more power")] = "",
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    everything: Annotated[bool, typer.Option("--all", help="also list metrics without a difference")] = False,
    tracking_uri: Annotated[str, typer.Option(help="MLflow; default as in evaluate")] = "",
) -> None:
    """Paired tests of two evaluations on the samples both have, corrected for testing many metrics."""
    from loomvideo.jobs.evaluation.compare import run_compare

    run_compare(run_a, run_b, [m for m in metrics.split(",") if m], runs, everything, tracking_uri)


@app.command("gate")
def gate(
    baseline: Annotated[str, typer.Option(help=f"what the candidate must hold against: {RUN_HELP}")],
    candidate: Annotated[str, typer.Option(help=f"the candidate: {RUN_HELP}")],
    metric: Annotated[str, typer.Option(help="the one metric that decides: SUITE/METRIC, such as openve/judge_worst")],
    margin: Annotated[float | None, typer.Option(help="loss that counts as none; default: the metric's")] = None,
    min_gain: Annotated[float | None, typer.Option(help="gain to be shown, instead of a loss within margin")] = None,
    max_regress: Annotated[float, typer.Option(help="loss of a category that vetoes when it is shown")] = float("inf"),
    p: Annotated[float, typer.Option(help="one-sided level of the bound that must hold")] = 0.05,
    idle: Annotated[bool, typer.Option("--idle", help="let a metric decide that improves by doing nothing")] = False,
    registered_model: Annotated[
        str, typer.Option(help="model in MLflow's registry to move the alias of; empty moves none")
    ] = "",
    alias: Annotated[str, typer.Option(help="alias to move on success")] = "champion",
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    tracking_uri: Annotated[str, typer.Option(help="MLflow; default as in evaluate")] = "",
) -> None:
    """Exit 0 and move a registry alias when the candidate is shown to hold against the baseline, else exit 1.

    It holds when the lower bound of its gain lies above a loss of the margin: too few samples are no pass.
    """
    from loomvideo.jobs.evaluation.gate import gate_rule, run_gate

    rule = gate_rule(metric, margin=margin, min_gain=min_gain, max_regress=max_regress, p=p, idle=idle)
    passed = run_gate(baseline, candidate, rule, registered_model, alias, runs, tracking_uri)
    raise typer.Exit(0 if passed else 1)


@app.command("arena")
def arena(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help=f"two or more of: {RUN_HELP}")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of evaluate, as judge.kind=…")] = None,
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
) -> None:
    """Judge runs against each other pair by pair, in both orders: Bradley-Terry ratings with intervals."""
    from loomvideo.jobs.evaluation.compare import run_arena

    run_arena(names, [*(overrides or []), f"runs={runs}"], runs)


@app.command("agreement")
def agreement(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    labels: Annotated[
        Path | None,
        typer.Option(help="CSV with suite,key,score; written empty when it does not exist. Default: reviews in MLflow"),
    ] = None,
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    items: Annotated[int, typer.Option(help="samples to ask people about, when the CSV is made")] = 40,
    tracking_uri: Annotated[str, typer.Option(help="MLflow; default as in evaluate")] = "",
) -> None:
    """Compare the judge with people, who add an assessment `score` (1 to 5) to the run's traces in MLflow.

    Or who fill in a sheet: with --labels it is made first, then read.
    """
    from loomvideo.jobs.evaluation.compare import run_agreement

    run_agreement(run, labels, runs, items, tracking_uri)
