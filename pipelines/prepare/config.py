"""The configuration of ``loomvideo data prepare``."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from loomvideo.model.sizes import SIZES, model_size
from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions.options import CaptionOptions, CaptionWorkers
from loomvideo.pipelines.prepare.curation.options import StageOptions
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError, how_to_add

FEATURE_MODES = ("stored", "streamed", "text")
FEATURE_DTYPES = ("bf16", "fp8", "int8")
DECODERS = ("auto", "decord", "pyav")


@dataclass
class ClipOptions:
    """How clips are cut from files."""

    num_frames: int = option(33, "frames of a clip, 4k+1 with a codec of temporal stride 4; shorter files give fewer")
    fps: float = option(24.0, "frame rate of clips; files are resampled to it")
    windows: int = option(1, "clips cut from one file, at seeded places")
    buckets: list[int] = option([128], "resolution classes to choose from: 64, 128, 256, 640, 960")
    min_frames: int = option(5, "video samples with fewer frames are filtered out")


@dataclass
class FeatureOptions:
    """How MLLM features are kept."""

    mode: str = option(
        "stored", "stored: all layers; streamed: the MLLM's inputs; text: only those of text-only samples"
    )
    dtype: str = option("bf16", "stored features as bf16, fp8 (unit RMS rows) or int8 (rows)")
    layers: list[int] = option([], "layers that are stored, 0 first; empty: all; others are read as the nearest stored")
    batch: int = option(
        1, "samples of a shard encoded together, in slot order; another number makes other last bits, and nothing stale"
    )
    max_error: float = option(0.1, "largest relative error of features as read in any layer; above it the run stops")


@dataclass
class EncoderOptions:
    """How the frozen encoders compute. Each makes other last bits, so members are named after it and made again."""

    channels_last: bool = option(False, "the VAE's encoder computes channels-last, as tensor cores want it")
    compile: bool = option(
        False, "torch.compile makes a program of the VAE's encoder, once for every shape of clips in every worker"
    )
    packed: bool = option(False, "prompts of a batch go through the MLLM one behind another, without padding")


@dataclass
class ShardOptions:
    """How new samples are dealt into shards; those that lie in one stay there (`loomvideo data compact --redeal`)."""

    target_bytes: int = option(1_000_000_000, "size aimed at for a shard")
    max_samples: int = option(256, "samples aimed at for a shard at most")


@dataclass
class WorkerOptions:
    """The pool of shard builders. Nothing here changes what is written."""

    count: int = option(0, "builders at most; 0: as many as the cluster has, or gets, room for")
    cpus: float = option(1.0, "CPUs a builder reserves")
    gpus: float = option(0.0, "GPUs a builder reserves")
    decoders: int = option(
        0, "decoders elsewhere that a builder may start, as many as keep its encoders busy; it has one of its own"
    )
    decoder_cpus: float = option(1.0, "CPUs that such a decoder reserves, on any node; it works in one thread")
    ahead: bool = option(
        True, "build shards whose samples have their texts and scores while a server is still asked for others"
    )
    decode_timeout_s: float = option(60.0, "longest time for one read of one file")
    ready_bytes: int = option(
        1_000_000_000, "pixels of samples that wait for a builder's encoders or are being decoded for them, at most"
    )


@dataclass
class CurationWorkers:
    """The pool of workers that look at samples before they are encoded. Nothing here changes what they find."""

    count: int = option(0, "workers at most; 0: as many as the cluster has, or gets, room for")
    cpus: float = option(1.0, "CPUs a worker reserves; it decodes and measures in one thread")


JUDGE_BACKENDS = ("off", "openai", "transformers")
EDITS = [name for name, task in TASKS.items() if task.needs_source]
JUDGE_AXES = ("instruction", "preservation", "quality", "motion", "reference", "prompt")


@dataclass
class JudgeOptions:
    """A vision-language model that judges samples with the rubrics of the evaluation, each axis from 1 to 5."""

    backend: str = option("off", "off; openai: a compatible server, also vLLM's; transformers: in the Ray cluster")
    model: str = option("Qwen/Qwen3-VL-8B-Instruct", "model on the server; a folder for transformers")
    base_url: str = option("http://localhost:8000/v1", "the server's address")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable with the server's key")
    tasks: list[str] = option(EDITS, "tasks whose samples are judged")
    min_scores: dict[str, float] = option(
        {"instruction": 3.0, "preservation": 3.0},
        "least score of axes: instruction, preservation, quality, motion, reference; prompt of generation",
    )
    cache: str = option("data/judgements", "folder of answers already paid for")
    concurrency: int = option(8, "requests at a time, of each actor")
    per_minute: float = option(0.0, "requests started a minute at most, by all actors together; 0: no limit")
    max_attempts: int = option(5, "calls before a failure counts")
    timeout_s: float = option(120.0, "seconds before a call is given up")
    max_tokens: int = option(1024, "tokens of an answer at most")
    input_usd: float = option(0.0, "price of a million input tokens, for the estimate before the first question")
    output_usd: float = option(0.0, "price of a million output tokens")
    budget_usd: float = option(0.0, "an estimate above it ends the command before the first question; 0: no limit")
    num_frames: int = option(8, "frames of a video that are shown")
    max_side: int = option(768, "longer side of the frames shown")

    def asking(self) -> CaptionOptions:
        """The same for what asks questions about samples."""
        shared = {field.name for field in dataclasses.fields(CaptionOptions)} - {"mode", "overwrite", "verify"}
        values = {name: value for name, value in vars(self).items() if name in shared}
        return CaptionOptions(**values, mode="instruction", overwrite=True)

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UserError: naming the key and the accepted values.
        """
        if self.backend not in JUDGE_BACKENDS:
            raise UserError(f"judge.backend={self.backend}: choose one of {', '.join(JUDGE_BACKENDS)}")
        for key, values, valid in (("tasks", self.tasks, tuple(TASKS)), ("min_scores", self.min_scores, JUDGE_AXES)):
            unknown = sorted(set(values) - set(valid))
            if unknown:
                raise UserError(f"judge.{key}: {unknown[0]!r} is none of {', '.join(valid)}")
        if self.budget_usd and not self.input_usd + self.output_usd:
            raise UserError("judge.budget_usd: needs judge.input_usd and output_usd, the prices of the model")
        if min(self.concurrency, self.max_attempts, self.num_frames) < 1:
            raise UserError("judge: concurrency, max_attempts and num_frames must be at least 1")


