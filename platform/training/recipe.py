"""What a job tells the training loop: how to build the model and how to turn samples into a loss.

The loop owns order, packing, sharding, optimisation, checkpoints and reporting; a recipe owns everything that knows
what a sample is. A recipe is built once on every worker from a picklable factory, and its methods must be deterministic
functions of their arguments: all randomness comes from :class:`~loomvideo.platform.training.randomness.SampleRandom`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reading import ReadTally
from loomvideo.platform.training.config import EmaConfig, OptimizerConfig
from loomvideo.platform.training.layers import prepare_layers
from loomvideo.platform.training.order import SampleSizes
from loomvideo.platform.training.randomness import SampleRandom


class TrainingDataset(Protocol):
    """What the loop reads: ``platform.shards.ShardDataset`` is one."""

    @property
    def index(self) -> Any:
        """``pyarrow.Table``, one row a sample, with ``key, task, dataset, split`` and what the recipe reads."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the dataset's manifest, kept in checkpoints and tracking."""
        ...

    def read(self, row: int, select: Callable[[str, str], bool] | None = None) -> Any:
        """The sample of one row; with ``select(member, tensor name)`` only the tensors it is true for."""
        ...


@runtime_checkable
class RemoteDataset(Protocol):
    """A dataset that may lie behind a network, and counts what it asks of it."""

    def tally(self) -> ReadTally:
        """What this process has read of it so far."""
        ...


class Pack(Protocol):
    """Whole samples collated into one sequence."""

    keys: Sequence[str]
    num_tokens: int
    num_loss_elements: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "Pack":
        """The pack on a device, activations in ``dtype``."""
        ...


MODEL = "model"
"""The role of what :meth:`Recipe.start` gives: it is always trained, validated and exported."""


@dataclass(frozen=True)
class Role:
    """A network beside the model: trained in turns of its own, or frozen.

    Attributes:
        name: Letters, digits and ``_``; names its state in checkpoints and its figures.
        start: The network, which may be on the meta device, and the float32 weights it starts from.
        optimizer: How it is trained; None for a frozen one.
        ema: Its average, none by default.
        shares_frozen: Its parameters that are not trained are those of the model with the same names: one copy of the
            weights under the adapters of several roles, and none for a teacher that adapters were put on.
        base: ``path`` and ``digest`` of a frozen network's weights, which checkpoints name instead of holding them.
        optimizer_key: Where ``optimizer`` is in the job's configuration, for errors.
    """

    name: str
    start: Callable[[], tuple[nn.Module, Mapping[str, torch.Tensor]]]
    optimizer: OptimizerConfig | None = None
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.0))
    shares_frozen: bool = False
    base: Callable[[], dict[str, str]] | None = None
    optimizer_key: str = "training.optimizer"


@dataclass(frozen=True)
class Turn:
    """One step of the loop: its index from 0, and the role that it updates."""

    step: int
    role: str = MODEL


