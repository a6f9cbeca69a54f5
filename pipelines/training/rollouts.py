"""Rounds of generated samples: made from a dataset's conditioning, scored, kept, and read back for training.

A round is a folder: ``results/KEY.safetensors`` and ``.json`` for every prompt, each written when it is whole, so that
a round that was interrupted goes on; then ``index.parquet`` with a row a result, and at last ``round.json`` with the
lineage: datasets, policy, settings, counts of failures. Sources, references and MLLM states stay in the shards they
came from.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
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
from loomvideo.platform.errors import UserError
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.reading import ReadingConfig, ReadTally
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.training.randomness import SampleRandom, stream
from loomvideo.platform.training.recipe import RemoteDataset

ROUND_FILE, INDEX_FILE = "round.json", "index.parquet"
KEPT_COLUMNS = (
    "task", "width", "height", "num_frames", "dit_tokens", "mllm_tokens", "num_bytes", "members", "licence"
)  # fmt: skip


def round_name(number: int) -> str:
    """The name of a round's folder, and of the dataset that it is."""
    return f"round-{number:04d}"


@dataclass(frozen=True)
class Prompt:
    """A row of a dataset that is asked in a round."""

    dataset: int
    row: int
    key: str


def choose_prompts(
    datasets: Sequence[Any],
    split: str,
    tasks: Mapping[str, float],
    count: int,
    seed: int,
    number: int,
    edits: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts of round ``number``: drawn without repetition from the edits of a split that the mixture has.

    Args:
        datasets: The run's.
        split: The split of their indices that is asked.
        tasks: Weights of the mixture; a task of weight 0 is not asked.
        count: How many, or all there are.
        seed: The seed of the run.
        number: The round.
        edits: Kinds of edit that are asked alone; none for all. Samples are read for theirs.

    Raises:
        UserError: if there is none.
    """
    found = []
    for place, dataset in enumerate(datasets):
        columns = (dataset.index.column(name).to_pylist() for name in ("key", "task", "split"))
        for row, (key, task, of_split) in enumerate(zip(*columns, strict=True)):
            if of_split == split and wording(task).needs_source and tasks.get(task, 1.0) > 0:
                found.append(Prompt(place, row, key))
    if not found:
        raise UserError(f"data.shards: no edits in split {split!r} of the tasks in training.mixture.tasks")
    order = stream("rollout", seed, number).permutation(len(found))
    drawn = (found[place] for place in order)
    chosen = list(itertools.islice((p for p in drawn if not edits or _edit_kind(datasets, p) in edits), count))
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

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take a policy's weights, such as those that the driver put into the object store."""
        with torch.no_grad():
            for name, parameter in self.dit.named_parameters():
                parameter.copy_(weights[name])

    def make(self, prompt: Prompt, number: int, folder: Path) -> dict[str, Any]:
        """Results of one prompt in round ``number``, kept in ``folder``; what is there already is read."""
        note = folder / "results" / f"{prompt.key}.json"
        if note.is_file():
            return json.loads(note.read_text())
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
        os.replace(partial, note.with_suffix(".safetensors"))
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


def finish_round(
    folder: Path,
    number: int,
    facts: Sequence[dict[str, Any]],
    datasets: Sequence[Any],
    urls: Sequence[str],
    lineage: Mapping[str, Any],
    watched: Sequence[str],
) -> dict[str, Any]:
    """Write the index and the lineage of a round whose results are all there; returns its summary."""
    rows = []
    for fact in facts:
        prompt = fact["prompt"]
        parent = datasets[prompt["dataset"]].index.slice(prompt["row"], 1).to_pylist()[0]
        for repeat, (score, reward) in enumerate(zip(fact["scores"], fact["rewards"], strict=True)):
            kept = {name: parent[name] for name in KEPT_COLUMNS if name in parent}
            rows.append(
                kept | {
                    "key": f"{prompt['key']}-r{number}-{repeat}"[-80:],
                    "dataset": round_name(number),
                    "split": "train" if reward is not None else "failed",
                    "num_windows": 1,
                    "parent_dataset": prompt["dataset"],
                    "parent_row": prompt["row"],
                    "parent_key": prompt["key"],
                    "window": fact["window"],
                    "repeat": repeat,
                    "reward": reward,
                    "total": score["total"],
                    "failure": score["failure"],
                    "floored": ",".join(score["floored"]),
                    "metrics": json.dumps(score["metrics"], sort_keys=True),
                }
            )  # fmt: skip
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / INDEX_FILE)
    scored = [score for fact in facts for score in fact["scores"] if score["total"] is not None]
    failures = Counter(score["failure"] for fact in facts for score in fact["scores"] if score["failure"])
    summary = {
        "round": number,
        "results": len(rows),
        "used": sum(row["reward"] is not None for row in rows),
        "failures": dict(failures),
        "floored": sum(bool(score["floored"]) for score in scored),
        "reward": _mean([score["total"] for score in scored]),
        "rewards": {n: _mean([s["rewards"][n] for s in scored]) for n in (scored[0]["rewards"] if scored else {})},
        "watched": {n: _mean([s["metrics"][n] for s in scored if n in s["metrics"]]) for n in watched},
        "datasets": {url: dataset.digest for url, dataset in zip(urls, datasets, strict=True)},
        "index_sha256": hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest(),
        **lineage,
    }
    if not summary["used"]:
        raise UserError(f"{folder}: no result of round {number} could be scored and compared: {dict(failures)}")
    partial = folder / f"{ROUND_FILE}.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, folder / ROUND_FILE)
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


