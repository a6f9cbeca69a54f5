"""What every method of training the transformer shares: its weights, what is read of a sample, what is written.

Everything random about a sample (clip window, posterior sample, guidance dropout, timestep, noise) is drawn from
(run seed, key, visit), so that world size, packing and resume cannot change it.
"""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from loomvideo.model import attention_choice, weights
from loomvideo.model import kernels as kernels_in_use
from loomvideo.model.codec.grid import LatentGrid
from loomvideo.model.config import LoRAConfig
from loomvideo.model.copy_start import start_as_copy
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.few_steps import FEW_STEPS_KEY, FewSteps, stated_few_steps
from loomvideo.model.initial_weights import InitialWeights, open_base, weights_digest
from loomvideo.model.kernels.node import use_kernels
from loomvideo.model.lora import MergedWeights, adapt
from loomvideo.model.parallel import Ranks
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.prepare.features import of_text
from loomvideo.pipelines.training.conditioning import ConditioningWatch, check_members
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.pipelines.training.visit_sizes import VARIANTS, sample_sizes
from loomvideo.platform.nodes.config import KernelConfig
from loomvideo.platform.shards.index import SCORE_PREFIX
from loomvideo.platform.shards.sample import TEXTS_SCORE, ShardSample
from loomvideo.platform.training.order import SampleSizes
from loomvideo.platform.training.randomness import SampleRandom
from loomvideo.platform.training.recipe import BaseRecipe, TrainingDataset

SOURCE_KEYS = ("source_patch_embedding.*",)
WHOLE_READ_BYTES = 1_000_000
"""Samples up to this size are read in one request; of larger ones only the tensors that the visit needs."""


STATES_DTYPE = torch.bfloat16
"""Of MLLM states on the host: 240 KiB a token of the 5b model. Stored and streamed ones have no more precision."""


class StateSource(Protocol):
    """What computes MLLM states that are not stored, such as the pool of frozen MLLMs."""

    def states(self, member: Mapping[str, Tensor], entry: int, variant: str) -> Tensor:
        """States [layers, tokens, dim] of entry ``entry``, ``full`` or ``visual``, of a streamed member."""
        ...


