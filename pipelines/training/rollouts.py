"""Making and scoring the results of a round: prompts from the edits of the shards, sampled with one policy."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from loomvideo.model.codec import Codec
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.few_steps import FewSteps, sample_few_steps
from loomvideo.model.guidance import FULL, UNCONDITIONAL, Guidance
from loomvideo.model.sampler import Branch, SchedulerConfig, sample
from loomvideo.model.tasks import wording
from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.rewards import Rewarder, group_rewards
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.evaluation.suites.own import asked_colours
from loomvideo.pipelines.training.config import NFTConfig
from loomvideo.pipelines.training.dit_recipe import DiTRecipe
from loomvideo.pipelines.training.round_folder import Prompt
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.config import MixtureConfig
from loomvideo.platform.training.randomness import SampleRandom, stream


def choose_prompts(
    datasets: Sequence[Any],
    split: str,
    mixture: MixtureConfig,
    count: int,
    seed: int,
    number: int,
    edits: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts of round ``number``: drawn without repetition from the edits of a split that the mixture has.

    Args:
        datasets: The run's.
        split: The split of their indices that is asked.
        mixture: Tasks and datasets of weight 0 are not asked, all others alike.
        count: How many, or all there are.
        seed: The seed of the run.
        number: The round.
        edits: Kinds of edit that are asked alone; none for all. Samples are read for theirs.

    Raises:
        UserError: if there is none.
    """
    found = []
    for place, dataset in enumerate(datasets):
        columns = (dataset.index.column(name).to_pylist() for name in ("key", "task", "split", "dataset"))
        for row, (key, task, of_split, name) in enumerate(zip(*columns, strict=True)):
            drawn = mixture.tasks.get(task, 1.0) > 0 and mixture.datasets.get(name, 1.0) > 0
            if of_split == split and wording(task).needs_source and drawn:
                found.append(Prompt(place, row, key))
    if not found:
        raise UserError(f"data.shards: no edits in split {split!r} of the tasks and datasets in training.mixture")
    order = stream("rollout", seed, number).permutation(len(found))
    shuffled = (found[place] for place in order)
    chosen = list(itertools.islice((p for p in shuffled if not edits or _edit_kind(datasets, p) in edits), count))
    if not chosen:
        raise UserError(
            f"prefer.nft.edits={list(edits)}: no edit of split {split!r} has such an extra.edit.kind; leave it "
            "empty to ask all"
        )
    return chosen


def check_scales(config: NFTConfig, few_steps: FewSteps | None) -> None:
    """Refuse guidance scales for a policy that has its own folded in.

    Raises:
        UserError: naming the keys.
    """
    if few_steps is not None and config.scales:
        raise UserError(
            "prefer.nft.scales: guidance is folded into a distilled model; set it to [] and prefer.nft.same_noise=false"
        )


def _edit_kind(datasets: Sequence[Any], prompt: Prompt) -> str:
    metadata = datasets[prompt.dataset].read(prompt.row, lambda member, tensor: False).metadata
    return ((metadata.get("extra") or {}).get("edit") or {}).get("kind", "")


