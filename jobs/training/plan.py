"""What a training run will need: memory, operations, communication, time. Every number is an estimate from sizes.

Memory of a rank under ZeRO-3 with W ranks and N parameters, in bytes: working weights 2N/W in bf16, accumulated
gradients, master weights and two moments 4N/W each (float32), the average 4N/W; a gathered layer and its gradient twice
(one computing, one prefetched); MLLM states; what backward needs of the layers, by what is recomputed; buckets and the
CUDA runtime. On the host every pack in flight holds its MLLM states. Activations are counted from what each operation
saves; torch's memory tracker finds the same within 15 % (tests/model/test_fake_cuda.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loomvideo.model.conditioning.config import MLLMConfig
from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flops import sequence_flops
from loomvideo.model.memory import activation_bytes, recomputed_flops, states_bytes

BYTES_BF16, BYTES_FP32 = 2, 4
# Two gradient buckets and one of prefetched weights (see training.engine), and what CUDA, NCCL and kernels take.
NUM_BUCKETS, BUCKET_ELEMENTS, RUNTIME_BYTES = 3, 200_000_000, 3 * 2**30


@dataclass(frozen=True)
class Machine:
    """A GPU type; rates are what kernels and links reach, not peaks, apart from ``peak_tflops``.

    Attributes:
        peak_tflops: Dense bf16 peak, the base of MFU.
        memory_gib: The memory of a GPU.
        node_gbytes_per_s: All-gather rate of a GPU inside a node.
        network_gbytes_per_s: The same between nodes.
        gpus_per_node: GPUs that share the fast links.
    """

    peak_tflops: float
    memory_gib: float
    node_gbytes_per_s: float
    network_gbytes_per_s: float
    gpus_per_node: int = 8


MACHINES = {
    "h100": Machine(989.0, 80.0, 300.0, 45.0),
    "h200": Machine(989.0, 141.0, 300.0, 45.0),
    "a100": Machine(312.0, 80.0, 200.0, 22.0),
}


def machine_named(device_name: str) -> Machine | None:
    """The machine whose type a GPU's name holds."""
    return next((machine for name, machine in MACHINES.items() if name in device_name.lower()), None)


@dataclass(frozen=True)
class StepEstimate:
    """Estimates for one rank and one step; bytes and seconds. ``mllm_actors`` is for all ranks.

    ``second_copy_share`` is the part of the weights that a rank keeps once more under hpZ, 0 without.
    """

    num_parameters: int
    num_ranks: int
    second_copy_share: float
    state_bytes: float
    layer_bytes: float
    activation_bytes: float
    states_bytes: float
    buffer_bytes: float
    host_bytes: float
    train_flops: float
    executed_flops: float
    communication_bytes: float
    compute_s: float
    communication_s: float
    step_s: float
    tokens_per_s: float
    samples_per_day: float
    mllm_actors: float

    @property
    def memory_bytes(self) -> float:
        """All of a rank."""
        parts = self.state_bytes, self.layer_bytes, self.activation_bytes, self.states_bytes, self.buffer_bytes
        return sum(parts)


def count_parameters(config: DiTConfig) -> tuple[int, int]:
    """Parameters of the transformer and of one of its blocks."""
    with torch.device("meta"):
        model = LoomVideoDiT(config)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return sum(parameter.numel() for parameter in model.parameters()), block


def packs_in_flight(prefetch_steps: int) -> int:
    """Packs of a rank between their planning and their use (see ``StepLoader.max_ahead``)."""
    return 2 * prefetch_steps + 2


def mllm_token_flops(config: MLLMConfig) -> int:
    """Operations of an MLLM's language layers for a token, its attention scores and the vision tower left out."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = config.hidden_size * config.head_dim * heads + 3 * config.hidden_size * config.intermediate_size
    return 2 * config.num_hidden_layers * layer


def plan(
    config: DiTConfig,
    lengths: Sequence[int],
    mllm_lengths: Sequence[int],
    machine: Machine,
    num_ranks: int,
    recompute: str = "full",
    efficiency: float = 0.45,
    average: bool = True,
    hpz: bool = False,
    micro_steps: int = 1,
    prefetch_steps: int = 3,
    mllm: MLLMConfig | None = None,
) -> StepEstimate:
    """Estimate a step in which every rank gets ``micro_steps`` packs of these samples.

    Args:
        config: Sizes of the transformer.
        lengths: Tokens of each sample of a pack.
        mllm_lengths: Their MLLM tokens.
        machine: The GPU.
        num_ranks: GPUs.
        recompute: What is recomputed in backward, as in ``training.activation_checkpointing``.
        efficiency: Share of the peak that executed operations reach.
        average: Whether an exponential average is kept.
        hpz: Whether weights are gathered inside the node (ZeRO++ hpZ).
        micro_steps: Packs of a rank in a step.
        prefetch_steps: Steps that are loaded ahead, whose MLLM states wait on the host.
        mllm: The MLLM of ``features``, for the number of its actors; None where its states are stored.
    """
    parameters, block = count_parameters(config)
    tokens = sum(lengths)
    per_parameter = BYTES_BF16 + (5 if average else 4) * BYTES_FP32
    state = parameters * per_parameter / num_ranks
    second_copy_share = 1 / min(num_ranks, machine.gpus_per_node) if hpz else 0.0
    state += parameters * BYTES_BF16 * second_copy_share
    layer = 2 * 2 * block * BYTES_BF16
    mllm_tokens = sum(mllm_lengths)
    flops = sequence_flops(config, lengths, mllm_lengths)
    executed = flops.total + recomputed_flops(config, lengths, mllm_lengths, recompute)
    share = (num_ranks - 1) / num_ranks
    gathered = 2 * parameters * BYTES_BF16 * share
    reduced = parameters * BYTES_BF16 * share
    in_node = num_ranks <= machine.gpus_per_node
    slow = machine.node_gbytes_per_s if in_node else machine.network_gbytes_per_s
    gather_rate = machine.node_gbytes_per_s if hpz else slow
    communication_s = micro_steps * (gathered / gather_rate + reduced / slow) / 1e9
    compute_s = micro_steps * executed / (machine.peak_tflops * 1e12 * efficiency)
    # Gathers and reductions run beside the layers before and after them.
    step_s = max(compute_s, communication_s)
    per_step = num_ranks * micro_steps
    mllm_work = mllm_token_flops(mllm) * mllm_tokens * per_step / step_s if mllm else 0.0
    return StepEstimate(
        parameters,
        num_ranks,
        second_copy_share,
        state,
        layer,
        activation_bytes(config, tokens, mllm_tokens, recompute),
        states_bytes(config, mllm_tokens),
        NUM_BUCKETS * min(parameters, BUCKET_ELEMENTS) * BYTES_BF16 + RUNTIME_BYTES,
        packs_in_flight(prefetch_steps) * micro_steps * states_bytes(config, mllm_tokens),
        micro_steps * flops.total,
        micro_steps * executed,
        micro_steps * (gathered + reduced),
        compute_s,
        communication_s,
        step_s,
        per_step * tokens / step_s,
        per_step * len(lengths) * 86400 / step_s,
        mllm_work / (machine.peak_tflops * 1e12 * efficiency),
    )
