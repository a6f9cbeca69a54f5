"""What distillation and preference tuning will need: the plan of a training run, with roles, turns and rounds.

Everything is composed of :func:`loomvideo.jobs.training.plan.plan`'s estimate for the same pack, and of what the job's
preset says. A forward pass costs a third of forward and backward; every other role adds its weights (2 bytes a
parameter, over the ranks, and under hpZ over a node's once more), a trained one its gradients, masters and moments too,
unless it shares the model's frozen weights. Nothing here is measured but the seconds of scoring, on a CPU.
"""

from dataclasses import dataclass

from loomvideo.jobs.training.config import DistillJobConfig, PreferJobConfig
from loomvideo.jobs.training.plan import BYTES_BF16, BYTES_FP32, StepEstimate
from loomvideo.jobs.training.planned_job import PlannedJob


@dataclass(frozen=True)
class MethodEstimate:
    """Estimates for one rank; bytes, seconds. ``rows`` are figures for people, by name.

    Attributes:
        memory_bytes: All of a rank.
        total_s: The whole run.
        gpu_hours: The hours of all GPUs together.
        rows: Name and text of each line.
    """

    memory_bytes: float
    total_s: float
    gpu_hours: float
    rows: dict[str, str]


def adapter_parameters(inner: int, ffn: int, layers: int, rank: int) -> int:
    """Parameters of adapters on the linear layers of the blocks: two attentions of four, and the FFN's two."""
    return layers * rank * (8 * 2 * inner + 2 * (inner + ffn))


def role_bytes(parameters: int, trained: int, base: StepEstimate, average: bool) -> float:
    """Of a rank, for a role: working weights it does not share, hpZ's second copy, and the state of what it trains."""
    weights = parameters * BYTES_BF16 * (1 / base.num_ranks + base.second_copy_share)
    return weights + trained * (4 + average) * BYTES_FP32 / base.num_ranks


def pass_seconds(base: StepEstimate, branches: int = 1) -> float:
    """A pass over a step's packs without a graph; the weights are gathered once for all branches."""
    compute_s = base.compute_s * base.train_flops / base.executed_flops / 3
    # Of a step's three collectives a pass has one.
    return max(branches * compute_s, base.communication_s / 3)


def plan_distill(base: StepEstimate, job: PlannedJob, adapters: int = 0) -> MethodEstimate:
    """Distribution matching.

    Args:
        base: What the pack takes when it is trained by flow matching.
        job: The distillation.
        adapters: Parameters of one role's adapters; 0 trains all weights.
    """
    if not isinstance(job.config, DistillJobConfig):
        raise TypeError(f"{job.name}: no distillation")
    distill, steps, branches = job.config.distill, job.config.training.steps, job.branches
    n, average = base.num_parameters, job.config.training.ema.decay > 0
    forward_s, training_s = pass_seconds(base), base.step_s
    # Backward simulation runs, on average, half of the earlier steps.
    simulated_s = (len(distill.schedule) - 1) / 2 * forward_s
    student_s = simulated_s + training_s + pass_seconds(base, branches) + forward_s
    critic_s = simulated_s + forward_s + training_s
    after = max(0, steps - distill.critic_warmup)
    students = after // (distill.critic_steps + 1)
    total_s = students * student_s + (steps - students) * critic_s
    if adapters:
        weights = role_bytes(n + 2 * adapters, adapters, base, average) + role_bytes(0, adapters, base, False)
    else:
        weights = role_bytes(n, n, base, average) + role_bytes(n, 0, base, False) + role_bytes(n, n, base, False)
    # The teacher reads its branches' MLLM states; without a graph its activations are those of one layer.
    states = base.states_bytes * (1 + branches)
    memory = weights + 2 * base.layer_bytes + base.activation_bytes + states + base.buffer_bytes
    rows = {
        "weights, gradients, optimisers of all roles": f"{weights / 2**30:.1f} GiB",
        "memory of a GPU": f"{memory / 2**30:.1f} GiB",
        "turn of the student": f"{student_s:.2f} s",
        "turn of the critic": f"{critic_s:.2f} s",
        f"{students:,} turns of the student, {steps - students:,} of the critic": f"{total_s / 3600:.1f} h",
    }
    return MethodEstimate(memory, total_s, total_s / 3600 * base.num_ranks, rows)


def plan_prefer(
    base: StepEstimate, job: PlannedJob, generators: int, decode_s: float, scoring_s: float, adapters: int = 0
) -> MethodEstimate:
    """Rounds of generating, scoring and training.

    An actor makes whole prompts, one thing after another: it denoises all results, decodes the stored source and target
    and then the results, and scores those, as many at once as it has CPUs, while its GPU waits (``RolloutMaker.make``).
    A result is a sample of the pack, whose sampler runs the branches that the guidance scales of the preset leave.

    Args:
        base: What the pack takes when it is trained by flow matching.
        job: The preference tuning.
        generators: GPUs that generate; training takes the same ones afterwards.
        decode_s: Seconds of the codec for a result.
        scoring_s: Seconds of a core for the metrics of a result.
        adapters: Parameters of the adapters; 0 trains all weights.
    """
    if not isinstance(job.config, PreferJobConfig):
        raise TypeError(f"{job.name}: no preference tuning")
    nft, n, average = job.config.prefer.nft, base.num_parameters, job.config.training.ema.decay > 0
    step_s = base.step_s + 2 * pass_seconds(base)
    packs = max(1, -(-job.config.training.pack.per_step // base.num_ranks))
    # Of one sample on a GPU that holds the whole model.
    forward_s = base.compute_s * base.train_flops / base.executed_flops / 3 / len(job.lengths) / packs
    denoising_s = job.passes * forward_s
    prompt_s = nft.repeats * (denoising_s + decode_s) + 2 * decode_s + -(-nft.repeats // nft.cpus) * scoring_s
    generating_s = -(-nft.prompts // generators) * prompt_s
    training_s = nft.steps_per_round * step_s
    total_s = nft.rounds * (generating_s + training_s)
    # The old policy is whole weights; the reference is shared under adapters.
    if adapters:
        weights = role_bytes(n + adapters, adapters, base, average) + role_bytes(n, 0, base, False)
    else:
        weights = role_bytes(n, n, base, average) + 2 * role_bytes(n, 0, base, False)
    memory = weights + 2 * base.layer_bytes + base.activation_bytes + base.states_bytes + base.buffer_bytes
    results = nft.prompts * nft.repeats
    rows = {
        "weights, gradients, optimiser of all roles": f"{weights / 2**30:.1f} GiB",
        "memory of a training GPU": f"{memory / 2**30:.1f} GiB",
        "weights of a generating GPU, without the codec": f"{n * BYTES_BF16 / 2**30:.1f} GiB",
        f"a result: {job.passes:g} passes": f"{denoising_s:.1f} s",
        "a result: decoding, scoring on a core": f"{decode_s:.1f} s, {scoring_s:.1f} s",
        f"a prompt: {nft.repeats} results, {nft.cpus} scored at once": f"{prompt_s / 60:.1f} min",
        f"generating {results:,} results of {nft.prompts} prompts": f"{generating_s / 60:.1f} min on {generators} GPUs",
        "optimiser step": f"{step_s:.2f} s",
        f"training of a round, {nft.steps_per_round} steps": f"{training_s / 60:.1f} min",
        f"{nft.rounds} rounds": f"{total_s / 3600:.1f} h",
    }
    return MethodEstimate(memory, total_s, total_s / 3600 * max(base.num_ranks, generators), rows)