class RoundDataset:
    """A finished round as the training loop reads it: conditioning from the shards, targets from the round.

    Args:
        folder: The round's folder.
        open_parent: Opens a dataset of the run by URL.
    """

    def __init__(self, folder: str | Path, open_parent: Callable[[str], Any] = ShardDataset.open):
        self.folder, self._open_parent = Path(folder), open_parent
        self.facts = json.loads((self.folder / ROUND_FILE).read_text())
        self.index = pq.read_table(self.folder / INDEX_FILE)

    @property
    def digest(self) -> str:
        """Names the content: prompts, results' places and scores."""
        return f"round-{self.facts['round']}-{self.facts['index_sha256'][:16]}"

    @cached_property
    def _parents(self) -> list[Any]:
        return [self._open_parent(url) for url in self.facts["datasets"]]

    def tally(self) -> ReadTally:
        """What this process has asked of object stores for the conditioning so far."""
        return sum((parent.tally() for parent in self._parents if isinstance(parent, RemoteDataset)), ReadTally())

    def read(self, row: int, select: Callable[[str, str], bool] | None = None) -> ShardSample:
        """The parent's sample of the round's window with the generated latents as its target."""
        place = self.index.slice(row, 1).to_pylist()[0]
        window = place["window"]
        sample = self._parents[place["parent_dataset"]].read(place["parent_row"])
        with safe_open(self.folder / "results" / f"{place['parent_key']}.safetensors", framework="pt") as file:
            made = file.get_tensor(str(place["repeat"]))
        tensors = dict(sample.tensors)
        tensors["target"] = {"mean.0": made}
        if "source" in tensors:
            tensors["source"] = {
                f"{kind}.0": tensors["source"][f"{kind}.{window}"]
                for kind in ("mean", "std")
                if f"{kind}.{window}" in tensors["source"]
            }
        metadata = sample.metadata | {"num_windows": 1, "mllm_index": [sample.metadata["mllm_index"][window]]}
        # The results were made for the first wording.
        metadata.pop("texts", None)
        return ShardSample(place["key"], metadata, tensors)


def is_finished(folder: Path) -> bool:
    """Whether a round is whole."""
    return (folder / ROUND_FILE).is_file()


def open_round_or_shards(url: str, reading: ReadingConfig | None = None) -> Any:
    """A round's folder as a :class:`RoundDataset`, anything else as shards, object stores asked as ``reading`` says."""
    open_parent = partial(ShardDataset.open, reading=reading)
    return RoundDataset(url, open_parent) if "://" not in url and is_finished(Path(url)) else open_parent(url)
