"""Train the codec of the ``tiny`` model and write the weights that ship with the package.

    python benchmarks/tiny_codec.py data/sample --minutes 16      # one thread; writes model/codec/learned.safetensors
    python benchmarks/tiny_codec.py data/sample --minutes 0       # only measures the weights that are there

Trained on random 64x64 crops of the training media of the sample dataset, and on photographs that scikit-image and
scikit-learn ship, panned and zoomed; measured on the held-out media and on photographs that were left out.
"""

import argparse
import json
import math
import time
from pathlib import Path

import av
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from loomvideo.model.codec.learned import LATENT_CHANNELS, TEMPORAL_STRIDE, WEIGHTS, Autoencoder, LearnedCodec

CROP = 64
SCALE_WEIGHT = 2e-3
PHOTO_SHARE = 0.12
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "rocket.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg")
HELDOUT_PHOTOGRAPHS = ("coffee.png",)


def main() -> None:
    """Train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path, help="folder of `loomvideo data sample`")
    parser.add_argument("--minutes", type=float, default=16.0, help="CPU minutes of training; 0 only measures")
    parser.add_argument("--channels", type=int, default=LATENT_CHANNELS, help="channels of the latents")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.06, help="noise on the latents, whose deviation is 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    media = read_media(args.sample)
    if args.minutes:
        train(media["train"], media["heldout"], args)
    codec = LearnedCodec(args.output)
    for name, clips in (("held-out media", media["heldout"]), ("coffee", photo_clips(HELDOUT_PHOTOGRAPHS))):
        values = [quality(codec, clip) for clip in clips]
        mean, worst = np.mean(values), np.min(values)
        print(f"{name}: {len(values)} clips, PSNR of decode(encode(x)) mean {mean:.2f} dB, worst {worst:.2f} dB")


def read_media(folder: Path) -> dict[str, list[np.ndarray]]:
    """Clips uint8 [frames, height, width, 3] of each split, each file once."""
    files: dict[str, dict[str, None]] = {"train": {}, "heldout": {}}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        for name in (sample["target"], sample.get("source"), *sample.get("references", ())):
            if name:
                files[sample["split"]][name] = None
    return {split: [read_frames(folder / name) for name in names] for split, names in files.items()}


def read_frames(path: Path) -> np.ndarray:
    """All frames of a clip or picture."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def photographs(names: tuple[str, ...]) -> list[np.ndarray]:
    """Photographs that the packages ship, as uint8 [height, width, 3]."""
    folder = Path(skimage.data.__file__).parent
    found = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names if (folder / name).is_file()]
    return [*found, *load_sample_images().images[:1]] if len(names) > 1 else found


def photo_clips(names: tuple[str, ...]) -> list[np.ndarray]:
    """Each photograph as a still of 96x96."""
    return [np.asarray(Image.fromarray(p).resize((96, 96), Image.LANCZOS))[None] for p in photographs(names)]


