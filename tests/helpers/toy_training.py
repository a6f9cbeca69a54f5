"""A tiny recipe for testing the training loop: regress a fixed random teacher from sequences of tokens."""

import dataclasses
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import nn

from loomvideo.model.config import LoRAConfig
from loomvideo.model.lora import adapt
from loomvideo.platform.training.config import EmaConfig, OptimizerConfig
from loomvideo.platform.training.recipe import MODEL, BaseRecipe, LossOutput, Role

# Workers cannot import test helpers; ship them with the pickle.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

WIDTH = 16


class ToyDataset:
    """``toy://<samples>[/<option>=<value>...]``: sequences of 4 to 40 tokens, from a seeded generator."""

    def __init__(self, url):
        num_samples, *options = url.removeprefix("toy://").split("/")
        self.options = dict(option.split("=") for option in options)
        self.digest = url
        rng = np.random.default_rng(0)
        count = int(num_samples)
        self.index = pa.table(
            {
                "key": [f"k{number}" for number in range(count)],
                "task": ["a" if number % 3 else "b" for number in range(count)],
                "dataset": ["toy"] * count,
                "split": ["heldout" if number % 8 == 7 else "train" for number in range(count)],
                "dit_tokens": rng.integers(4, 40, count).tolist(),
            }
        )

    def read(self, row):
        if self.options.get("missing") == str(row):
            raise FileNotFoundError(f"shards/train-{row:06d}.tar is gone")
        length = self.index.column("dit_tokens")[row].as_py()
        sample = torch.from_numpy(np.random.default_rng(row).standard_normal((length, WIDTH), dtype=np.float32))
        if self.options.get("nan") == str(row):
            sample[0, 0] = float("nan")
        return sample


@dataclass
class ToyPack:
    keys: list[str]
    tasks: list[str]
    tokens: torch.Tensor
    segments: torch.Tensor
    num_tokens: int

    @property
    def num_loss_elements(self):
        return self.num_tokens * WIDTH

    def to(self, device, dtype):
        return dataclasses.replace(self, tokens=self.tokens.to(device, dtype), segments=self.segments.to(device))


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class ToyModel(nn.Module):
    def __init__(self, num_blocks, hidden):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(num_blocks))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, pack):
        x = pack.tokens
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class ToyRecipe(BaseRecipe):
    def __init__(self, num_blocks=2, hidden=33, wrap=None):
        self.num_blocks, self.hidden, self.wrap = num_blocks, hidden, wrap

    def build_model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = ToyModel(self.num_blocks, self.hidden)
        return self.wrap(model) if self.wrap else model

    def layers(self, model):
        return [module for module in model.modules() if type(module).__name__ == "Block"]

    def load_example(self, dataset_index, row, sample, random):
        noise = random.normal("noise", sample.shape)
        return row["key"], row["task"], sample + 0.1 * noise

    def load_validation_example(self, dataset_index, row, sample, random, level):
        return row["key"], row["task"], sample + level * random.normal("noise", sample.shape)

    def collate(self, examples):
        keys, tasks, tensors = zip(*examples, strict=True)
        segments = torch.cat([torch.full((len(t),), number) for number, t in enumerate(tensors)])
        tokens = torch.cat(tensors)
        return ToyPack(list(keys), list(tasks), tokens, segments, len(tokens))

    def loss(self, model, pack):
        target = torch.roll(pack.tokens, 1, dims=-1).float() ** 2
        per_token = (model(pack).float() - target).square().sum(-1)
        count = len(pack.keys)
        sums = torch.zeros(count).index_add_(0, pack.segments, per_token.detach())
        numbers = torch.bincount(pack.segments, minlength=count) * WIDTH
        return LossOutput(per_token.sum(), sums, numbers, [{"task": task} for task in pack.tasks])

    def flops(self, pack):
        return 6.0 * pack.num_tokens * self.num_blocks * 2 * WIDTH * self.hidden


TOY_LORA = LoRAConfig(rank=2, alpha=3.0, dora=True, targets=["blocks.*"], unfreeze=["out.*"])


def adapt_toy(model):
    """Adapters on the blocks, the last layer trained whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        adapt(model, TOY_LORA)
    return model


class HungryRecipe(ToyRecipe):
    """Runs out of memory in the third pack of every rank."""

    num_packs = 0

    def loss(self, model, pack):
        self.num_packs += 1
        if self.num_packs > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().loss(model, pack)


class DeafModel(ToyModel):
    """Has a layer whose output is lost."""

    def __init__(self, num_blocks, hidden):
        super().__init__(num_blocks, hidden)
        self.lost = nn.Linear(WIDTH, WIDTH)

    def forward(self, pack):
        return super().forward(pack) + 0.0 * self.lost(pack.tokens)


class DeafRecipe(ToyRecipe):
    """Trains a layer that cannot learn."""

    def build_model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return DeafModel(self.num_blocks, self.hidden)


class UnheardRecipe(ToyRecipe):
    """Says of one sample, once inputs are followed, that the loss does not depend on its source."""

    watches = False
    keys = ()

    def watch_inputs(self, on):
        self.watches = on

    def loss(self, model, pack):
        self.keys = pack.keys
        return super().loss(model, pack)

    def dead_inputs(self):
        assert self.watches
        return ["source"] if "k5" in self.keys else []


class DeadlyRecipe(ToyRecipe):
    """Kills its process once, when a certain sample is loaded for the ninth time."""

    def __init__(self, marker):
        super().__init__()
        self.marker = Path(marker)

    def load_example(self, dataset_index, row, sample, random):
        if random.visit == 8 and row["key"] == "k3":
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().load_example(dataset_index, row, sample, random)


class RolesRecipe(ToyRecipe):
    """A model that learns from a frozen teacher against a critic of its own, two turns of the critic for one."""

    shares = False

    def roles(self):
        def start(adapters):
            model = ToyRecipe.build_model(self)
            if adapters:
                adapt_toy(model)
            return model, {name: parameter.detach() for name, parameter in model.named_parameters()}

        rates = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, schedule="cosine", beta1=0.0)
        return [
            Role("teacher", lambda: start(False), shares_frozen=self.shares, base=lambda: {"path": "t", "digest": "1"}),
            Role("critic", lambda: start(self.shares), rates, EmaConfig(decay=0.9), shares_frozen=self.shares),
        ]

    def role_at(self, step):
        return MODEL if step % 3 == 2 else "critic"

    def turn_loss(self, turn, networks, pack):
        with torch.no_grad():
            aim = networks["teacher"](pack).float() + 0.1 * turn.step
            if turn.role == MODEL:
                aim = aim - 0.5 * networks["critic"](pack).float()
            else:
                aim = 0.5 * networks[MODEL](pack).float()
        per_token = (networks[turn.role](pack).float() - aim).square().sum(-1)
        count = len(pack.keys)
        sums = torch.zeros(count).index_add_(0, pack.segments, per_token.detach())
        return LossOutput(per_token.sum(), sums, torch.bincount(pack.segments, minlength=count) * WIDTH)


class SharedRolesRecipe(RolesRecipe):
    """The same with adapters on weights that all three have in common."""

    shares = True

    def build_model(self):
        return adapt_toy(super().build_model())
