"""What the miniature learns in so many CPU seconds, by its settings: the search behind the ``tiny`` presets.

    python benchmarks/tiny_search.py data/shards-tiny --seconds 120
    python benchmarks/tiny_search.py data/shards-tiny --seconds 120 batch=24 rate=2e-3 heads=6 shift_scale=0.5

The real transformer, recipe (dropout, timesteps, packing) and codec in a plain PyTorch loop of one thread, so that a
CPU minute says something about a minute of ``make pretrain``. Every run appends one line of JSON to ``--table``;
``--show`` prints the table that ``docs/benchmarks.md`` keeps.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loomvideo.model.codec import build_codec
from loomvideo.model.codec.scene import CHANNELS
from loomvideo.model.copy_start import start_as_copy
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.guidance import FULL, UNCONDITIONAL, Guidance
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.sampler import Branch, SchedulerConfig, sample
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.evaluation.drawn_garments import garments_right
from loomvideo.pipelines.evaluation.editing import change_mask
from loomvideo.pipelines.evaluation.metrics import psnr_db
from loomvideo.pipelines.training.config import ObjectiveConfig
from loomvideo.pipelines.training.recipe import LoomVideoRecipe, TrainingPack
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.training.randomness import SampleRandom

DEFAULTS: dict[str, Any] = {
    "tasks": "all",  # or edit: without generation from words
    "weights": "",  # how often a task's samples are drawn for once of another's, such as t2i:2,image_edit:3
    "batch": 8,  # samples a step
    "rate": 1.5e-3,
    "warmup": 30,
    "final": 0.05,
    "schedule": "cosine",  # or constant, or wsd: constant, linear to "final" in the last third
    "weighting": "element",  # or sample: every sample alike; clean: the error of the clean latents, t squared
    "beta2": 0.95,
    "decay": 0.0,
    "ema": 0.99,
    "optimizer": "adamw",  # or muon for the blocks' matrices
    "layers": 3,
    "heads": 4,
    "head_dim": 32,
    "ffn": 384,
    "frequencies": 32,  # of the timestep embedding
    "shift_scale": 3.3,
    "shift_base": 1,
    "shift_limit": 30.0,
    "generate_shift_scale": 0.5,  # of samples without a source
    "generate_shift_limit": 4.0,
    "drop_all": 0.05,
    "drop_text": 0.05,
    "start": "copy",  # or random
    "patch": 1,  # rows and columns of a token
    "residual": 0.1,  # of the copying start
    "images": 1,  # how often a sample of one frame is drawn for one of a clip
    "first": 0,  # 1: first latent frames alone
    "scene": 1,  # 0: without what stands where
    "seed": 0,
}


def main() -> None:
    """Run one setting, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("settings", nargs="*", help=f"NAME=VALUE of {', '.join(DEFAULTS)}")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training")
    parser.add_argument(
        "--train-steps", type=int, help="train so many steps instead: on a busy machine a CPU second is worth less"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edits", type=int, default=32, help="held-out edits that are made")
    parser.add_argument("--steps", type=int, default=8, help="sampler steps")
    parser.add_argument("--flow-shift", type=float, default=30.0, help="of the sampler")
    parser.add_argument("--generations", type=int, default=0, help="held-out captions that are drawn")
    parser.add_argument("--generate-steps", type=int, default=6, help="sampler steps from words")
    parser.add_argument("--generate-flow-shift", type=float, default=16.0, help="of the sampler from words")
    parser.add_argument("--generate-scale", type=float, default=2.0, help="guidance scale from words")
    parser.add_argument("--table", type=Path, default=Path("runs/tiny-search.jsonl"))
    parser.add_argument(
        "--words",
        type=Path,
        help="folder of a BERT whose states of the words replace the MLLM's, such as MiniLM's; FOLDER/static: of its "
        "embeddings alone; FOLDER/random: of a random vector for each of its tokens",
    )
    parser.add_argument("--start", type=Path, help="a state dict to start from")
    parser.add_argument("--save", type=Path, help="where to put the averaged state dict")
    parser.add_argument("--strip", type=Path, help="a PNG of held-out edits: source, edited, target")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_intermixed_args()
    if args.show:
        show(args.table)
        return
    settings = dict(DEFAULTS)
    for item in args.settings:
        name, _, value = item.partition("=")
        settings[name] = type(DEFAULTS[name])(float(value) if not isinstance(DEFAULTS[name], str) else value)
    torch.set_num_threads(args.threads)
    result = Search(args, settings).run()
    changed = {name: value for name, value in settings.items() if value != DEFAULTS[name]}
    changed |= {"words": args.words.name} if args.words else {}
    args.table.parent.mkdir(parents=True, exist_ok=True)
    with args.table.open("a") as file:
        file.write(json.dumps({"settings": changed, **result}) + "\n")
    print(json.dumps({"settings": changed, **result}))


class Search:
    """One run."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any]) -> None:
        self.args, self.settings = args, settings
        size = model_size("tiny")
        self.dataset = ShardDataset.open(args.shards)
        objective = ObjectiveConfig(
            shift_scale=settings["shift_scale"],
            shift_base_tokens=int(settings["shift_base"]),
            shift_limit=settings["shift_limit"],
            generate_shift_scale=settings["generate_shift_scale"],
            generate_shift_limit=settings["generate_shift_limit"],
            drop_all=settings["drop_all"],
            drop_text=settings["drop_text"],
        )
        self.recipe = LoomVideoRecipe("tiny", objective, [self.dataset.shared()["null"]], seed=int(settings["seed"]))
        layers = int(settings["layers"])
        self.recipe.config = dataclasses.replace(
            size.dit,
            num_layers=layers,
            num_attention_heads=int(settings["heads"]),
            attention_head_dim=int(settings["head_dim"]),
            ffn_dim=int(settings["ffn"]),
            freq_dim=int(settings["frequencies"]),
            patch_size=(1, int(settings["patch"]), int(settings["patch"])),
        )
        self.codec = build_codec(size.codec)
        self.rows = self.dataset.index.to_pylist()
        self.samples = {}
        self.words = WordStates(args.words, self.recipe.config) if args.words else None

    def sample(self, row: int) -> Any:
        """A sample of the dataset, read once."""
        if row not in self.samples:
            sample = self.samples[row] = self.dataset.read(row)
            if self.words:
                for number in sample.metadata["mllm_index"]:
                    sample.tensors["mllm"][f"full.{number}"] = self.words(sample.metadata["text"])
            for member in ("source", "target", "refs"):
                for name, latents in sample.tensors.get(member, {}).items():
                    if self.settings["first"]:
                        latents = latents[:, :1]
                    if not self.settings["scene"]:
                        latents = torch.cat([latents[:-CHANNELS], torch.zeros_like(latents[-CHANNELS:])])
                    sample.tensors[member][name] = latents
        return self.samples[row]

    def run(self) -> dict[str, Any]:
        """Train, make held-out edits, measure."""
        settings = self.settings
        torch.manual_seed(int(settings["seed"]))
        model = LoomVideoDiT(self.recipe.config)
        if settings["start"] == "copy":
            start_as_copy(model, residual=settings["residual"])
        if self.args.start:
            model.load_state_dict(torch.load(self.args.start))
        edits = settings["tasks"] == "edit"
        train = [
            n for n, row in enumerate(self.rows) if row["split"] == "train" and (not edits or "edit" in row["task"])
        ]
        for row in train:
            self.sample(row)
        weights = dict(item.split(":") for item in settings["weights"].split(",") if item)
        pool = [n for n in train for _ in range(int(weights.get(self.rows[n]["task"], 1)))]
        pool += [n for n in train if self.rows[n]["num_frames"] == 1] * (int(settings["images"]) - 1)
        optimizers = self.optimizers(model)
        parameters = list(model.parameters())
        average = [parameter.detach().clone() for parameter in parameters]
        random, visits = np.random.default_rng(int(settings["seed"])), dict.fromkeys(train, 0)
        queue: list[int] = []
        started, step, losses, tokens = time.process_time(), 0, [], 0
        while (done := self.share_done(step, time.process_time() - started)) < 1:
            if len(queue) < settings["batch"]:
                queue += list(random.permutation(pool))
            rows, queue = queue[: int(settings["batch"])], queue[int(settings["batch"]) :]
            examples = []
            for row in rows:
                draw = SampleRandom(0, self.rows[row]["key"], visits[row])
                examples.append(self.recipe.load_example(0, self.rows[row], self.sample(row), draw))
                visits[row] += 1
            batch = self.recipe.collate(examples).to(torch.device("cpu"), torch.float32)
            loss, weighted = self.losses(model, batch)
            weighted.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            warm = min(1.0, (step + 1) / settings["warmup"])
            scale = warm * (settings["final"] + (1 - settings["final"]) * self.height(done))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * scale
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += batch.num_tokens
            losses.append(loss.item())
            with torch.no_grad():
                kept = min(settings["ema"], (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - kept)
        used = time.process_time() - started
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
        if self.args.save:
            torch.save(model.state_dict(), self.args.save)
        tail = losses[-max(len(losses) // 10, 1) :]
        return (
            {
                "seconds": round(used, 1),
                "parameters": sum(p.numel() for p in parameters),
                "steps": step,
                "ms": round(1000 * used / step, 1),
                "visits": step * int(settings["batch"]),
                "loss": round(float(np.mean(tail)), 4),
            }
            | self.measure(model.eval())
            | self.measure_generations(model)
        )

    def share_done(self, step: int, seconds: float) -> float:
        """How much of the run is over, 1 at its end."""
        return step / self.args.train_steps if self.args.train_steps else seconds / self.args.seconds

    def losses(self, model: LoomVideoDiT, batch: TrainingPack) -> tuple[Tensor, Tensor]:
        """The loss as it is reported, and as it is trained."""
        kind = self.settings["weighting"]
        if kind == "element":
            loss = self.recipe.loss(model, batch).sum / batch.num_loss_elements
            return loss.detach(), loss
        squared_error = (model(batch.batch).float() - batch.target).square()
        sums = batch.batch.sum_per_sample(squared_error)
        elements = batch.batch.sum_per_sample(torch.ones_like(squared_error))
        loss = squared_error.detach().mean()
        if kind == "sample":
            return loss, (sums / elements).mean()
        return loss, (sums * (torch.tensor(batch.timesteps) / 1000).square()).sum() / elements.sum()

    def height(self, done: float) -> float:
        """Of the learning rate between its last value (0) and its peak (1), after the share ``done`` of the run."""
        match self.settings["schedule"]:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))
            case "wsd":
                return min(1.0, 3 * (1 - done))
            case "constant":
                return 1.0
        raise SystemExit(f"schedule={self.settings['schedule']}: cosine, wsd or constant")

    def optimizers(self, model: LoomVideoDiT) -> list[torch.optim.Optimizer]:
        """AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
        settings, found = self.settings, []
        rest = list(model.parameters())
        if settings["optimizer"] == "muon":
            matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
            chosen = {id(p) for p in matrices}
            rest = [p for p in rest if id(p) not in chosen]
            found.append(
                torch.optim.Muon(matrices, lr=settings["rate"], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        betas = 0.9, settings["beta2"]
        found.append(torch.optim.AdamW(rest, settings["rate"], betas, weight_decay=settings["decay"], fused=True))
        for optimizer in found:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return found

    @torch.no_grad()
    def measure(self, model: LoomVideoDiT) -> dict[str, float]:
        """PSNR of held-out edits against what the codec makes of their targets."""
        rows = [n for n, row in enumerate(self.rows) if row["split"] == "heldout" and "edit" in row["task"]]
        rows = rows[:: max(len(rows) // self.args.edits, 1)][: self.args.edits]
        samples = [self.sample(row) for row in rows]
        states = [s.tensors["mllm"][f"full.{s.metadata['mllm_index'][0]}"].float() for s in samples]
        wrong = []
        for number, row in enumerate(rows):
            others = [
                m for m, other in enumerate(rows) if m != number and self.rows[other]["task"] == self.rows[row]["task"]
            ]
            wrong.append(states[others[number % len(others)]] if others else states[number - 1])
        made = self.decode(self.edit(model, samples, states))
        astray = self.decode(self.edit(model, samples, wrong))
        sources = self.decode([s.tensors["source"]["mean.0"].float() for s in samples])
        targets = self.decode([s.tensors["target"]["mean.0"].float() for s in samples])
        names = ("mse", "copy_mse", "edit", "copy", "wrong", "outside", "inside")
        figures: dict[str, list[float]] = {name: [] for name in names}
        for video, other, source, target in zip(made, astray, sources, targets, strict=True):
            mask = change_mask(target, source)
            figures["edit"].append(psnr_db(video, target))
            figures["mse"].append(float(np.square(video / 255.0 - target / 255.0).mean()))
            figures["copy_mse"].append(float(np.square(source / 255.0 - target / 255.0).mean()))
            figures["copy"].append(psnr_db(source, target))
            figures["wrong"].append(psnr_db(other, target))
            if mask.mean() < 0.9:
                figures["outside"].append(psnr_db(video, target, ~mask))
            if mask.any():
                figures["inside"].append(psnr_db(video, target, mask))
        if self.args.strip:
            strip([sources[n][-1] for n in range(12)], [made[n][-1] for n in range(12)],
                  [targets[n][-1] for n in range(12)], self.args.strip)  # fmt: skip
        return {name: round(float(np.mean(values)), 4) for name, values in figures.items()}

    @torch.no_grad()
    def measure_generations(self, model: LoomVideoDiT) -> dict[str, str]:
        """How many held-out captions are drawn with their garments in their colours, by task."""
        found, args = {}, self.args
        unconditional = Branch(self.recipe.null_states[0].float())
        for task in ("t2i", "t2v") if args.generations else ():
            rows = [n for n, row in enumerate(self.rows) if row["split"] == "heldout" and row["task"] == task]
            samples = [s for row in rows if (s := self.sample(row)).metadata.get("extra", {}).get("garments")]
            made = []
            for s in samples[: args.generations]:
                states = s.tensors["mllm"][f"full.{s.metadata['mllm_index'][0]}"].float()
                noise = SampleRandom(1, s.key, 0).normal("noise", s.tensors["target"]["mean.0"].shape)
                branches = {FULL: Branch(states), UNCONDITIONAL: unconditional}
                scheduler = SchedulerConfig(args.generate_flow_shift)
                guidance = Guidance(args.generate_scale)
                made.append(sample(model, noise, branches, guidance, args.generate_steps, scheduler, True))
            videos = self.decode(made)
            right = [garments_right(v, s.metadata["extra"]["garments"]) for v, s in zip(videos, samples, strict=False)]
            found[task] = f"{sum(right)} of {len(right)}"
        return found

    def edit(self, model: LoomVideoDiT, samples: list[Any], states: list[Tensor]) -> list[Tensor]:
        """Latents of edits, all in one pack."""
        config = self.recipe.config
        sources = [s.tensors["source"]["mean.0"].float() for s in samples]
        references = []
        for s in samples:
            found = s.tensors.get("refs", {})
            references.append([found[name].float() for name in sorted(found) if name.startswith("mean.")])
        latents = [
            SampleRandom(1, s.key, 0).normal("noise", source.shape) for s, source in zip(samples, sources, strict=True)
        ]
        schedulers = [SchedulerConfig(self.args.flow_shift).build(self.args.steps) for _ in samples]
        for number in range(self.args.steps):
            timestep = schedulers[0].timesteps[number]
            batch = pack(
                [
                    DiTSample(x, float(timestep), state, source, float(timestep) / 1000, refs)
                    for x, state, source, refs in zip(latents, states, sources, references, strict=True)
                ],
                config.patch_size,
            )
            velocities = batch.unpack(model(batch))
            latents = [
                s.step(v, timestep, x).prev_sample for s, v, x in zip(schedulers, velocities, latents, strict=True)
            ]
        return latents

    def decode(self, latents: list[Tensor]) -> list[np.ndarray]:
        """uint8 videos."""
        videos = [self.codec.decode(x[None])[0] for x in latents]
        return [((v.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy() for v in videos]


class WordStates:
    """States of a small BERT in place of the MLLM's: [layers, words, mllm dim] at its own scale of 1.

    Its dimensions are turned by a fixed random rotation, of which the first of the MLLM's width are taken: distances
    between words stay about the same.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.kind = ""
        if folder.name in ("static", "random"):
            folder, self.kind = folder.parent, folder.name
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        width = self.model.config.hidden_size
        rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
        self.rotation = rotation[:, : config.mllm_dim]
        self.layers = torch.linspace(1, self.model.config.num_hidden_layers, config.num_layers).round().int().tolist()

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """The states of a text."""
        inputs = self.tokenizer(text, return_tensors="pt")
        found = self.model(**inputs, output_hidden_states=True).hidden_states
        if self.kind == "static":
            found = [self.model.embeddings.word_embeddings(inputs["input_ids"])] * len(found)
        if self.kind == "random":
            rows = [torch.randn(found[0].shape[-1], generator=torch.Generator().manual_seed(n))
                    for n in inputs["input_ids"][0].tolist()]  # fmt: skip
            found = [torch.stack(rows)[None]] * len(found)
        return torch.cat([F.layer_norm(found[n], found[n].shape[-1:]) for n in self.layers]) @ self.rotation


def strip(*columns: Any) -> None:
    """Write pictures side by side."""
    from PIL import Image

    *pictures, path = columns
    rows = [np.concatenate(row, axis=1) for row in zip(*pictures, strict=True)]
    half = len(rows) // 2
    page = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], axis=1)
    Image.fromarray(page).resize((page.shape[1] * 2, page.shape[0] * 2), Image.LANCZOS).save(path)


def show(table: Path) -> None:
    """Print the table as Markdown."""
    columns = ("steps", "ms", "loss", "edit", "copy", "wrong", "outside", "inside")
    print("| changed | CPU s | parameters | " + " | ".join(columns) + " |")
    print("|" + "---|" * (3 + len(columns)))
    for line in table.read_text().splitlines():
        row = json.loads(line)
        changed = ", ".join(f"{name} {value}" for name, value in row["settings"].items()) or "-"
        values = " | ".join(str(row[name]) for name in columns)
        print(f"| {changed} | {row['seconds']:.0f} | {row['parameters'] / 1e6:.2f} M | {values} |")


if __name__ == "__main__":
    main()