def groups(clip: np.ndarray) -> torch.Tensor:
    """What the autoencoder sees of a clip: [latent frames, 12, height, width] in [-1, 1]."""
    video = torch.from_numpy(clip.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
    whole = (len(clip) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
    parts = [video[:, :1].expand(-1, TEMPORAL_STRIDE, -1, -1), *video[:, 1 : 1 + whole].split(TEMPORAL_STRIDE, dim=1)]
    return torch.stack([part.flatten(0, 1) for part in parts if part.shape[1]])


class Crops:
    """Random crops [batch, 12, 64, 64]."""

    def __init__(self, clips: list[np.ndarray], photos: list[np.ndarray]) -> None:
        self.clips, self.photos = clips, photos
        self.random = np.random.default_rng(0)

    def batch(self, size: int) -> torch.Tensor:
        """The next batch."""
        return torch.stack([self._one() for _ in range(size)])

    def _one(self) -> torch.Tensor:
        random = self.random
        if random.random() < PHOTO_SHARE:
            return self._photo()
        clip = self.clips[random.integers(len(self.clips))]
        start = 1 + 4 * random.integers(2) if len(clip) >= 9 and random.random() < 0.6 else None
        frames = np.repeat(clip[:1], 4, 0) if start is None else clip[start : start + 4]
        top, left = random.integers(0, 33, size=2)
        picture = frames[:, top : top + CROP, left : left + CROP]
        if random.random() < 0.5:
            picture = picture[:, :, ::-1]
        return _tensor(picture)

    def _photo(self) -> torch.Tensor:
        random = self.random
        photo = self.photos[random.integers(len(self.photos))]
        side = int(min(photo.shape[:2]) * random.uniform(0.2, 0.85))
        pan = random.uniform(-1.5, 1.5, size=2) * (side / CROP) * (random.random() < 0.5)
        reach = [int(abs(p) * 3) + 1 for p in pan]
        top, left = (
            int(random.integers(r, max(s - side - r, r + 1))) for s, r in zip(photo.shape, reach, strict=False)
        )
        crops = []
        for frame in range(TEMPORAL_STRIDE):
            y, x = (int(np.clip(start + p * frame, 0, size - side)) for start, p, size in
                    zip((top, left), pan, photo.shape, strict=False))  # fmt: skip
            crop = Image.fromarray(photo[y : y + side, x : x + side])
            crops.append(np.asarray(crop.resize((CROP, CROP), Image.BILINEAR, reducing_gap=2.0)))
        return _tensor(np.stack(crops))


def _tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).flatten(0, 1).float() / 127.5 - 1


def train(clips: list[np.ndarray], heldout: list[np.ndarray], args: argparse.Namespace) -> None:
    """Train for so many CPU minutes and write the averaged weights."""
    crops = Crops(clips, photographs(PHOTOGRAPHS))
    model = Autoencoder(args.channels).to(memory_format=torch.channels_last)
    start_as_principal_components(model, crops)
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters, {len(clips)} training files, {len(crops.photos)} photos")
    linear = [parameter for name, parameter in model.named_parameters() if name.startswith("linear")]
    other = [parameter for name, parameter in model.named_parameters() if not name.startswith("linear")]
    groups_of_rates = [{"params": linear, "lr": 0.1 * args.rate}, {"params": other, "lr": args.rate}]
    optimizer = torch.optim.AdamW(groups_of_rates, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    checked = torch.cat([groups(clip)[:2] for clip in heldout[::3]])
    started, wall, step, reported = time.process_time(), time.time(), 0, 0.0
    while (done := (time.process_time() - started) / (60 * args.minutes)) < 1:
        scale = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group, rate in zip(optimizer.param_groups, (0.1 * args.rate, args.rate), strict=True):
            group["lr"] = rate * scale
        pictures = crops.batch(args.batch).contiguous(memory_format=torch.channels_last)
        latents = model.raw_latents(pictures)
        decoded = model.decode(latents + args.noise * torch.randn_like(latents))
        loss = F.mse_loss(decoded, pictures) + 0.02 * F.l1_loss(decoded, pictures)
        # Without it the encoder would outgrow the noise.
        scale_loss = (latents.square().mean((0, 2, 3)) - 1).square().mean()
        optimizer.zero_grad()
        (loss + SCALE_WEIGHT * scale_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (step + 1) / (step + 10)))
        if time.time() - reported > 60:
            reported = time.time()
            with torch.no_grad():
                error = []
                for part in checked.split(32):
                    z = model.raw_latents(part)
                    error.append((model.decode(z).clamp(-1, 1) - part).square().flatten(1).mean(1))
                psnr = 10 * torch.log10(4 / torch.cat(error))
            print(
                f"step {step} {time.time() - wall:.0f} s loss {loss.item():.5f} held out {psnr.mean():.2f} dB",
                flush=True,
            )
            save(model, average, crops, args.output)
    save(model, average, crops, args.output)


@torch.no_grad()
def start_as_principal_components(model: Autoencoder, crops: Crops) -> None:
    """Start from the best linear code of 4x8x8 blocks, turned so that every channel has the same variance.

    A turned orthonormal code keeps distances: an error in the latents is the same error in pixels.
    """
    channels = len(model.mean)
    blocks = torch.cat([F.unfold(crops.batch(24), 8, stride=8).transpose(1, 2).flatten(0, 1) for _ in range(12)])
    mean = blocks.mean(0)
    covariance = torch.cov(blocks.T)
    variances, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -channels:].T
    kept = torch.diag(variances[-channels:])
    for _ in range(channels - 1):
        diagonal = kept.diagonal()
        high, low = int(diagonal.argmax()), int(diagonal.argmin())
        turn = torch.eye(channels)
        angle = _equalising_angle(kept[high, high], kept[low, low], kept[high, low], diagonal.mean())
        turn[high, high] = turn[low, low] = math.cos(angle)
        turn[high, low], turn[low, high] = math.sin(angle), -math.sin(angle)
        kept, basis = turn @ kept @ turn.T, turn @ basis
    deviation = kept.diagonal().sqrt()
    window = basis.view(channels, -1, 8, 8)
    for layer in (model.linear_encoder, model.linear_decoder):
        layer.weight.zero_()
        layer.bias.zero_()
    model.linear_encoder.weight[:, :, 4:12, 4:12] = window / deviation[:, None, None, None]
    model.linear_encoder.bias.copy_(-(basis @ mean) / deviation)
    model.linear_decoder.weight[:, :, 4:12, 4:12] = window * deviation[:, None, None, None]
    model.linear_decoder.bias.copy_(mean.view(-1, 64).mean(1))
    for network in (model.encoder, model.decoder):
        last = [layer for layer in network if hasattr(layer, "weight")][-1]
        last.weight.zero_()
        last.bias.zero_()


