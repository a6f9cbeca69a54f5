"""The training loop against a plain PyTorch loop with the same model, packs and optimiser.

Run ``python benchmarks/training_loop.py [--model tiny] [--steps 60] [--workers 2] [--stage 2]`` on an idle machine. The
plain loop is one process with as many threads as there are workers; the loop is Ray Train with ZeRO on that many
one-thread workers. Samples are random latents of the sizes that the sample dataset has.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time

import pyarrow as pa
import ray
import torch

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flow import noised_and_target
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.sizes import model_size
from loomvideo.platform.ray_session import ray_session
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.training.config import TrainingConfig
from loomvideo.platform.training.driver import train
from loomvideo.platform.training.loader import load_draw
from loomvideo.platform.training.packing import planner_of
from loomvideo.platform.training.recipe import BaseRecipe, LossOutput

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_SAMPLES = 256
FRAMES = {"t2i": 1, "image_edit": 1, "t2v": 3, "video_edit": 3, "ref_edit": 3, "mi2v": 3}


class RandomDataset:
    """``random://<tokens of a latent frame>``: latents by shape only."""

    digest = "random"

    def __init__(self, url):
        frame_tokens = int(url.removeprefix("random://"))
        tasks = [list(FRAMES)[number % len(FRAMES)] for number in range(NUM_SAMPLES)]
        self.index = pa.table(
            {
                "key": [f"s{number}" for number in range(NUM_SAMPLES)],
                "task": tasks,
                "dataset": ["random"] * NUM_SAMPLES,
                "split": ["train"] * NUM_SAMPLES,
                "dit_tokens": [FRAMES[task] * frame_tokens for task in tasks],
            }
        )

    def read(self, row):
        """The row's number: examples are drawn by the recipe."""
        return row


@dataclasses.dataclass
class RandomPack:
    """A packed batch and its targets."""

    keys: list
    batch: object
    target: torch.Tensor

    num_tokens = property(lambda self: self.batch.num_tokens)
    num_loss_elements = property(lambda self: self.batch.num_loss_elements)

    def to(self, device, dtype):
        """On a device."""
        return dataclasses.replace(self, batch=self.batch.to(device, dtype), target=self.target.to(device))


class RandomRecipe(BaseRecipe):
    """Flow matching on random latents."""

    def __init__(self, name, side, num_mllm_tokens=48):
        self.config, self.side, self.num_mllm_tokens = model_size(name).dit, side, num_mllm_tokens

    def build_model(self):
        """Seeded weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LoomVideoDiT(self.config)

    def load_example(self, dataset_index, row, sample, random):
        """Random latents, source and MLLM states."""
        config = self.config
        shape = (config.in_channels, FRAMES[row["task"]], self.side, self.side)
        t = random.uniform("t")
        noised, velocity = noised_and_target(random.normal("x", shape), random.normal("noise", shape), t)
        states = random.normal("mllm", (config.num_layers, self.num_mllm_tokens, config.mllm_dim))
        source = random.normal("source", shape) if "edit" in row["task"] else None
        return row["key"], DiTSample(noised, 1000 * t, states, source, t), velocity

    def collate(self, examples):
        """One sequence."""
        batch = pack([example[1] for example in examples], self.config.patch_size)
        return RandomPack([e[0] for e in examples], batch, batch.pack_targets([e[2] for e in examples]))

    def loss(self, model, pack):
        """Squared error."""
        error = (model(pack.batch).float() - pack.target).square()
        sums = pack.batch.sum_per_sample(error.detach())
        return LossOutput(error.sum(), sums, pack.batch.sum_per_sample(torch.ones_like(error)))


def configuration(arguments):
    """A short run of the size that the tiny preset trains."""
    config = TrainingConfig(steps=arguments.steps, precision="fp32", log_every=10)
    config.pack.tokens, config.pack.per_step = arguments.tokens, arguments.workers
    config.workers.num, config.ema.decay = arguments.workers, 0.99
    config.checkpoint.every_steps, config.zero.stage = 10**6, arguments.stage
    return config


def plain_step(arguments, recipe, dataset):
    """Seconds and tokens of a step of the plain loop, its packs made beforehand, the first steps left out."""
    torch.set_num_threads(arguments.workers)
    config = configuration(arguments)
    planner = planner_of(recipe, [dataset], config, config.pack.per_step)
    model = recipe.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    plan = [planner.next_step() for _ in range(config.steps)]
    packs = [
        [
            recipe.collate([load_draw(recipe, [dataset], draw, 0) for draw in draws]).to(
                torch.device("cpu"), torch.float32
            )
            for draws in step
        ]
        for step in plan
    ]
    times = []
    for step in packs:
        start = time.perf_counter()
        elements = sum(pack.num_loss_elements for pack in step)
        for part in step:
            (recipe.loss(model, part).sum / elements).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.01)
        times.append(time.perf_counter() - start)
    counted = slice(warm_steps(arguments), None)
    tokens = [sum(part.num_tokens for part in step) for step in packs]
    return sum(times[counted]) / len(times[counted]), sum(tokens[counted]) / len(tokens[counted])


def warm_steps(arguments):
    """Steps left out at the start."""
    return min(10, arguments.steps // 3)


def main():
    """Print both and the loop's breakdown as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1650, help="work of a pack, as the tiny presets")
    parser.add_argument("--side", type=int, default=12, help="of a latent frame")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO, as the tiny presets")
    arguments = parser.parse_args()
    recipe = RandomRecipe(arguments.model, arguments.side)
    _, height, width = recipe.config.patch_size
    url = f"random://{arguments.side // height * (arguments.side // width)}"
    plain_s, tokens = plain_step(arguments, recipe, RandomDataset(url))
    figures = {
        "parameters": sum(p.numel() for p in recipe.build_model().parameters()),
        "plain_step_s": plain_s,
        "plain_tokens_per_s": tokens / plain_s,
    }
    with tempfile.TemporaryDirectory() as root, ray_session(num_cpus=max(os.cpu_count(), arguments.workers)):
        folder = RunFolder.open(root, "bench", "loop")
        result = train(configuration(arguments), lambda: recipe, [url], folder, open_dataset=RandomDataset)
        records = [json.loads(line) for line in (folder.path / "steps.jsonl").read_text().splitlines()]
    records = records[warm_steps(arguments) :]
    seconds = {
        name: sum(record[name] for record in records) for name in ("step_s", "compute_s", "update_s", "data_wait_s")
    }
    figures |= {
        "loop_step_s": seconds["step_s"] / len(records),
        "loop_tokens_per_s": sum(record["tokens"] for record in records) / seconds["step_s"],
        "loop_over_plain_speed": plain_s * len(records) / seconds["step_s"],
        "forward_backward_share": seconds["compute_s"] / seconds["step_s"],
        "update_share": seconds["update_s"] / seconds["step_s"],
        "data_wait_share": seconds["data_wait_s"] / seconds["step_s"],
        "overhead_share": 1 - (seconds["compute_s"] + seconds["update_s"]) / seconds["step_s"],
        "start_s": result["start_s"],
        "fill": sum(record["fill"] for record in records) / len(records),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
