"""Distribution matching distillation (DMD2; Yin et al., 2024) of a guided editor into one of a few steps.

Three networks. The *model*, or student, predicts x0 from the noise levels of a short schedule. The *teacher* is what
the student started from, frozen; its guidance, all three branches of it, is what the student learns to do in one. The
*critic* is trained by ordinary flow matching on what the student makes, so that it knows the student's distribution as
the teacher knows the data's. The student's gradient at its own sample x, noised to a random level, is where the two
disagree, ``(x0_critic - x0_teacher) / mean|x - x0_teacher|`` (equations 1 and 7 of "One-step Diffusion with
Distribution Matching Distillation"). No real video is needed: samples lend their prompts, sources, references and
shapes.

The critic has ``critic_steps`` turns for one of the student, and ``critic_warmup`` before the first, as a critic that
has not seen the student's samples yet only repeats the teacher.

What a student is asked at a level is what it will meet there: from noise it runs its own earlier steps first (backward
simulation, section 4.5 of DMD2). The level of a step is the same on all ranks, since networks gather weights together.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flops import pack_flops
from loomvideo.model.flow import dynamic_shift, shift_time
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL, Guidance
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.tasks import wording
from loomvideo.pipelines.training.config import DistillConfig
from loomvideo.pipelines.training.dit_recipe import DiTRecipe, frozen_start
from loomvideo.pipelines.training.packed_flow import PackedFlow
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom, stream
from loomvideo.platform.training.recipe import MODEL, LossOutput, Role, Turn

TEACHER, CRITIC = "teacher", "critic"


@dataclass
class Conditioned:
    """A sample's conditioning in every branch, and its noises.

    Attributes:
        branches: Conditioning by branch, latents of zeros.
        weights: The weight of each branch in the teacher's guided velocity.
        noises: [steps, channels, frames, height, width], one a step of the schedule.
        noise: The noise of the level at which critic and teacher are asked.
        t: That level.
        times: The levels of the student's steps.
    """

    key: str
    task: str
    branches: dict[str, DiTSample]
    weights: dict[str, float]
    noises: Tensor
    noise: Tensor
    t: float
    times: tuple[float, ...]


@dataclass
class DistillPack:
    """Whole samples of a step; tensors of latents are [video tokens, patch dim]."""

    keys: list[str]
    tasks: list[str]
    flow: PackedFlow
    """The full branch of all samples: what student and critic are asked."""
    guided: PackedFlow
    """All branches of all samples: what the teacher is asked."""
    guided_rows: Tensor
    """int64: for every video token of ``guided``, which one of ``flow`` it is."""
    guided_samples: Tensor
    """int64: for every sample of ``guided``, which one of ``flow`` it is."""
    guided_weights: Tensor
    """fp32, for every sample of ``guided``: its branch's weight."""
    noises: list[Tensor]
    noise: Tensor
    t: Tensor
    """[samples]"""
    times: list[Tensor]
    """[samples] each: the level of a step of the student."""
    operations: dict[str, float]
    """Of a forward pass, by network."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the full branch."""
        return self.flow.batch.num_tokens

    @property
    def num_loss_elements(self) -> int:
        """Elements of the latents."""
        return self.flow.batch.num_loss_elements

    def to(self, device: torch.device, dtype: torch.dtype) -> "DistillPack":
        """Move to a device; what networks read in ``dtype``, latents in float32."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("guided_rows", "guided_samples", "guided_weights", "noise", "t")
        }
        moved |= {
            name: [each.to(device, non_blocking=True) for each in getattr(self, name)] for name in ("noises", "times")
        }
        flow, guided = self.flow.to(device, dtype), self.guided.to(device, dtype)
        return dataclasses.replace(self, flow=flow, guided=guided, **moved)


class DistillationRecipe(DiTRecipe):
    """DMD2 of packed LoomVideo samples.

    Args:
        distill: How.
        options: What :class:`DiTRecipe` takes; ``initial_weights`` are the teacher and where all three start.
    """

    def __init__(self, distill: DistillConfig, *options: Any, **named: Any):
        super().__init__(*options, **named)
        self.distill = distill
        self.schedule = distill.few_steps()
        self.few_steps = self.schedule

    # -- networks and turns ---------------------------------------------------------------------------------------

    def roles(self) -> Sequence[Role]:
        """Teacher and critic; under adapters both are the student's frozen weights."""

        def critic() -> tuple[nn.Module, Mapping[str, Tensor]]:
            return self.start()

        shares = self.lora is not None
        return [
            Role(TEACHER, lambda: frozen_start(self), shares_frozen=shares, base=lambda: DiTRecipe.base(self)),
            Role(CRITIC, critic, self.distill.critic, shares_frozen=shares, optimizer_key="distill.critic"),
        ]

    def role_at(self, step: int) -> str:
        """The critic's warm-up, then ``critic_steps`` turns of it for each of the student."""
        since = step - self.distill.critic_warmup
        return MODEL if since >= 0 and since % (self.distill.critic_steps + 1) == self.distill.critic_steps else CRITIC

    def level_at(self, step: int) -> int:
        """Which step of the schedule is learned in a turn; the student's turns and the critic's draw alike."""
        return int(stream("distill-level", self.seed, step).integers(self.schedule.num_steps))

    # -- samples --------------------------------------------------------------------------------------------------

    def visit_variant(self, random: SampleRandom) -> int:
        """Nothing is dropped: the teacher's branches are asked by name."""
        return 0

    def reads_visual(self, random: SampleRandom) -> bool:
        """The teacher's visual branch needs what the MLLM says of pictures alone."""
        return True

    def load_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: ShardSample, random: SampleRandom
    ) -> Conditioned:
        """Conditioning of all branches, noises and the level of one visit."""
        clean, source, references, window = self.latents_of(sample, random)
        task = sample.metadata["task"]
        weights = self.guidance(task).weights()
        null = self.null_states[dataset_index]
        branches = {}
        for branch in dict.fromkeys((FULL, *weights)):
            states = None if branch == UNCONDITIONAL else self.states_of(sample, window, branch, random)
            # Where a sample shows the MLLM nothing, its visual prompt is the empty one.
            states = null if states is None else states
            with_media = branch != UNCONDITIONAL
            branches[branch] = DiTSample(
                latents=torch.zeros_like(clean),
                timestep=0.0,
                mllm_states=states.to(torch.bfloat16),
                source=source if with_media else None,
                references=references if with_media else [],
            )
        shape = tuple(clean.shape)
        tokens = self.num_video_tokens(shape)
        level = self.distill.min_level + (self.distill.max_level - self.distill.min_level) * random.uniform("level")
        shift = dynamic_shift(tokens, *self.objective.shift(source is not None))
        return Conditioned(
            key=sample.key,
            task=task,
            branches=branches,
            weights=weights,
            noises=random.normal("steps", (self.schedule.num_steps, *shape)),
            noise=random.normal("noise", shape),
            t=shift_time(level, shift),
            times=self.schedule.times_of(source is not None),
        )

    def load_validation_example(self, *arguments: Any, **named: Any) -> NoReturn:
        """The flow-matching loss says nothing of a student that knows few levels; see ``DistillJobConfig.check``."""
        raise NotImplementedError("a distilled model has no loss on single levels")

    def guidance(self, task: str) -> Guidance:
        """The teacher's scales for a task: ``u + g_v (v - u) + g (f - v)``, where g = 1 is no guidance at all.

        Papers that write ``f + w (f - u)`` mean ``g = w + 1``.
        """
        distill, kind = self.distill, wording(task)
        scale = distill.scale if kind.needs_source else distill.generate_scale
        return Guidance(scale, distill.visual_scale if kind.has_media else None)

    def collate(self, examples: Sequence[Conditioned]) -> DistillPack:
        """Pack the full branch for student and critic, and all branches together for the teacher."""
        size = self.config.patch_size
        full = pack([example.branches[FULL] for example in examples], size)
        asked = [
            (number, example.branches[branch], weight)
            for branch in (FULL, VISUAL, UNCONDITIONAL)
            for number, example in enumerate(examples)
            if (weight := example.weights.get(branch))
        ]
        guided = pack([sample for _, sample, _ in asked], size)
        lengths = [t * h * w for t, h, w in full.grids]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        rows = [torch.arange(lengths[number]) + starts[number] for number, _, _ in asked]
        self._has_seen_source |= any(example.branches[FULL].source is not None for example in examples)
        one, all_branches = pack_flops(self.config, full).total, pack_flops(self.config, guided).total
        return DistillPack(
            keys=[example.key for example in examples],
            tasks=[example.task for example in examples],
            flow=PackedFlow(full),
            guided=PackedFlow(guided),
            guided_rows=torch.cat(rows),
            guided_samples=torch.tensor([number for number, _, _ in asked]),
            guided_weights=torch.tensor([weight for _, _, weight in asked], dtype=torch.float32),
            noises=[full.pack_targets([e.noises[step] for e in examples]) for step in range(self.schedule.num_steps)],
            noise=full.pack_targets([example.noise for example in examples]),
            t=torch.tensor([example.t for example in examples], dtype=torch.float32),
            times=list(torch.tensor([example.times for example in examples], dtype=torch.float32).T.contiguous()),
            operations={MODEL: one, CRITIC: one, TEACHER: all_branches},
        )

    def flops(self, pack: DistillPack) -> float:
        """Of an average turn, without recomputation."""
        simulated = (self.schedule.num_steps - 1) / 2
        k, one, teacher = self.distill.critic_steps, pack.operations[MODEL], pack.operations[TEACHER]
        student_turn = (simulated + 3) * one + teacher + one
        critic_turn = (simulated + 1) * one + 3 * one
        return (student_turn + k * critic_turn) / (k + 1)

    # -- losses ---------------------------------------------------------------------------------------------------

    def turn_loss(self, turn: Turn, networks: Mapping[str, Callable[..., Any]], pack: DistillPack) -> LossOutput:
        """The student's distribution matching, or the critic's flow matching on the student's samples."""
        level = self.level_at(turn.step)
        flow, t = pack.flow, pack.t
        if turn.role == CRITIC:
            with torch.no_grad():
                made = self.student_sample(networks[MODEL], pack, level)
            velocity = networks[CRITIC](flow.at(flow.noised(made, pack.noise, t), t)).float()
            squared = (velocity - flow.velocity(made, pack.noise)).square()
            return self._output(pack, squared, "critic_level")
        made = self.student_sample(networks[MODEL], pack, level)
        with torch.no_grad():
            noised = flow.noised(made, pack.noise, t)
            real = flow.clean(noised, self.guided_velocity(networks[TEACHER], pack, noised), t)
            fake = flow.clean(noised, networks[CRITIC](flow.at(noised, t)), t)
            aim = made - matching_gradient(flow, made, real, fake)
        # Half the squared distance to it has just that gradient.
        return self._output(pack, 0.5 * (made - aim).square(), "level")

    def student_sample(self, student: Callable[..., Any], pack: DistillPack, level: int) -> Tensor:
        """What the student makes of noise by its first ``level + 1`` steps; only the last one carries a graph."""
        flow, latents = pack.flow, pack.noises[0]
        made = latents
        for step, t in enumerate(pack.times[: level + 1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == level):
                if step:
                    latents = flow.noised(made, pack.noises[step], t)
                made = flow.clean(latents, student(flow.at(latents, t)), t)
        return made

    def guided_velocity(self, teacher: Callable[..., Any], pack: DistillPack, noised: Tensor) -> Tensor:
        """The teacher's velocity with guidance, from one pass over all branches."""
        guided = pack.guided
        t = pack.t[pack.guided_samples]
        velocities = teacher(guided.at(noised[pack.guided_rows], t)).float()
        weighted = guided.rows(pack.guided_weights) * velocities
        return torch.zeros_like(noised).index_add(0, pack.guided_rows, weighted)

    def _output(self, pack: DistillPack, values: Tensor, kind: str) -> LossOutput:
        batch, values_per_sample = pack.flow.batch, pack.flow.batch.sum_per_sample(values.detach())
        return LossOutput(
            sum=values.sum(),
            per_sample_sum=values_per_sample,
            per_sample_elements=batch.sum_per_sample(torch.ones_like(values)),
            tags=[{kind: task} for task in pack.tasks],
        )

    def prepare(self, model: nn.Module, activation_checkpointing: str, compiles: bool) -> None:
        """As the transformer implements it; every network is one."""
        if not isinstance(model, LoomVideoDiT):
            raise TypeError(f"{type(model).__name__} is no transformer")
        super().prepare(model, activation_checkpointing, compiles)


def matching_gradient(flow: PackedFlow, made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """``(fake - real) / mean|made - real|`` of every sample.

    Args:
        flow: The pack.
        made: The student's samples [video tokens, patch dim].
        real, fake: x0 of the teacher and of the critic at the same noised samples.
    """
    distance = flow.mean_per_sample((made - real).abs()).clamp_min(1e-6)
    return (fake - real) / flow.rows(distance)