@dataclass
class LossOutput:
    """The loss of one pack, as sums, so that the loop can divide by the elements of all ranks.

    Attributes:
        sum: 0-dim float32 with graph: the loss summed over all elements of the pack.
        per_sample_sum: [S] the same, detached, by sample.
        per_sample_elements: [S] number of elements by sample.
        tags: One mapping a sample; the loop reports the mean loss by (name, value), e.g. ``{"task": "t2v"}``.
        figures: 0-dim sums over the pack of other quantities; the loop reports them divided by the loss elements.
    """

    sum: torch.Tensor
    per_sample_sum: torch.Tensor
    per_sample_elements: torch.Tensor
    tags: Sequence[Mapping[str, str]] = field(default_factory=list)
    figures: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Recipe(Protocol):
    """One kind of training. Subclass :class:`BaseRecipe` to inherit the optional parts."""

    def build_model(self) -> nn.Module:
        """The model in float32 on the CPU, weights loaded; the same on every rank.

        Every parameter must be used inside the ``forward`` of the module that owns it, reached through ``__call__``:
        that is where ZeRO-3 gathers it. ``loss`` calls the model once a pack.
        """
        ...

    def start(self) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
        """The model, which may be on the meta device, and the float32 weights it starts from, by parameter name.

        Weights are asked for one at a time, so that no rank needs the room of all of them.
        """
        ...

    def base(self) -> dict[str, str]:
        """Where parameters that are not trained come from: ``path`` and ``digest``, a hash of the content.

        Checkpoints then name them instead of holding them. Empty strings when they can be found nowhere else.
        """
        ...

    def open(self, datasets: Sequence[TrainingDataset]) -> None:
        """Called once, before anything is loaded, with the run's datasets."""
        ...

    def sample_sizes(self, dataset_index: int, index: Any) -> SampleSizes:
        """What each row of a dataset's index takes of a pack, for every variant of a visit."""
        ...

    def visit_variant(self, random: SampleRandom) -> int:
        """Which variant (column of :meth:`sample_sizes`) a visit is, from the same draws as ``load_example``."""
        ...

    def read(self, dataset: TrainingDataset, row_number: int, row: Mapping[str, Any], random: SampleRandom) -> Any:
        """What ``load_example`` needs of a stored sample, on a loader thread."""
        ...

    def share_sequences(self, num_ranks: int) -> None:
        """Called on all ranks before any pack: ``num_ranks`` neighbours get the same examples to collate.

        Each then computes its stretch of the tokens, and its loss and elements are those of that stretch.

        Raises:
            UserError: if the recipe or its model cannot.
        """
        ...

    def should_learn(self, names: Sequence[str]) -> Sequence[str]:
        """Which of these trainable parameters the packs of this rank so far should have given a gradient."""
        ...

    def watch_inputs(self, on: bool) -> None:
        """Called before the packs of a step: whether to follow if what conditions the model reaches the loss."""
        ...

    def dead_inputs(self) -> Sequence[str]:
        """Called after the backward pass of a pack: names of inputs it had on which its loss does not depend."""
        ...

    def warnings(self) -> Sequence[str]:
        """What the run's record should say of this rank so far, such as a replaced kernel."""
        ...

    def computes_with(self) -> Mapping[str, Any]:
        """What computes on this rank, such as its kernels, for the run's record; final after the first step."""
        ...

    def prepare(self, model: nn.Module, activation_checkpointing: str, compiles: bool) -> None:
        """Make the model recompute in the backward pass, and compile it, as configured.

        Args:
            model: The model that :meth:`start` gave.
            activation_checkpointing: ``none``, ``selective`` or ``full``.
            compiles: Whether layers are compiled, lengths dynamic.

        Raises:
            UserError: if the model does not know the mode.
        """
        ...

    def load_example(self, dataset_index: int, row: Mapping[str, Any], sample: Any, random: SampleRandom) -> Any:
        """One training example from a stored sample, on a CPU loader thread.

        Args:
            dataset_index: Which of the run's datasets.
            row: The sample's row of the index.
            sample: What ``read`` gave.
            random: The sample's draws for this visit.
        """
        ...

    def load_validation_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: Any, random: SampleRandom, level: float
    ) -> Any:
        """Like ``load_example`` at a fixed noise level in (0, 1) without dropout; goes through collate and loss."""
        ...

    def collate(self, examples: Sequence[Any]) -> Pack:
        """A pack of the examples, on a CPU loader thread."""
        ...

    def loss(self, model: nn.Module, pack: Pack) -> LossOutput:
        """Forward pass and loss of one pack on the training device."""
        ...

    def roles(self) -> Sequence[Role]:
        """Networks beside the model; asked once, after :meth:`start`."""
        ...

    def role_at(self, step: int) -> str:
        """Which role step ``step`` (from 0) updates; a function of the step alone, so that all ranks agree."""
        ...

    def turn_loss(self, turn: Turn, networks: Mapping[str, Callable[..., Any]], pack: Pack) -> LossOutput:
        """Loss of one pack for the role whose turn it is.

        Every rank must call every network equally often in a turn, whatever its pack holds: ZeRO-3 gathers weights in
        the calls. Only the role of the turn may be called with gradients.

        Args:
            turn: The step and the role that it updates.
            networks: The networks by role, :data:`MODEL` among them.
            pack: The pack, on the training device.
        """
        ...

    def flops(self, pack: Pack) -> float:
        """Floating-point operations of forward and backward for a pack without recomputation."""
        ...


