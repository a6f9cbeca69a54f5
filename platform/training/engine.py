"""The DeepSpeed ZeRO engine: built from our configuration, with the few things DeepSpeed does not offer itself.

Notable: no rank ever holds the whole model in float32, as weights are read slice by slice into the partitions, and
master weights are what was read, not what bf16 left of it; gradients are those of sum / (elements of all ranks and
micro-steps); the averaged weights live on the same partitions as the float32 master weights; every parameter's slice
of master weights, moments and average can be read and written by name, which is what makes checkpoints independent of
the world size.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from loomvideo.platform.training.allocation import allocate
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.frozen import frozen_slices, load_frozen
from loomvideo.platform.training.moments import MOMENTS, read_moments, write_moments
from loomvideo.platform.training.recipe import Recipe
from loomvideo.platform.training.schedule import ema_decay, learning_rate
from loomvideo.platform.training.slices import ParameterSlice, Source, read_from, requests_of
from loomvideo.platform.training.zero import build_optimizer, deepspeed_config, import_deepspeed, select_trainable


class ZeroEngine:
    """A model under ZeRO.

    Args:
        config: The run's configuration.
        recipe: Chooses what is recomputed and compiled.
        model: The model, on the CPU or the meta device, the same on every rank; its parameters are replaced.
        device: This worker's.
        num_micro_steps: Micro-steps of a rank in a step.
        initial: Weights to start from, read one parameter at a time; by default those that ``model`` holds.
        load: Whether to read them now; a run that continues reads its checkpoint instead.
        shared: Frozen parameters of another role's model; a frozen one of the same name is that very parameter.
        optimizer_key: Where ``config.optimizer`` is in the job's configuration, for errors.
    """

    def __init__(
        self,
        config: TrainingConfig,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        num_micro_steps: int,
        initial: Mapping[str, Tensor] | None = None,
        load: bool = True,
        shared: Mapping[str, nn.Parameter] | None = None,
        optimizer_key: str = "training.optimizer",
    ):
        deepspeed = import_deepspeed()
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.num_micro_steps = num_micro_steps
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        select_trainable(model, config.optimizer.trainable, optimizer_key)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.num_frozen = self.num_parameters - self.num_trainable
        if initial is None:
            initial = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.initial = initial
        settings = deepspeed_config(config, self.num_trainable, num_micro_steps, device.type == "cuda")
        taken = allocate(model, deepspeed, settings, config.zero.stage, self.dtype, device, shared)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        # Whose they were first also loads and saves them.
        self._frozen = {name: p for name, p in self.frozen.items() if name not in taken}
        recipe.prepare(model, config.activation_checkpointing, config.compile)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, self.shapes, config.optimizer, device, optimizer_key),
            config=settings,
            dist_init_required=False,
        )
        self.module = self.engine.module
        self._persistent: list[nn.Parameter] = []
        if config.zero.stage == 3:
            # Gathered in one collective, where DeepSpeed would start one a parameter.
            self._persistent, self.optimizer.persistent_parameters = self.optimizer.persistent_parameters, []
        self._positions = list(self._partition())
        self.ema: list[Tensor] = [master.detach().clone() for master in self.masters] if config.ema.decay else []
        self.grad_norm = 0.0
        if load:
            self.load_slices(read_from(initial), 0)

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat float32 master weights, one tensor a parameter group."""
        if self.config.zero.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _partition(self) -> Iterator[tuple[str, int, int, int, int]]:
        """Rows (name, group, offset in the flat group, start, stop in the parameter) of this rank's partitions."""
        if self.config.zero.stage == 3:
            for name, parameter in self._parameters.items():
                position = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                group, offset, length = position
                start = self.rank * length
                stop = min(start + length, parameter.ds_numel)
                if start < stop:
                    yield name, group, offset, start, stop
            return
        name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        for group, parameters in enumerate(self.optimizer.round_robin_bit16_groups):
            first = self.optimizer.partition_size[group] * self.rank
            last = first + self.optimizer.partition_size[group]
            place = 0
            for parameter in parameters:
                start, stop = max(first, place), min(last, place + parameter.numel())
                if start < stop:
                    yield name_of[id(parameter)], group, start - first, start - place, stop - place
                place += parameter.numel()

    def slices(self) -> Iterator[ParameterSlice]:
        """This rank's part of every trainable parameter."""
        # DeepSpeed's safe_get_local_* would copy offloaded state to the GPU first, and know stage 3 alone.
        states = [read_moments(self.optimizer.optimizer.state.get(master, {})) for master in self.masters]
        for group, state in enumerate(states):
            state["master"] = self.masters[group].data
            if self.ema:
                state["ema"] = self.ema[group]
        yield from self._cut(states)

    def _cut(self, flats: Sequence[Mapping[str, Tensor]]) -> Iterator[ParameterSlice]:
        for name, group, offset, start, stop in self._positions:
            views = {kind: flat.narrow(0, offset, stop - start) for kind, flat in flats[group].items()}
            yield ParameterSlice(name, start, stop, views)

    def without_gradient(self) -> list[str]:
        """Trainable parameters that no step has given a gradient other than zero; on all ranks together.

        The second moment tells, without a look at any gradient on the way: it is zero only then.
        """
        number_of = {name: number for number, name in enumerate(self._parameters)}
        largest = torch.zeros(len(number_of), device=self.device)
        for part in self.slices():
            if "exp_avg_sq" in part.views:
                largest[number_of[part.name]] = part.views["exp_avg_sq"].max()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return [name for name, size in zip(number_of, largest.tolist(), strict=True) if size == 0]

    def frozen_slices(self) -> Iterator[ParameterSlice]:
        """This rank's share of the parameters that are not trained."""
        return frozen_slices(self._frozen, self.shapes, self.config.zero.stage)

    @torch.no_grad()
    def load_slices(self, source: Source, optimizer_step: int, frozen: Source | None = None) -> None:
        """Fill this rank's partitions.

        Args:
            source: Gives master weights, moments and average; without an average it starts from the weights.
            optimizer_step: Steps the moments have seen; 0 leaves the optimiser fresh.
            frozen: Gives the parameters that are not trained; by default ``source``.
        """
        moments = [
            {moment: torch.zeros_like(master) for moment in MOMENTS} if optimizer_step else {}
            for master in self.masters
        ]
        flats = [{"master": master.data} | moments[group] for group, master in enumerate(self.masters)]
        for group, average in enumerate(self.ema):
            flats[group]["ema"] = average
        wanted = [(part, kind, view) for part in self._cut(flats) for kind, view in part.views.items()]
        # The masters come first of each part, so that an average without state can start from them.
        for (part, kind, view), value in zip(wanted, source(requests_of(wanted)), strict=True):
            if value is not None:
                view.copy_(value)
            elif kind == "ema":
                view.copy_(part.views["master"])
        for group, master in enumerate(self.masters):
            if optimizer_step:
                write_moments(self.optimizer.optimizer, group, master, moments[group], optimizer_step)
        load_frozen(self._frozen, self.shapes, self.config.zero, frozen or source)
        self._publish()

    def _publish(self) -> None:
        """Bring the working weights in line with the master weights."""
        if self.config.zero.stage == 3:
            self.optimizer.empty_partition_cache()
            for group in range(len(self.masters)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # The node's second copies (hpZ) are of the weights before.
            self.optimizer.invalidate_secondary_tensor()
            self._gather_persistent()
            return
        for group, master in enumerate(self.masters):
            partitions = self.optimizer.parallel_partitioned_bit16_groups[group]
            partitions[self.rank].data.copy_(master.data)
            torch.distributed.all_gather_into_tensor(
                self.optimizer.bit16_groups_flat[group], partitions[self.rank].clone()
            )

    def _gather_persistent(self) -> None:
        """Gather the small parameters that stay whole between steps."""
        if self._persistent:
            self._persistent[0].all_gather_coalesced(self._persistent).wait()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange weights and averaged weights; a second call exchanges them back."""
        for master, average in zip(self.masters, self.ema, strict=True):
            kept = master.data.clone()
            master.data.copy_(average)
            average.copy_(kept)
        self._publish()

    def backward(self, loss_sum: Tensor, total_elements: float) -> None:
        """Gradients of one micro-step.

        Args:
            loss_sum: 0-dim loss summed over this pack's elements.
            total_elements: Loss elements of all ranks and micro-steps of this step.
        """
        # ZeRO averages over ranks and micro-steps; undo both and divide by the elements instead.
        self.engine.backward(loss_sum * (self.world_size * self.num_micro_steps / total_elements))

    def step_micro(self) -> None:
        """Tell the engine that a micro-step other than the last is done."""
        self.engine.step()

    def step(self, step: int, skip: bool) -> bool:
        """Update the weights after the last micro-step.

        Args:
            step: Index of the optimiser step, from 0.
            skip: Drop the gradients instead, on every rank.

        Returns:
            Whether the weights were updated; also False when the gradients are not finite.
        """
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if skip:
            self._poison_gradients()
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        updated = self.engine.skipped_steps == skipped_before
        self._gather_persistent()
        self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if updated and self.ema:
            decay = ema_decay(self.config.ema, step)
            torch._foreach_lerp_(self.ema, [master.data for master in self.masters], 1.0 - decay)
        return updated

    def learning_rate(self, step: int) -> float:
        """The rate of optimiser step ``step`` (from 0)."""
        return learning_rate(self.config.optimizer, step, self.config.steps)

    def _poison_gradients(self) -> None:
        """Make the gradient norm invalid, upon which the engine drops the gradients on all ranks."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        name, parameter = next(iter(self._parameters.items()))
        if self.config.zero.stage == 3:
            start = next((start for other, _, _, start, _ in self._positions if other == name), None)
            if start is not None:
                # A gradient's padding is never written again, so it must stay zero.
                length = parameter.ds_tensor.numel()
                gradient = torch.zeros(length, device=self.device)
                gradient[0] = float("nan")
                safe_set_local_grad(parameter, gradient)
            return
        safe_set_full_grad(parameter, torch.full(parameter.shape, float("nan"), device=self.device))
