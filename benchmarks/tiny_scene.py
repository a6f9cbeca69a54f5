"""Train what reads the scene for the codec of the ``tiny`` model, and write the weights that ship with the package.

    python benchmarks/tiny_scene.py --minutes 7      # of one core; writes model/codec/scene.safetensors
    python benchmarks/tiny_scene.py --minutes 0      # only measures the weights that are there

Trained on figures drawn for it by the sample world, which knows where each garment is; none of the sample dataset's.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from loomvideo.model.codec.learned import SPATIAL_STRIDE, TEMPORAL_STRIDE
from loomvideo.model.codec.scene import CLASSES, WEIGHTS, SceneReader
from loomvideo.pipelines.sample_data.backgrounds import BACKGROUNDS
from loomvideo.pipelines.sample_data.fashion import random_look
from loomvideo.pipelines.sample_data.figures import Look, Renderer, random_figure
from loomvideo.pipelines.sample_data.garments import LOWER

SIDE = 96
WORLD = 77
"""First part of the seeds of scenes; the sample dataset's are others."""
HELDOUT = 200
STILL_SHARE = 0.5


def main() -> None:
    """Render, train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="CPU minutes of training; 0 only measures")
    parser.add_argument("--scenes", type=int, default=4000, help="scenes to train on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heldout = render(range(HELDOUT), args.workers)
    if args.minutes:
        train(*render(range(HELDOUT, HELDOUT + args.scenes), args.workers), args)
    reader = SceneReader.load(args.output)
    with torch.no_grad():
        shares = reader(as_input(heldout[0])).softmax(1)
    wanted = heldout[1].float()
    errors = (shares - wanted).square().mean((0, 2, 3)) / wanted.var((0, 2, 3))
    right = (shares.argmax(1) == wanted.argmax(1)).float().mean().item()
    print(f"{HELDOUT} other scenes: {right:.1%} of cells right; squared error over variance: "
          + ", ".join(f"{name} {error:.3f}" for name, error in zip(CLASSES, errors.tolist(), strict=True)))  # fmt: skip


def render(numbers: range, workers: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [scenes, 12, height, width] and shares of classes fp16 [scenes, classes, rows, columns]."""
    with ProcessPoolExecutor(workers) as pool:
        scenes = list(pool.map(scene, numbers, chunksize=20))
    return torch.stack([picture for picture, _ in scenes]), torch.stack([shares for _, shares in scenes])


def scene(number: int) -> tuple[Tensor, Tensor]:
    """One latent frame of a random figure, as the codec sees it, and what stands where."""
    random = np.random.default_rng([WORLD, number])
    figure = random_figure(random)
    look = random_look(figure.outfit, random)
    start = int(random.integers(40))
    frames = [start] * TEMPORAL_STRIDE if random.random() < STILL_SHARE else range(start, start + TEMPORAL_STRIDE)
    elsewhere = [Look(look.garments, place) for place in BACKGROUNDS if place != look.background][:2]
    renderers = [Renderer(figure, shown, SIDE, SIDE) for shown in (look, *elsewhere)]
    drawn = {frame: draw(renderers, look, frame) for frame in set(frames)}
    pictures = np.stack([drawn[frame][0] for frame in frames])
    shares = torch.from_numpy(np.stack([drawn[frame][1] for frame in frames]).mean(0)).float()
    return (
        torch.from_numpy(pictures).permute(3, 0, 1, 2).flatten(0, 1),
        F.avg_pool2d(shares[None], SPATIAL_STRIDE)[0].half(),
    )


def draw(renderers: list[Renderer], look: Look, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """A frame, and the classes' shares of its pixels [classes, height, width]."""
    pictures = [renderer.frame(frame).astype(int) for renderer in renderers]
    # What another background changes is background.
    background = np.max([np.abs(pictures[0] - other).max(2) for other in pictures[1:]], axis=0) > 6
    masks = {g.type: renderers[0].garment_mask(frame, g.type) / 255.0 for g in look.garments}
    nothing = np.zeros(background.shape)
    upper = np.maximum.reduce([nothing, *(mask for kind, mask in masks.items() if kind not in LOWER)])
    lower = np.maximum.reduce([nothing, *(mask for kind, mask in masks.items() if kind in LOWER)]) * (1 - upper)
    shares = np.stack([background * (1 - np.maximum(upper, lower)), upper, lower])
    return pictures[0].astype(np.uint8), np.concatenate([shares, 1 - shares.sum(0, keepdims=True)]).clip(0, 1)


def as_input(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


def vary(pictures: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mirrored, moved by whole cells and in other colours, for a training step."""
    x = as_input(pictures)
    if torch.rand(()) < 0.5:
        x, shares = x.flip(-1), shares.flip(-1)
    frames = x.unflatten(1, (3, TEMPORAL_STRIDE))
    gain, offset = torch.rand(len(x), 3, 1, 1, 1) * 0.4 + 0.8, 0.2 * torch.randn(len(x), 3, 1, 1, 1)
    x = (frames * gain + offset).flatten(1, 2)
    rows, columns = (int(n) for n in torch.randint(-2, 3, (2,)))
    x = torch.roll(x, (rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE), (-2, -1))
    return x, torch.roll(shares, (rows, columns), (-2, -1))


def train(pictures: Tensor, shares: Tensor, args: argparse.Namespace) -> None:
    """Train for so many CPU minutes and write the averaged weights."""
    reader = SceneReader(pictures.shape[1])
    parameters = list(reader.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters, {len(pictures)} scenes", flush=True)
    optimizer = torch.optim.AdamW(parameters, args.rate, weight_decay=1e-3)
    average = [parameter.detach().clone() for parameter in parameters]
    started, step, reported = time.process_time(), 0, 0.0
    while (done := (time.process_time() - started) / (60 * args.minutes)) < 1:
        picked = torch.randint(len(pictures), (args.batch,))
        x, wanted = vary(pictures[picked], shares[picked].float())
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = F.cross_entropy(reader(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.99, (step + 1) / (step + 10)))
        if done > reported:
            reported += 0.1
            print(f"step {step}, loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value.half())
        found = torch.cat([reader.shares(as_input(part)) for part in pictures[:500].split(50)])
        reader.mean.copy_(found.mean((0, 2, 3)))
        reader.std.copy_(found.std((0, 2, 3)))
    save_file({name: tensor.half().contiguous() for name, tensor in reader.state_dict().items()}, args.output)


if __name__ == "__main__":
    main()
