"""Before a prepare: what it will cost, from a few samples made for real, and which feature mode the storage favours."""

import dataclasses
import time
from dataclasses import dataclass

from loomvideo.model.sizes import ModelSize, model_size, with_folders
from loomvideo.pipelines.captions.cost import CaptionCost, caption_cost
from loomvideo.pipelines.captions.dataset import asked_for
from loomvideo.pipelines.media.decode import DecodeError
from loomvideo.pipelines.media.files import base_folder
from loomvideo.pipelines.prepare.config import PrepareConfig
from loomvideo.pipelines.prepare.encode import SampleEncoder
from loomvideo.pipelines.prepare.estimate import estimated_bytes, estimated_tokens
from loomvideo.pipelines.prepare.geometry import Filtered
from loomvideo.pipelines.prepare.inputs import read_inputs
from loomvideo.pipelines.prepare.judge_stage import judge_cost
from loomvideo.pipelines.prepare.load import SampleLoader
from loomvideo.pipelines.prepare.load_ahead import decoders_for
from loomvideo.pipelines.prepare.stages import ENCODE
from loomvideo.platform.shards.storage import Storage

MODES = (("stored", "bf16"), ("stored", "fp8"), ("stored", "int8"), ("text", "bf16"), ("streamed", "bf16"))


@dataclass(frozen=True)
class ModeCost:
    """What a feature mode costs.

    Attributes:
        mode: Mode and dtype, such as ``stored fp8``.
        bytes_per_sample: The mean over samples, all windows.
        total_bytes: The same of the whole dataset.
        read_s_per_sample: Seconds that training waits for storage for one visit.
    """

    mode: str
    bytes_per_sample: float
    total_bytes: int
    read_s_per_sample: float


@dataclass
class CostEstimate:
    """What preparing the input costs.

    Attributes:
        num_samples: Samples in the input.
        num_shards: Shards of the plan.
        modes: What each feature mode costs.
        measured: Seconds a sample of one worker, by stage, and ``decoders``, how many of one core each keep it busy;
            empty when the encoders cannot run here.
        losses: Reason codes met in the measured samples.
        recompute_s: Seconds a sample to run the MLLM while training instead of reading its features.
        recommended: Feature mode.
        why: One line.
    """

    num_samples: int
    num_shards: int
    modes: list[ModeCost]
    measured: dict[str, float]
    losses: dict[str, int]
    recompute_s: float
    recommended: str
    why: str
    captions: CaptionCost | None = None
    """Of the texts that a model would be asked for; None when there are none to ask for."""
    judge: CaptionCost | None = None
    """Of a model that judges samples; None without one."""

    def hours(self, workers: int) -> float:
        """Duration with this many workers; nan when nothing was measured."""
        if not self.measured:
            return float("nan")
        return self.num_samples * self.measured["sample_s"] / workers / 3600


def estimate_cost(
    config: PrepareConfig, num_probes: int, read_gb_per_s: float, recompute_us_per_token: float
) -> CostEstimate:
    """Plan, measure a few samples in this process, and compare feature modes.

    Args:
        config: The job.
        num_probes: Samples to make; 0 measures nothing.
        read_gb_per_s: Gigabytes a second that storage gives one training GPU.
        recompute_us_per_token: Microseconds of the MLLM a token on a training GPU.
    """
    config.check()
    inputs = read_inputs(config)
    model = with_folders(model_size(config.model), config.codec_folder, config.mllm_folder)
    num_shards = len(ENCODE.plan(Storage(config.output), inputs, config).units)
    samples = list(inputs.samples())
    modes = []
    for mode, dtype in MODES:
        features = dataclasses.replace(config.features, mode=mode, dtype=dtype)
        variant = dataclasses.replace(config, features=features)
        total = sum(estimated_bytes(sample, variant, model) for sample in samples)
        each = total / len(samples)
        modes.append(ModeCost(f"{mode} {dtype}", each, total, each / config.clips.windows / (read_gb_per_s * 1e9)))
    tokens = sum(sum(estimated_tokens(sample, config)) for sample in samples) / len(samples)
    recompute_s = tokens * recompute_us_per_token * 1e-6
    measured, losses = _measure(config, model, samples[:: max(len(samples) // max(num_probes, 1), 1)],
                                num_probes)  # fmt: skip
    recommended, why = _recommend(modes, recompute_s)
    captions = None
    if config.captions.backend != "existing":
        captions = caption_cost((s for s in samples if asked_for(s, config.captions)), config.captions)
    judge = None
    if config.judge.backend != "off":
        judge = judge_cost((s for s in samples if s.task in config.judge.tasks and s.text), config.judge)
    return CostEstimate(
        len(samples), num_shards, modes, measured, losses, recompute_s, recommended, why, captions, judge
    )


def _recommend(modes: list[ModeCost], recompute_s: float) -> tuple[str, str]:
    times = {cost.mode: cost.read_s_per_sample for cost in modes}
    # Text alone may take fewer bytes as features than pictures as input.
    extra_s = max(times["stored bf16"] - times["streamed bf16"], 0.0)
    if extra_s <= recompute_s:
        return "stored bf16", f"reading features takes {extra_s:.4f} s a sample, computing them {recompute_s:.4f} s"
    small_s = times["stored fp8"] - times["streamed bf16"]
    if small_s <= recompute_s:
        return "stored fp8", f"fp8 features read in {small_s:.4f} s a sample, computing them takes {recompute_s:.4f} s"
    return (
        "text bf16",
        f"computing features takes {recompute_s:.4f} s a sample, reading them {small_s:.4f} s even in fp8",
    )


def _measure(
    config: PrepareConfig, model: ModelSize, samples: list, num_probes: int
) -> tuple[dict[str, float], dict[str, int]]:
    needs_weights = not model.codec.is_built_in and not model.codec.folder
    if num_probes < 1 or needs_weights:
        return {}, {}
    began = time.perf_counter()
    encoder = SampleEncoder(model, config.features, "cuda" if config.workers.gpus else "cpu", config.encoders)
    loader = SampleLoader(config, base_folder(config.input), encoder.computed_by)
    start_s = time.perf_counter() - began
    load_s = encode_s = 0.0
    done, losses = 0, {}
    try:
        for sample in samples[:num_probes]:
            began = time.perf_counter()
            try:
                loaded = loader.load(sample)
            except (DecodeError, Filtered) as error:
                losses[error.reason] = losses.get(error.reason, 0) + 1
                continue
            middle = time.perf_counter()
            encoder.encode(loaded, "train")
            load_s += middle - began
            encode_s += time.perf_counter() - middle
            done += 1
    finally:
        loader.close()
    if not done:
        return {}, losses
    load_s, encode_s = load_s / done, encode_s / done
    decoders = decoders_for(load_s, encode_s)
    sample_s = max(load_s / min(decoders, 1 + config.workers.decoders), encode_s)
    found = {"start_s": start_s, "load_s": load_s, "encode_s": encode_s, "sample_s": sample_s, "decoders": decoders}
    return found | {"samples": done}, losses