def _equalising_angle(high: torch.Tensor, low: torch.Tensor, mixed: torch.Tensor, wanted: torch.Tensor) -> float:
    """The rotation of two channels after which the first has the wanted variance, by bisection."""

    def variance(angle: float) -> float:
        c, s = math.cos(angle), math.sin(angle)
        return float(c * c * high + 2 * c * s * mixed + s * s * low)

    # At a quarter turn the first channel has the variance `low`, below the wanted one.
    left, right = 0.0, math.pi / 2
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if variance(middle) > wanted else (left, middle)
    return left


@torch.no_grad()
def save(model: Autoencoder, average: list[torch.Tensor], crops: Crops, output: Path) -> None:
    """Write the averaged weights in half precision, with the statistics of latents."""
    final = Autoencoder(len(model.mean))
    for parameter, value in zip(final.parameters(), average, strict=True):
        parameter.copy_(value.half())
    picked = [crops.clips[i] for i in np.random.default_rng(1).integers(len(crops.clips), size=150)]
    latents = torch.cat([final.raw_latents(groups(clip)) for clip in picked])
    final.mean.copy_(latents.mean((0, 2, 3)))
    final.std.copy_(latents.std((0, 2, 3)))
    tensors = {name: tensor.half().contiguous() for name, tensor in final.state_dict().items()}
    save_file(tensors, output)


def quality(codec: LearnedCodec, clip: np.ndarray) -> float:
    """PSNR in dB of what the codec makes of a clip."""
    whole = (len(clip) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    video = torch.from_numpy(clip[:whole].copy()).permute(3, 0, 1, 2)[None].float()
    height, width = (side // 8 * 8 for side in video.shape[3:])
    video = video[..., :height, :width] / 127.5 - 1
    error = codec.decode(codec.encode(video).mean) - video
    return 10 * math.log10(4 / error.square().mean().item())


if __name__ == "__main__":
    main()