class RolloutMaker:
    """Makes and scores the results of prompts with one policy.

    Args:
        recipe: Knows samples.
        dit: The policy, on the device to compute on.
        codec: Latents to pixels.
        datasets: The run's datasets.
        config: How results are made.
        rewarder: Scores them.
        scheduler: The sampler's settings.
        generate_scheduler: Those of prompts without a source; None for the same.
        few_steps: What the policy was distilled to, if it was.
        seed: The run's.
    """

    def __init__(
        self,
        recipe: DiTRecipe,
        dit: LoomVideoDiT,
        codec: Codec,
        datasets: Sequence[ShardDataset],
        config: NFTConfig,
        rewarder: Rewarder,
        scheduler: SchedulerConfig,
        few_steps: FewSteps | None = None,
        seed: int = 0,
        generate_scheduler: SchedulerConfig | None = None,
    ):
        self.recipe, self.dit, self.codec, self.datasets = recipe, dit, codec, datasets
        self.config, self.rewarder, self.scheduler = config, rewarder, scheduler
        self.generate_scheduler = generate_scheduler or scheduler
        self.few_steps, self.seed = few_steps, seed
        check_scales(config, few_steps)

    def make(self, prompt: Prompt, number: int, folder: Path) -> dict[str, Any]:
        """Results of one prompt in round ``number``, kept in ``folder``; what is there already is read.

        What has no score since a server or a judge was away is made again.
        """
        kept = prompt.results(folder)
        note = kept.with_suffix(".json")
        if note.is_file():
            facts = json.loads(note.read_text())
            if not any(score["away"] for score in facts["scores"]):
                return facts
        dataset = self.datasets[prompt.dataset]
        row = dataset.index.slice(prompt.row, 1).to_pylist()[0]
        random = SampleRandom(self.seed, prompt.key, number)
        stored = dataset.read(prompt.row)
        clean, source, references, window = self.recipe.latents_of(stored, random)
        branches = self._branches(prompt, stored, window, source, references)
        latents = []
        for repeat in range(self.config.repeats):
            name = f"result.{0 if self.config.same_noise else repeat}"
            noises = [random.normal(f"{name}.{step}", clean.shape) for step in range(self._num_noises)]
            guidance = Guidance(self.config.scale_of(repeat), self.config.visual_scale)
            latents.append(self._sample(noises, branches, guidance))
        inputs = self._inputs(prompt, row, stored, clean, source, references)
        scores = self.rewarder.scores([self._pixels(each) for each in latents], inputs)
        rewards = group_rewards(scores, self.config.spread)
        facts = {
            "prompt": dataclasses.asdict(prompt),
            "window": window,
            "scores": [dataclasses.asdict(score) for score in scores],
            "rewards": rewards,
        }
        note.parent.mkdir(parents=True, exist_ok=True)
        tensors = {str(repeat): each.to("cpu", torch.bfloat16).contiguous() for repeat, each in enumerate(latents)}
        partial = note.with_suffix(f".partial-{os.getpid()}")
        save_file(tensors, partial)
        os.replace(partial, kept)
        text = json.dumps(facts)
        partial.write_text(text)
        os.replace(partial, note)
        return json.loads(text)

    @property
    def _num_noises(self) -> int:
        return self.few_steps.num_steps if self.few_steps else 1

    def _branches(
        self, prompt: Prompt, stored: ShardSample, window: int, source: Tensor | None, references: Sequence[Tensor]
    ) -> dict[str, Branch]:
        null = self.recipe.null_states[prompt.dataset]
        branches = {UNCONDITIONAL: Branch(null)}
        for name in (FULL, "visual"):
            states = self.recipe.states_of(stored, window, name)
            branches[name] = Branch(null if states is None else states, source, references)
        return branches

    def _sample(self, noises: Sequence[Tensor], branches: dict[str, Branch], guidance: Guidance) -> Tensor:
        if self.few_steps is not None:
            return sample_few_steps(self.dit, noises, branches[FULL], self.few_steps)
        scheduler = self.generate_scheduler if branches[FULL].source is None else self.scheduler
        return sample(self.dit, noises[0], branches, guidance, self.config.sampler_steps, scheduler)

    def _inputs(
        self,
        prompt: Prompt,
        row: Mapping[str, Any],
        stored: ShardSample,
        clean: Tensor,
        source: Tensor | None,
        references: Sequence[Tensor],
    ) -> LoadedItem:
        """The media that a result is measured against: what the codec makes of the stored latents."""
        target = self._pixels(clean)
        before = None if source is None else self._pixels(source)
        colours = asked_colours(stored.metadata.get("extra") or {})
        item = EvalItem(
            "round", prompt.key, row["task"], "", stored.metadata.get("text", ""),
            source=None if before is None else prompt.key, aligned=True, extra={"garment": True} | colours,
        )  # fmt: skip
        pictures = tuple(self._pixels(each)[0] for each in references)
        size = (target.shape[2], target.shape[1])
        return LoadedItem(item, before, pictures, target, None, size, len(target), 24.0)

    @torch.inference_mode()
    def _pixels(self, latents: Tensor) -> np.ndarray:
        parts = []
        device = next(self.dit.parameters()).device
        for piece in self.codec.decode_stream(latents[None].float().to(device)):
            pixels = ((piece[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            parts.append(pixels.permute(1, 2, 3, 0).cpu().numpy())
        return np.concatenate(parts)
