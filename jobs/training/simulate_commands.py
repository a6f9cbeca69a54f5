"""``loomvideo data simulate`` and ``loomvideo audit-resume``: look at a training run before it starts and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from loomvideo.jobs.command import config_command
from loomvideo.jobs.weights.references import CHECKPOINT_HELP, RunReference, find_run
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.platform.config import option
from loomvideo.platform.console import console, table
from loomvideo.platform.errors import UserError
from loomvideo.platform.training.config import MixtureConfig, PackConfig


@dataclass
class SimulateConfig:
    """Which data, and for how many ranks."""

    shards: list[str] = option([], "dataset folders or URLs made by `loomvideo data prepare`")
    ranks: list[int] = option([2, 8, 64, 512], "packs a step to simulate")
    steps: int = option(50, "steps to simulate for each")
    split: str = option("train", "index split")
    recompute: str = option("selective", "training.activation_checkpointing: none, selective or full")
    prefetch_steps: int = option(3, "training.prefetch_steps")
    objective: ObjectiveConfig = option(ObjectiveConfig, "")
    pack: PackConfig = option(PackConfig, "")
    mixture: MixtureConfig = option(MixtureConfig, "")


def register(app: typer.Typer, data_app: typer.Typer) -> None:
    """Add the commands."""

    @config_command(data_app, "simulate", "data-simulate", lambda: SimulateConfig)
    def simulate(config: SimulateConfig) -> None:
        """Print fill, imbalance between ranks, memory and samples seen of every dataset, without reading a shard."""
        print_simulation(config)

    @app.command("audit-resume")
    def audit(
        reference: Annotated[
            str,
            typer.Argument(metavar="RUN[@STEP]", help=f"{CHECKPOINT_HELP}; default: the newest to check"),
        ],
        steps: Annotated[int, typer.Option(help="steps to repeat")] = 5,
        workers: Annotated[int, typer.Option(help="number of workers; 0 takes the run's")] = 0,
        runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    ) -> None:
        """Repeat steps of a run from one of its checkpoints and compare losses, gradient norms and samples."""
        print_audit(find_run(reference, runs), steps, workers)


def print_simulation(config: SimulateConfig) -> None:
    """Simulate and print.

    Raises:
        UserError: if no shards are named.
    """
    from loomvideo.jobs.training.plan import packs_in_flight
    from loomvideo.model.memory import activation_bytes, states_bytes
    from loomvideo.pipelines.training.recipe import LoomVideoRecipe
    from loomvideo.platform.shards.reader import ShardDataset
    from loomvideo.platform.training.order import build_sources
    from loomvideo.platform.training.simulate import simulate, suggest_budget

    if not config.shards:
        raise UserError("shards: name at least one folder made by `loomvideo data prepare`")
    datasets = [ShardDataset.open(url) for url in config.shards]
    models = {dataset.manifest.config["model"] for dataset in datasets}
    if len(models) > 1:
        raise UserError(f"shards: encoded for several models ({', '.join(sorted(models))}); name those of one")
    recipe = LoomVideoRecipe(models.pop(), config.objective, [dataset.shared()["null"] for dataset in datasets])
    indexes = [dataset.index for dataset in datasets]
    sizes = [recipe.sample_sizes(number, index) for number, index in enumerate(indexes)]
    sources = build_sources(indexes, sizes, config.split, config.mixture)
    in_flight = packs_in_flight(config.prefetch_steps)
    packs = table(
        "ranks", "fill", "imbalance", "worst", "tokens/step", "samples/step", "held", "MLLM tokens, mean and most",
        "activations and states", "host memory a rank",
    )  # fmt: skip
    for ranks in config.ranks:
        result = simulate(sources, config.pack, ranks, config.steps, variant=recipe.visit_variant)
        tokens, context = result.largest_pack
        gpu_bytes = activation_bytes(recipe.config, tokens, context, config.recompute)
        gpu_bytes += states_bytes(recipe.config, context)
        packs.add_row(
            str(ranks),
            f"{result.fill:.1%}",
            f"{result.imbalance:.2%}",
            f"{result.worst_imbalance:.2%}",
            f"{result.tokens_per_step:,.0f}",
            f"{result.samples_per_step:,.1f}",
            str(result.num_held),
            f"{result.mean_context_tokens:,.0f}, {result.most_context_tokens:,}",
            f"{gpu_bytes / 2**30:.1f} GiB",
            f"{in_flight * states_bytes(recipe.config, result.most_context_tokens) / 2**30:.1f} GiB",
        )
    out = console()
    out.print(packs)
    out.print(
        "imbalance: counted operations of the most expensive pack over the mean; memory: of the largest pack, as "
        f"`loomvideo plan` estimates it, with {in_flight} packs in flight on the host"
    )
    seen = table(f"source (after {config.steps} steps)", "samples", "drawn", "epochs")
    for source in sources:
        drawn = result.draws.get(source.name, 0)
        seen.add_row(source.name, str(len(source.key)), str(drawn), f"{drawn / len(source.key):.2f}")
    out.print(seen)
    if result.fill < 0.95:
        better = suggest_budget(sources, config.pack, min(config.ranks))
        advice = f"try pack.tokens={better}" if better else "the lengths of these samples do not add up to any budget"
        out.print(f"fill is under 95 %: {advice}")


def print_audit(reference: RunReference, steps: int, workers: int) -> None:
    """Audit and print.

    Raises:
        UserError: if the run cannot be repeated, or a repeated step differs.
    """
    from loomvideo.jobs.training.audit import repeat_steps
    from loomvideo.jobs.weights.export import run_config

    config = run_config(reference.run)
    same_world = workers in (0, config.training.workers.num)
    config.training.workers.num = workers or config.training.workers.num
    rows = repeat_steps(reference, config, steps)
    repeated = table("step", "samples", "loss", "repeated", "gradient norm", "repeated", "")
    for row in rows:
        verdict = "equal" if row.same_bits else "close" if row.is_close else "DIFFERS"
        repeated.add_row(
            str(row.step),
            "same" if row.same_keys else "OTHER",
            f"{row.loss:.8f}",
            f"{row.repeated_loss:.8f}",
            f"{row.grad_norm:.8f}",
            f"{row.repeated_grad_norm:.8f}",
            verdict,
        )
    console().print(repeated)
    # Sums on GPUs are in no fixed order unless the run asked for one.
    exact = same_world and (not config.training.workers.gpus or config.training.deterministic)
    passed = all(row.same_keys and (row.same_bits if exact else row.is_close) for row in rows)
    if not passed:
        raise UserError(f"{reference.run.path}: the repetition differs from what the run recorded")
    print("resume audit passed: " + ("equal bit by bit" if exact else "same samples, losses within tolerance"))
    if same_world and not exact:
        print("a run with training.deterministic=true would be equal bit by bit on GPUs too")