class DiTRecipe(BaseRecipe, ABC):
    """Training of the transformer on packed LoomVideo samples; what is learned from them is a subclass's.

    Args:
        model: Name of the model size.
        objective: What is learned.
        null_states: MLLM states of the empty message [layers, tokens, dim], one for each dataset.
        initial_weights: A weights folder or file to start from; None starts from seeded random weights.
        seed: Seed of the random weights.
        kernels: Which kernels a rank loads before it builds the model; None keeps what is in use.
        lora: Adapters to train instead of the weights; None or rank 0 for none.
        features: Computes the states of samples whose features are streamed.

    Attributes:
        few_steps: What the model is being distilled to, or was; None for an ordinary one.
        keeps_steps: Whether a distilled start stays one of few steps.
    """

    few_steps: FewSteps | None = None
    keeps_steps = False

    def __init__(
        self,
        model: str,
        objective: ObjectiveConfig,
        null_states: Sequence[Tensor],
        initial_weights: str | None = None,
        seed: int = 0,
        kernels: KernelConfig | None = None,
        lora: LoRAConfig | None = None,
        features: StateSource | None = None,
    ):
        size = model_size(model)
        self.model_name = model
        self.config = dataclasses.replace(size.dit, use_source_embedding=objective.use_source_embedding)
        self.grid = LatentGrid.of(size.codec, self.config.patch_size)
        self.objective = objective
        self.null_states = null_states
        self.initial_weights = initial_weights
        if self.keeps_steps and initial_weights:
            self.few_steps = stated_few_steps(initial_weights)
        self.seed = seed
        self.kernels = kernels
        self.lora = lora if lora and lora.rank else None
        self.features = features
        self.ranks: Ranks | None = None
        self._has_seen_source = False
        self._watch = ConditioningWatch(self.config.use_source_embedding)

    def open(self, datasets: Sequence[TrainingDataset]) -> None:
        """Refuses samples without the source or the references that their task needs."""
        check_members(datasets)

    def build_model(self) -> LoomVideoDiT:
        """The transformer in float32 with its starting weights."""
        if self.kernels is not None:
            use_kernels(self.kernels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.initial_weights is not None:
                # Stage 1 trains without a source embedding; the stage after starts it at zero.
                model = weights.load_dit(self.initial_weights, config=self.config, allow=SOURCE_KEYS)
            else:
                model = LoomVideoDiT(self.config)
                if self.objective.start_as_copy and self.config.use_source_embedding:
                    start_as_copy(model)
            if self.lora is not None:
                adapt(model, self.lora)
        return model

    def start(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """The transformer on the meta device and its starting weights; from scratch, the transformer with them."""
        if self.initial_weights is None:
            return super().start()
        if self.kernels is not None:
            use_kernels(self.kernels)
        initial = InitialWeights(self.initial_weights, self.config, SOURCE_KEYS, self.lora, self.seed)
        return initial.model, initial

    def base(self) -> dict[str, str]:
        """The starting weights, where they hold every parameter."""
        if self.initial_weights is None or InitialWeights(self.initial_weights, self.config, SOURCE_KEYS).fresh:
            return super().base()
        return {"path": str(self.initial_weights), "digest": weights_digest(self.initial_weights)}

    def open_base(self, base: Mapping[str, str], path: str = "") -> Mapping[str, Tensor] | None:
        """The weights that a checkpoint's ``base`` names; None when it names none.

        Args:
            base: ``path`` and ``digest``.
            path: Where they are now.
        """
        return open_base(path or base["path"], base["digest"], self.config, SOURCE_KEYS) if base else None

    def share_sequences(self, num_ranks: int) -> None:
        """Cut every pack into stretches of tokens for neighbouring ranks (Ulysses)."""
        if num_ranks > 1:
            self.ranks = Ranks.split(num_ranks)

    def should_learn(self, names: Sequence[str]) -> Sequence[str]:
        """All; what embeds sources, once there was a source."""
        return [name for name in names if self._has_seen_source or not name.startswith("source_patch_embedding.")]

    def watch_inputs(self, on: bool) -> None:
        """Follow the gradient of sources, references and MLLM states."""
        self._watch.is_on = on

    def dead_inputs(self) -> Sequence[str]:
        """Of those in the packs since the last call, the ones without a gradient."""
        return self._watch.dead()

    def warnings(self) -> Sequence[str]:
        """Kernels that eager replaced on this rank, and attention that is passed over, and why."""
        replaced = kernels_in_use.report()["replaced"]
        passed_over = attention_choice.report()["passed_over"]
        return [
            *(f"kernel {name} is replaced by eager: {why}" for name, why in replaced.items()),
            *(f"attention {name} is passed over: {why}" for name, why in passed_over.items()),
        ]

    def computes_with(self) -> Mapping[str, Any]:
        """Kernels and attention of this rank."""
        return {"kernels": kernels_in_use.report()["backend"], "attention": attention_choice.report()["chosen"]}

    def sample_sizes(self, dataset_index: int, index: Any) -> SampleSizes:
        """Tokens, MLLM tokens and counted operations of every row, whole and with dropped conditioning."""
        return sample_sizes(self.config, self.grid, index, self.null_states[dataset_index].shape[1])

    def visit_variant(self, random: SampleRandom) -> int:
        """What guidance dropout leaves of a visit, as a column of :meth:`sample_sizes`."""
        return VARIANTS.index(self._variant(random.uniform("dropout")) or "null")

    def prepare(self, model: nn.Module, activation_checkpointing: str, compiles: bool) -> None:
        """As the transformer implements it."""
        dit = cast(LoomVideoDiT, model)
        dit.set_activation_checkpointing(activation_checkpointing)
        if compiles:
            dit.compile_blocks(dynamic=True)

    def read(
        self, dataset: TrainingDataset, row_number: int, row: Mapping[str, Any], random: SampleRandom
    ) -> ShardSample:
        """The sample; of a large one only the visit's window, and the states it may be conditioned on."""
        if row["num_bytes"] <= WHOLE_READ_BYTES:
            return dataset.read(row_number)
        window = _window(row["num_windows"], random)
        # Without a source the MLLM is told the same for every window.
        entry = window if "source" in row["members"] else 0
        needs_visual = self.reads_visual(random)
        text = _text(int(row.get(f"{SCORE_PREFIX}{TEXTS_SCORE}") or 1), random)
        text_entry = entry + text * (row["num_windows"] if "source" in row["members"] else 1)

        def select(member: str, name: str) -> bool:
            if member == "refs":
                return True
            kind, _, number = name.rpartition(".")
            if member == "mllm":
                worded = kind in ("full", "input_ids")
                return number == str(text_entry if worded else entry) and (needs_visual or kind != "visual")
            return number == str(window)

        return dataset.read(row_number, select)

    @abstractmethod
    def load_example(
        self, dataset_index: int, row: Mapping[str, Any], sample: ShardSample, random: SampleRandom
    ) -> Any:
        """One training example, as :class:`~loomvideo.platform.training.recipe.Recipe` has it."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Any:
        """A pack of what :meth:`load_example` gave."""

    def reads_visual(self, random: SampleRandom) -> bool:
        """Whether a visit reads what the MLLM says of pictures without the text."""
        return self._variant(random.uniform("dropout")) == "visual"

    def _variant(self, dropped: float) -> str | None:
        """What the MLLM is told, by the draw of guidance dropout in [0, 1): all, pictures alone, or nothing."""
        if dropped < self.objective.drop_all:
            return None
        return "visual" if dropped < self.objective.drop_all + self.objective.drop_text else "full"

    def latents_of(self, sample: ShardSample, random: SampleRandom) -> tuple[Tensor, Tensor | None, list[Tensor], int]:
        """A visit's target, source and references, drawn from their posteriors, and the window they are of."""
        window = _window(sample.metadata["num_windows"], random)
        target, source = sample.tensors["target"], sample.tensors.get("source")
        clean = _posterior_sample(target, window, random, "target")
        source_latents = None if source is None else _posterior_sample(source, window, random, "source")
        references = sample.tensors.get("refs", {})
        num_references = sum(name.startswith("mean.") for name in references)
        reference_latents = [_posterior_sample(references, j, random, f"reference{j}") for j in range(num_references)]
        return clean, source_latents, reference_latents, window

    def num_video_tokens(self, shape: Sequence[int]) -> int:
        """Tokens of latents [channels, frames, height, width], by which timesteps are shifted."""
        _, frames, height, width = shape
        return frames * (height // self.config.patch_size[1]) * (width // self.config.patch_size[2])

    def states_of(
        self, sample: ShardSample, window: int, variant: str, random: SampleRandom | None = None
    ) -> Tensor | None:
        """MLLM states of a window; None for ``visual`` where the sample shows the MLLM no pictures.

        Args:
            sample: What was read.
            window: The clip window.
            variant: ``full`` or ``visual``.
            random: The visit's draws, which choose one of the wordings of the sample's text; None for its first.
        """
        member, entry = sample.tensors["mllm"], sample.metadata["mllm_index"][window]
        text_entry = entry
        if random is not None and variant == "full":
            text = _text(len(sample.metadata.get("texts", [""])), random)
            text_entry += text * sample.metadata.get("text_stride", 0)
        if sample.metadata.get("features", "stored") == "stored":
            states = member.get(f"{variant}.{text_entry}")
            return None if states is None else states.to(STATES_DTYPE)
        if variant == "visual" and f"visual_input_ids.{entry}" not in member:
            return None
        if self.features is None:
            raise RuntimeError(
                f"sample {sample.key}: its MLLM states are not stored and the recipe has no pool of MLLMs"
            )
        member = member if text_entry == entry else of_text(member, entry, text_entry)
        return self.features.states(member, entry, variant)

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write a LoomVideo weights folder."""
        weights.save_dit(self.published(state), self.config, folder)

    def note(self) -> dict[str, Any]:
        """What an exported folder's ``pipeline.json`` says beside the model's size: the few steps, if it has them."""
        return {} if self.few_steps is None else {FEW_STEPS_KEY: self.few_steps.to_dict()}

    def published(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict under the published names, adapters merged."""
        return state if self.lora is None else MergedWeights(state, self.lora)


def frozen_start(recipe: DiTRecipe) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """What a recipe starts from, without its adapters: the network and weights of a frozen role."""
    plain = copy.copy(recipe)
    plain.lora = None
    return DiTRecipe.start(plain)


def _posterior_sample(tensors: Mapping[str, Tensor], index: int, random: SampleRandom, name: str) -> Tensor:
    mean = tensors[f"mean.{index}"].float()
    std = tensors.get(f"std.{index}")
    if std is None:
        return mean
    return mean + std.float() * random.normal(f"posterior.{name}", mean.shape)


def _window(num_windows: int, random: SampleRandom) -> int:
    return int(random.uniform("window") * num_windows)


def _text(num_texts: int, random: SampleRandom) -> int:
    """Which wording of its text a visit is told."""
    return int(random.uniform("text") * num_texts) if num_texts > 1 else 0
