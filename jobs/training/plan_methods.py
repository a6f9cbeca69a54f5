"""What distillation and preference tuning will need: the plan of a training run, with roles, turns and rounds.

Everything is composed of :func:`loomvideo.jobs.training.plan.plan`'s estimate for the same pack. A forward pass costs a
third of forward and backward; every other role adds its weights (2 bytes a parameter, over the ranks), a trained one
its gradients, masters and moments too, unless it shares the model's frozen weights. Nothing here is measured.
"""

from dataclasses import dataclass

from loomvideo.jobs.training.plan import BYTES_BF16, BYTES_FP32, StepEstimate


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


def role_bytes(parameters: int, trained: int, num_ranks: int, average: bool) -> float:
    """Of a rank, for a role: working weights it does not share, and the state of what it trains."""
    state = trained * (4 + average) * BYTES_FP32
    return (parameters * BYTES_BF16 + state) / num_ranks


def plan_distill(
    base: StepEstimate,
    steps: int,
    critic_steps: int,
    critic_warmup: int,
    student_steps: int,
    branches: int,
    adapters: int = 0,
) -> MethodEstimate:
    """Distribution matching.

    Args:
        base: What the pack takes when it is trained by flow matching.
        steps: Turns of student and critic together.
        critic_steps: Turns of the critic for one of the student.
        critic_warmup: Turns of the critic before.
        student_steps: Steps of the student's schedule.
        branches: Guidance branches of the teacher.
        adapters: Parameters of one role's adapters; 0 trains all weights.
    """
    n, ranks = base.num_parameters, base.num_ranks
    forward_s = base.step_s * base.train_flops / base.executed_flops / 3
    training_s = base.step_s
    # Backward simulation runs, on average, half of the earlier steps.
    simulated_s = (student_steps - 1) / 2 * forward_s
    student_s = simulated_s + training_s + (branches + 1) * forward_s
    critic_s = simulated_s + forward_s + training_s
    after = max(0, steps - critic_warmup)
    students = after // (critic_steps + 1)
    total_s = students * student_s + (steps - students) * critic_s
    if adapters:
        weights = role_bytes(n + 2 * adapters, adapters, ranks, True) + role_bytes(0, adapters, ranks, False)
    else:
        weights = role_bytes(n, n, ranks, True) + role_bytes(n, 0, ranks, False) + role_bytes(n, n, ranks, False)
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
    return MethodEstimate(memory, total_s, total_s / 3600 * ranks, rows)


def plan_prefer(
    base: StepEstimate,
    samples_per_pack: int,
    rounds: int,
    steps_per_round: int,
    results: int,
    sampler_steps: int,
    branches: int,
    generators: int,
    adapters: int = 0,
) -> MethodEstimate:
    """Rounds of generating and training.

    Args:
        base: What the pack takes when it is trained by flow matching.
        samples_per_pack: Samples of the pack.
        rounds, steps_per_round: How many the run has.
        results: Results of a round, all prompts together.
        sampler_steps: Denoising steps of each.
        branches: Guidance branches of the sampler.
        generators: GPUs that generate; training takes the same ones afterwards.
        adapters: Parameters of the adapters; 0 trains all weights.
    """
    n, ranks = base.num_parameters, base.num_ranks
    forward_s = base.step_s * base.train_flops / base.executed_flops / 3
    step_s = base.step_s + 2 * forward_s
    generating_s = results * sampler_steps * branches * forward_s / samples_per_pack / generators
    total_s = rounds * (generating_s + steps_per_round * step_s)
    # The old policy is whole weights; the reference is shared under adapters.
    if adapters:
        weights = role_bytes(n + adapters, adapters, ranks, True) + role_bytes(n, 0, ranks, False)
    else:
        weights = role_bytes(n, n, ranks, True) + 2 * role_bytes(n, 0, ranks, False)
    memory = weights + 2 * base.layer_bytes + base.activation_bytes + base.states_bytes + base.buffer_bytes
    rows = {
        "weights, gradients, optimiser of all roles": f"{weights / 2**30:.1f} GiB",
        "memory of a training GPU": f"{memory / 2**30:.1f} GiB",
        "weights of a generating GPU, without the codec": f"{n * BYTES_BF16 / 2**30:.1f} GiB",
        "optimiser step": f"{step_s:.2f} s",
        f"generating {results:,} results": f"{generating_s / 60:.1f} min on {generators} GPUs",
        f"{rounds} rounds": f"{total_s / 3600:.1f} h",
    }
    return MethodEstimate(memory, total_s, total_s / 3600 * max(ranks, generators), rows)