@dataclass
class LimitOptions:
    """When losses stop being normal."""

    max_loss: float = option(0.05, "the run fails when one reason quarantines more than this share of the inputs")
    attempts: int = option(5, "workers that may die on one shard, or fail by their GPU, before the run fails")
    device_faults: int = option(8, "errors of one GPU before the run fails and names it")


@dataclass
class PrepareConfig:
    """Raw samples to shards."""

    input: str = option("???", "samples.jsonl or a dataset in a known layout; a local path or URL")
    format: str = option("auto", "layout of the input; `auto` recognises it, see docs/sources.md")
    source_options: dict[str, Any] = option({}, "options of the layout, for example {columns: {target: video}}")
    output: str = option("???", "dataset folder, a local path or URL")
    model: str = option("tiny", "model size whose codec and MLLM encode: " + ", ".join(SIZES))
    codec_folder: str = option("", "folder of the codec's weights, for model sizes that need one")
    mllm_folder: str = option("", "folder of the MLLM, for model sizes that need one")
    heldout_fraction: float = option(0.05, "share of groups held out, where the samples do not say")
    seed: int = option(0, "order of samples in shards and places of clips")
    decoder: str = option(
        "auto", "video decoder: auto (PyAV), pyav, or decord (extra `decord`; PyAV for what it mishandles)"
    )
    clips: ClipOptions = option(ClipOptions, "")
    features: FeatureOptions = option(FeatureOptions, "")
    encoders: EncoderOptions = option(EncoderOptions, "")
    shards: ShardOptions = option(ShardOptions, "")
    workers: WorkerOptions = option(WorkerOptions, "")
    limits: LimitOptions = option(LimitOptions, "")
    runs: str = option("", "folder of runs: the job becomes an MLflow run there; empty tracks nothing")
    run: str = option("", "name of that run; by default the time")
    curate: bool = option(False, "assess samples before encoding: shots, quality, text, pairs, duplicates (stages.*)")
    stages: StageOptions = option(StageOptions, "")
    curation_workers: CurationWorkers = option(CurationWorkers, "")
    captions: CaptionOptions = option(CaptionOptions, "")
    caption_workers: CaptionWorkers = option(CaptionWorkers, "")
    judge: JudgeOptions = option(JudgeOptions, "")
    judge_workers: CaptionWorkers = option(CaptionWorkers, "")

    @property
    def makes_texts(self) -> bool:
        """Whether the graph has a caption stage."""
        return self.captions.backend != "existing"

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        choices = {
            "model": (self.model, SIZES),
            "decoder": (self.decoder, DECODERS),
            "features.mode": (self.features.mode, FEATURE_MODES),
            "features.dtype": (self.features.dtype, FEATURE_DTYPES),
        }
        for key, (value, valid) in choices.items():
            if value not in valid:
                raise UserError(f"{key}={value}: choose one of {', '.join(valid)}")
        if self.decoder == "decord" and importlib.util.find_spec("decord") is None:
            raise UserError(f"decoder=decord: decord is not installed; {how_to_add('decord')} (x86-64 only), or auto")
        for key in ("channels_last", "compile"):
            if getattr(self.encoders, key) and model_size(self.model).codec.is_built_in:
                raise UserError(
                    f"encoders.{key}=true: the codec of model={self.model} is built in and has no such encoder; "
                    f"leave it out, or take a size with Wan's VAE: model=5b"
                )
        model_size(self.model).grid.check_frames("clips.num_frames", self.clips.num_frames)
        for key, value in {
            "clips.windows": self.clips.windows,
            "features.batch": self.features.batch,
            "shards.max_samples": self.shards.max_samples,
            "shards.target_bytes": self.shards.target_bytes,
            "workers.ready_bytes": self.workers.ready_bytes,
            "limits.attempts": self.limits.attempts,
            "limits.device_faults": self.limits.device_faults,
        }.items():
            if value < 1:
                raise UserError(f"{key}={value}: must be at least 1")
        if self.workers.decoders < 0:
            raise UserError(f"workers.decoders={self.workers.decoders}: must be at least 0")
        self.stages.check()
        self.captions.check()
        self.judge.check()
        layers, num_layers = self.features.layers, model_size(self.model).dit.num_layers
        if sorted(set(layers)) != layers or (layers and not 0 <= layers[0] <= layers[-1] < num_layers):
            raise UserError(f"features.layers={layers}: list each layer once, ascending, from 0 to {num_layers - 1}")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"heldout_fraction={self.heldout_fraction}: must be in [0, 1)")
