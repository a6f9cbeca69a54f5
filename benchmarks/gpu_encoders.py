"""The frozen encoders of the 5B model on one GPU in bf16: how they compute, and what each way takes.

    python benchmarks/gpu_encoders.py --output results.json [--only vae prefill] [--quick] [--device cpu]

Needs torch, diffusers and transformers. Weights are random and of the published sizes.

- vae: one clip of 121 frames at 480x832 through Wan2.2's encoder, as it is written, channels-last, and compiled; then
  four clips one after another, with pixels copied before each, and beside the encoding of the one before.
- prefill: prompts of 64 samples through Qwen3-VL, padded to the longest of a batch and packed, for batches of 1, 8 and
  64 samples. ``--count`` prints the tokens of both and computes nothing: it needs no GPU.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from gpu_model import PEAK_FLOPS, Report, make_importable, reason

QUICK = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
SAMPLES = 64
BATCHES = (1, 8, 64)


def prompt_lengths(seed: int = 0) -> list[list[int]]:
    """Tokens of the prompts of some samples, as a mixed dataset has them.

    Half are texts of pictures and clips: captions of 12 to 300 tokens, most near 60, behind a frame of words of 25. A
    quarter are edits of pictures (an instruction of 8 to 40 tokens and 256 of the picture), a quarter of clips
    (the same and 780 of eight frames); edits have a second prompt, without words.
    """
    draw = random.Random(seed)
    samples = []
    for number in range(SAMPLES):
        if number % 4 < 2:
            samples.append([25 + min(max(round(draw.lognormvariate(4.1, 0.7)), 12), 300)])
            continue
        seen = 256 if number % 4 == 2 else 780
        samples.append([25 + seen + draw.randint(8, 40), 25 + seen])
    draw.shuffle(samples)
    return samples


def count(samples: list[list[int]]) -> list[dict]:
    """Tokens that the MLLM computes for the samples, by samples a batch, padded and packed."""
    from loomvideo.model.conditioning.mllm import MAX_BATCH_TOKENS, batches_by_length, batches_in_order

    rows = []
    for size in BATCHES:
        padded = calls = rows_of_packs = 0
        for start in range(0, len(samples), size):
            lengths = [length for sample in samples[start : start + size] for length in sample]
            batches = batches_by_length(lengths, MAX_BATCH_TOKENS)
            padded += sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
            calls += len(batches)
            rows_of_packs += len(batches_in_order(lengths, MAX_BATCH_TOKENS))
        real = sum(map(sum, samples))
        rows.append({"batch": size, "real": real, "padded": padded, "calls": calls, "packed_calls": rows_of_packs})
    return rows


@torch.no_grad()
def vae(report: Report, device: torch.device, quick: bool) -> None:
    """A clip by each way of computing, and clips whose pixels are copied before or beside."""
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    from loomvideo.model.codec import CodecExecution
    from loomvideo.model.codec.wan import WAN_22_SIZES, WanVAE, encode_chunks
    from loomvideo.pipelines.prepare.pixels import PixelCopier

    frames, height, width = (9, 64, 64) if quick else (121, 480, 832)
    config = WAN_22_SIZES | (QUICK if quick else {})
    shape = (1, 3, frames, height, width)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        list(encode_chunks(AutoencoderKLWan(**config), torch.empty(shape), 4))
    flops = counter.get_total_flops()
    pixels = [torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8) for _ in range(4)]
    copier = PixelCopier(device)
    ways = {"as written": (False, False), "channels-last": (True, False), "compiled": (False, True)}
    ways["channels-last, compiled"] = (True, True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    exact = None
    for name, how in ways.items():
        if how[1] and quick:
            continue
        torch.manual_seed(0)
        with device:
            model = AutoencoderKLWan(**config)
        codec = WanVAE(model.to(dtype), "random", execution=CodecExecution(*how))
        video = copier.video(copier.copy(pixels, [0]), dtype)
        found = codec.encode(video).mean
        exact = found if exact is None else exact
        distance = float((found - exact).norm() / exact.norm())
        report.run(
            "VAE encode", flops, lambda codec=codec, video=video: codec.encode(video), variant=name, distance=distance
        )
        if how == (True, False):
            plain = codec
        del model, codec, video

    def before() -> None:
        for clip in pixels:
            plain.encode((clip[None].to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(dtype)).mean.cpu()

    def beside() -> None:
        ahead = copier.copy(pixels, [0])
        for number in range(4):
            video = copier.video(ahead, dtype)
            moments = plain.encode(video)
            ahead = copier.copy(pixels, [(number + 1) % 4])
            moments.mean.cpu()

    report.run("VAE encode, 4 clips", 4 * flops, before, variant="pixels copied before")
    report.run("VAE encode, 4 clips", 4 * flops, beside, variant="pixels copied beside")


@torch.no_grad()
def prefill(report: Report, device: torch.device, quick: bool) -> None:
    """The prompts of all samples, padded and packed."""
    from transformers import Qwen3VLModel

    from loomvideo.model.conditioning.inputs import MLLMInputs
    from loomvideo.model.conditioning.mllm import FrozenMLLM
    from loomvideo.model.conditioning.random_weights import model_config
    from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
    from loomvideo.model.sizes import model_size

    size, tokenizer = model_size("tiny" if quick else "5b"), MLLMTokenizer()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = Qwen3VLModel(model_config(size.mllm, tokenizer))
    torch.set_default_dtype(torch.float32)
    mllm = FrozenMLLM(model, size.dit.num_layers, tokenizer, size.mllm.processor, "random")
    parameters = sum(parameter.numel() for parameter in model.language_model.parameters())
    lengths = prompt_lengths()[: 4 if quick else SAMPLES]
    # Ids of words: those of pictures would want pictures.
    samples = [[MLLMInputs(torch.randint(1000, 3000, (length,))) for length in sample] for sample in lengths]
    # The embedding is looked up, not multiplied.
    flops = 2 * (parameters - model.language_model.embed_tokens.weight.numel()) * sum(map(sum, lengths))
    for variant in ("padded", "packed"):
        if variant == "packed":
            mllm.pack_prompts()
        for batch in BATCHES:

            def run(batch: int = batch) -> None:
                for start in range(0, len(samples), batch):
                    mllm.encode([prompt for sample in samples[start : start + batch] for prompt in sample])

            report.run("MLLM prefill, 64 samples", flops, run, variant=variant, samples_together=batch)


def main() -> None:
    """Parse arguments and measure, or count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_encoders.json")
    parser.add_argument("--only", nargs="+", choices=["vae", "prefill"], default=["vae", "prefill"])
    parser.add_argument("--count", action="store_true", help="tokens padded and packed, without a model")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script itself")
    parser.add_argument("--time-limit-s", type=float, default=540, help="start no configuration after this")
    arguments = parser.parse_args()
    make_importable()
    if arguments.count:
        print(json.dumps(count(prompt_lengths()), indent=2))
        return
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), float("nan"))
    report = Report(arguments.output, peak, time.monotonic() + arguments.time_limit_s)
    for part in (vae, prefill):
        if part.__name__ not in arguments.only:
            continue
        try:
            part(report, device, arguments.quick)
        except Exception as error:  # a part that cannot run here must not lose the other
            report.content["results"].append({"name": part.__name__, "error": reason(error)})
    report.write()


if __name__ == "__main__":
    main()
