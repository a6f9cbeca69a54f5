"""What a training run will need: memory, operations, communication, time. Every number is an estimate from sizes.

Memory of a rank under ZeRO-3 with W ranks and N parameters, in bytes: working weights 2N/W in bf16, accumulated
gradients, master weights and two moments 4N/W each (float32), the average 4N/W; a gathered layer and its gradient twice
(one computing, one prefetched); activations of the layers that are not recomputed; buckets and the CUDA runtime.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flops import sequence_flops

BYTES_BF16, BYTES_FP32 = 2, 4
# Activations a token that a layer keeps for backward, in units of its width (inner dim; the feed-forward's extra).
KEPT_PER_LAYER, KEPT_FEED_FORWARD = 16, 2
# Two gradient buckets and one of prefetched weights (see training.engine), and what CUDA, NCCL and kernels take.
NUM_BUCKETS, BUCKET_ELEMENTS, RUNTIME_BYTES = 3, 200_000_000, 3 * 2**30


@dataclass(frozen=True)
class Machine:
    """A GPU type; rates are what kernels and links reach, not peaks, apart from ``peak_tflops``.

    Attributes:
        peak_tflops: Dense bf16 peak, the base of MFU.
        memory_gib: Of a GPU.
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
    """Estimates for one rank and one step; bytes and seconds."""

    num_parameters: int
    num_ranks: int
    state_bytes: float
    layer_bytes: float
    activation_bytes: float
    buffer_bytes: float
    train_flops: float
    executed_flops: float
    communication_bytes: float
    compute_s: float
    communication_s: float
    step_s: float
    tokens_per_s: float
    samples_per_day: float
    attention_tokens: int

    @property
    def memory_bytes(self) -> float:
        """All of a rank."""
        return self.state_bytes + self.layer_bytes + self.activation_bytes + self.buffer_bytes


def count_parameters(config: DiTConfig) -> tuple[int, int]:
    """Parameters of the transformer and of one of its blocks."""
    with torch.device("meta"):
        model = LoomVideoDiT(config)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return sum(parameter.numel() for parameter in model.parameters()), block


def attention_tokens(config: DiTConfig) -> int:
    """The length at which self-attention costs as much as a sample's other work: ``training.pack.attention_tokens``."""
    length = 1024
    one, two = (sequence_flops(config, [n], [0]).forward for n in (length, 2 * length))
    quadratic = (two - 2 * one) / (2 * length * length)
    return round((one - quadratic * length * length) / length / quadratic)


def plan(
    config: DiTConfig,
    lengths: Sequence[int],
    mllm_lengths: Sequence[int],
    machine: Machine,
    num_ranks: int,
    recompute: bool = True,
    efficiency: float = 0.45,
    average: bool = True,
    hpz: bool = False,
    micro_steps: int = 1,
) -> StepEstimate:
    """Estimate a step in which every rank gets ``micro_steps`` packs of these samples.

    Args:
        config: Sizes of the transformer.
        lengths: Tokens of each sample of a pack.
        mllm_lengths: Their MLLM tokens.
        machine: The GPU.
        num_ranks: GPUs.
        recompute: Whether all layers are recomputed in backward.
        efficiency: Share of the peak that executed operations reach.
        average: Whether an exponential average is kept.
        hpz: Whether weights are gathered inside the node (ZeRO++ hpZ).
        micro_steps: Packs of a rank in a step.
    """
    parameters, block = count_parameters(config)
    tokens, dim = sum(lengths), config.inner_dim
    per_parameter = BYTES_BF16 + (5 if average else 4) * BYTES_FP32
    state = parameters * per_parameter / num_ranks
    if hpz:
        state += parameters * BYTES_BF16 / min(num_ranks, machine.gpus_per_node)
    layer = 2 * 2 * block * BYTES_BF16
    kept_layer = tokens * (KEPT_PER_LAYER * dim + KEPT_FEED_FORWARD * config.ffn_dim) * BYTES_BF16
    kept_input = config.num_layers * tokens * dim * BYTES_BF16
    activations = kept_input + kept_layer if recompute else config.num_layers * kept_layer
    activations += config.num_layers * sum(mllm_lengths) * config.mllm_dim * BYTES_BF16
    flops = sequence_flops(config, lengths, mllm_lengths)
    executed = flops.total + (flops.forward if recompute else 0)
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
    return StepEstimate(
        parameters,
        num_ranks,
        state,
        layer,
        activations,
        NUM_BUCKETS * min(parameters, BUCKET_ELEMENTS) * BYTES_BF16 + RUNTIME_BYTES,
        micro_steps * flops.total,
        micro_steps * executed,
        micro_steps * (gathered + reduced),
        compute_s,
        communication_s,
        step_s,
        per_step * tokens / step_s,
        per_step * len(lengths) * 86400 / step_s,
        attention_tokens(config),
    )