class BaseRecipe:
    """Defaults of the optional parts of a recipe."""

    def build_model(self) -> nn.Module:
        """Every recipe has its own; see :meth:`Recipe.build_model`."""
        raise NotImplementedError(f"{type(self).__name__} has no build_model")

    def start(self) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
        """What :meth:`Recipe.build_model` gives."""
        model = self.build_model()
        return model, {name: parameter.detach() for name, parameter in model.named_parameters()}

    def base(self) -> dict[str, str]:
        """Nowhere: checkpoints hold every parameter."""
        return {"path": "", "digest": ""}

    def open(self, datasets: Sequence[TrainingDataset]) -> None:
        """Nothing to prepare."""

    def sample_sizes(self, dataset_index: int, index: Any) -> SampleSizes:
        """The index's ``dit_tokens`` column, each token costing the same."""
        return SampleSizes.plain(index.column("dit_tokens").to_numpy())

    def visit_variant(self, random: SampleRandom) -> int:
        """Every visit is of the whole sample."""
        return 0

    def read(self, dataset: TrainingDataset, row_number: int, row: Mapping[str, Any], random: SampleRandom) -> Any:
        """The whole sample; override to read less of it, e.g. one window."""
        return dataset.read(row_number)

    def roles(self) -> Sequence[Role]:
        """None."""
        return ()

    def role_at(self, step: int) -> str:
        """The model."""
        return MODEL

    def turn_loss(self, turn: Turn, networks: Mapping[str, Callable[..., Any]], pack: Any) -> LossOutput:
        """What :meth:`Recipe.loss` gives for the model."""
        return self.loss(networks[MODEL], pack)

    def loss(self, model: Any, pack: Any) -> LossOutput:
        """Every recipe has its own; see :meth:`Recipe.loss`."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def flops(self, pack: Any) -> float:
        """Unknown: no MFU is reported."""
        return 0.0

    def share_sequences(self, num_ranks: int) -> None:
        """Every rank has packs of its own."""
        if num_ranks > 1:
            raise UserError(f"training.sequence_ranks={num_ranks}: this recipe cannot share a pack between workers")

    def should_learn(self, names: Sequence[str]) -> Sequence[str]:
        """All."""
        return names

    def watch_inputs(self, on: bool) -> None:
        """Nothing is followed."""

    def dead_inputs(self) -> Sequence[str]:
        """None."""
        return ()

    def warnings(self) -> Sequence[str]:
        """None."""
        return ()

    def computes_with(self) -> Mapping[str, Any]:
        """PyTorch alone."""
        return {}

    def prepare(self, model: nn.Module, activation_checkpointing: str, compiles: bool) -> None:
        """Whole layers, of those that :meth:`layers` names."""
        prepare_layers(self.layers(model), activation_checkpointing, compiles)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The repeated blocks, in order; none."""
        return []

    def load_validation_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: Any, random: SampleRandom, level: float
    ) -> Any:
        """Like ``load_example`` at a fixed noise level in (0, 1) without dropout; goes through collate and loss."""
        raise NotImplementedError(f"{type(self).__name__} has no load_validation_example")

    def export(self, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write a full float32 state dict as a weights folder; ``state[name]`` reads one parameter at a time."""
        raise NotImplementedError(f"{type(self).__name__} has no export")
