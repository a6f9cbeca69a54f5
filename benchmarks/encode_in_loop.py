"""Training from shards against encoding in the loop: the same samples, model and packs in one process.

Run ``python benchmarks/encode_in_loop.py SAMPLES.jsonl SHARDS [--model tiny] [--steps 20]``. Both make packs of the
same samples and train on them; one reads latents and MLLM states from shards, the other decodes the files and encodes
them with the frozen codec and MLLM. Nothing is prefetched, so the two parts of a step add up.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from loomvideo.model.sizes import model_size
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.config import ClipOptions, FeatureOptions, PrepareConfig
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.load import SampleLoader
from loomvideo.pipelines.sources.samples import read_jsonl
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.pipelines.training.recipe import LoomVideoRecipe
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.config import MixtureConfig, PackConfig, TrainingConfig
from loomvideo.platform.training.packing import planner_of
from loomvideo.platform.training.randomness import SampleRandom


class Encoding:
    """Samples from files, encoded when they are asked for."""

    def __init__(self, samples, dataset, model):
        stated = dataset.manifest.config.items()
        clips = ClipOptions(**{k.removeprefix("clips."): v for k, v in stated if k.startswith("clips.")})
        self.samples = {sample.key: sample for sample in read_jsonl(Path(samples))}
        self.encoder = SampleEncoder(model, FeatureOptions(), "cpu")
        config = PrepareConfig(input=samples, output="", model=model.name, clips=clips)
        self.loader = SampleLoader(config, base_folder(samples), self.encoder.fingerprints)

    def __call__(self, row):
        """The sample of an index row."""
        return self.encoder.encode(self.loader.load(self.samples[row["key"]]), row["split"])


def main():
    """Print both as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("samples")
    parser.add_argument("shards")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=480)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset, model = ShardDataset.open(arguments.shards), model_size(arguments.model)
    recipe = LoomVideoRecipe(arguments.model, ObjectiveConfig(), [dataset.shared()["null"]])
    config = TrainingConfig(mixture=MixtureConfig(by_size=True), pack=PackConfig(tokens=arguments.tokens))
    encoding = Encoding(arguments.samples, dataset, model)
    ways = {
        "shards": lambda number, row, random: recipe.read(dataset, number, row, random),
        "encoding": lambda number, row, random: encoding(row),
    }
    figures = {}
    for name, read in ways.items():
        planner = planner_of(recipe, [dataset], config, 1)
        dit = recipe.build_model()
        optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-4, fused=True)
        load_s = train_s = 0.0
        num_samples, losses = 0, []
        for step in range(arguments.steps + 2):
            started = time.perf_counter()
            examples = []
            for draw in planner.next_step()[0]:
                row = dataset.index.slice(draw.row, 1).to_pylist()[0]
                random = SampleRandom(0, draw.key, draw.visit)
                with torch.no_grad():
                    examples.append(recipe.load_example(0, row, read(draw.row, row, random), random))
            pack = recipe.collate(examples).to(torch.device("cpu"), torch.float32)
            loaded = time.perf_counter()
            output = recipe.loss(dit, pack)
            (output.sum / pack.num_loss_elements).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(output.sum.detach()) / pack.num_loss_elements)
            if step > 1:
                load_s += loaded - started
                train_s += time.perf_counter() - loaded
                num_samples += len(examples)
        figures[name] = {
            "load_ms_per_sample": 1e3 * load_s / num_samples,
            "train_ms_per_sample": 1e3 * train_s / num_samples,
            "samples_per_s": num_samples / (load_s + train_s),
            "last_loss": losses[-1],
        }
    encoding.loader.close()
    figures["speedup"] = figures["shards"]["samples_per_s"] / figures["encoding"]["samples_per_s"]
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
