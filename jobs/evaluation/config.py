"""The configuration of ``loomvideo evaluate``."""

from dataclasses import dataclass

from loomvideo.jobs.weights.references import CHECKPOINT_KEY
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

REPEATED_TEMPERATURE = 0.7


@dataclass
class InputsConfig:
    """What the model is given and asked for."""

    bucket_classes: list[int] = option([128], "area classes of results; 640 for the published model")
    reference_classes: list[int] = option([128], "area classes of reference pictures")
    num_frames: int = option(9, "frames of a video, whole latents: 4k+1 with a codec of temporal stride 4")
    fps: float = option(24.0, "frames a second of sources after resampling, and of results")
    text_width: int = option(128, "width where there is no source or reference")
    text_height: int = option(128, "height where there is no source or reference")


@dataclass
class GenerationConfig:
    """How results are sampled."""

    steps: int = option(20, "denoising steps")
    scale: float = option(2.5, "guidance scale of edits; 1 for no guidance")
    generate_scale: float = option(5.0, "guidance scale of generation without a source")
    visual_scale: float = option(1.5, "guidance scale of the source and references")
    negative_prompt: str | None = option(None, "what the unconditional branch is told; null takes the model size's own")
    prompts: str = option(
        "training", "how the MLLM is told: training, or published as LoomVideo's own evaluation words references"
    )
    kernels: str = option("auto", "back end of the fused operations: auto, eager, cpp or triton")
    compile: bool = option(False, "compile the transformer's blocks")
    lora: list[str] = option([], "adapters, FILE or FILE:STRENGTH each: [style.safetensors:0.8,…]")
    actors: int = option(1, "copies of the model that generate at once")
    gpus: float = option(0.0, "GPUs of each copy")
    cpus: float = option(1.0, "CPUs of each copy")
    model: str = option(
        "", "model size of a checkpoint that does not state one: tiny, small or 5b; empty takes the training run's"
    )
    codec_folder: str = option("", "weights of the codec, for model sizes that need them")
    mllm_folder: str = option("", "weights of the MLLM, for model sizes that need them")
    blend_skill: float = option(0.7, "generator=blend: 1 gives the target, 0 the source")
    blend_noise: float = option(8.0, "generator=blend: noise in grey levels")


@dataclass
class JudgeConfig:
    """Who judges, what it is shown, and what it may cost."""

    kind: str = option("none", "none, fake (pixel statistics), openai (any compatible server), gemini, transformers")
    model: str = option("", "model name; for transformers the folder of a Qwen3-VL")
    base_url: str = option("", "root of the server, such as http://localhost:8000/v1; empty for the Gemini API's own")
    api_key_env: str = option("", "environment variable with the key; empty takes OPENAI_API_KEY or GEMINI_API_KEY")
    checklists: str = option("", "our checklists in another file")
    repeats: int = option(1, "independent judgements a sample; 3 or more give test-retest reliability")
    temperature: float | None = option(None, "sampling temperature; none: the protocol's, else 0, or 0.7 if repeated")
    max_tokens: int = option(2048, "most output tokens")
    structured: str = option("json_schema", "openai: json_schema, json_object or none, as far as the server goes")
    num_frames: int = option(8, "frames of a video shown to every judge alike")
    max_side: int = option(768, "longest side of a frame shown, in pixels")
    as_video: bool = option(False, "send the frames as a film at one a second instead of pictures")
    threads: int = option(8, "calls at once; of a local judge, samples in a batch")
    actors: int = option(1, "transformers: copies of the local judge")
    engine: str = option(
        "auto", "transformers: what runs the model: vllm, transformers, or auto: vllm with GPUs where it is installed"
    )
    gpus: float = option(0.0, "transformers: GPUs of each copy")
    cpus: float = option(1.0, "transformers: CPUs of each copy")
    calls_per_minute: float = option(0.0, "pace of calls; 0 for none")
    timeout_s: float = option(120.0, "seconds before a call is given up")
    max_attempts: int = option(5, "calls before a retryable failure counts")
    budget_usd: float = option(0.0, "most this run may pay, continued runs included; 0 asks before spending")
    input_usd: float = option(0.0, "price of a million input tokens")
    output_usd: float = option(0.0, "price of a million output tokens")
    tokens_per_frame: int = option(258, "input tokens a frame, for the estimate")

    def sampling_temperature(self) -> float:
        """The temperature: repeated answers are sampled, since those of a greedy judge would be one answer."""
        if self.temperature is not None:
            return self.temperature
        return REPEATED_TEMPERATURE if self.repeats > 1 else 0.0

    def check(self) -> None:
        """Check values that types cannot."""
        if min(self.repeats, self.threads, self.actors, self.max_attempts) < 1:
            raise UserError("judge.repeats, judge.threads, judge.actors and judge.max_attempts: at least 1")
        if self.repeats > 1 and self.temperature == 0 and self.kind != "fake":
            raise UserError(
                f"judge.repeats={self.repeats} with judge.temperature=0: the answers would be the same one; "
                f"leave judge.temperature out (0.7), or use judge.repeats=1"
            )
        if self.kind not in ("none", "fake", "openai", "gemini", "transformers"):
            raise UserError(f"judge.kind={self.kind}: use none, fake, openai, gemini or transformers")
        if self.kind in ("openai", "gemini", "transformers") and not self.model:
            raise UserError(f"judge.kind={self.kind}: set judge.model")
        if self.kind == "openai" and not self.base_url:
            raise UserError("judge.kind=openai: set judge.base_url")
        if self.engine not in ("auto", "vllm", "transformers"):
            raise UserError(f"judge.engine={self.engine}: use auto, vllm or transformers")
        if self.engine == "vllm" and self.gpus < 1:
            raise UserError(f"judge.engine=vllm: needs whole GPUs, set judge.gpus (now {self.gpus:g})")


@dataclass
class SuiteJudgeConfig(JudgeConfig):
    """How benchmark suites are judged."""

    mode: str = option(
        "strict", "strict (our rubrics), checklist (our yes/no questions), official or loomvideo (as their code asks)"
    )
    rubrics: str = option("", "our rubrics in another file")
    official_rubrics: dict[str, str] = option({}, "suite to the rubric file, or folder, of your copy of the benchmark")
    batch: bool = option(
        False, "openai, gemini: ask through the provider's batch interface, after everything is generated; up to a day"
    )
    batch_price: float = option(0.5, "price of a token in a batch, as a share of input_usd and output_usd")
    batch_poll_s: float = option(60.0, "seconds between two looks at a batch")
    judge_identity: bool = option(False, "judge the copied source too, as a control of the judge")

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        super().check()
        if self.batch and self.kind not in ("openai", "gemini"):
            raise UserError(f"judge.batch=true: only a provider has a batch interface, not judge.kind={self.kind}")
        if not 0 <= self.batch_price <= 1 or self.batch_poll_s <= 0:
            raise UserError("judge.batch_price: from 0 to 1; judge.batch_poll_s: above 0")
        if self.mode not in ("strict", "checklist", "official", "loomvideo"):
            raise UserError(f"judge.mode={self.mode}: use strict, checklist, official or loomvideo")


@dataclass
class EvaluateConfig:
    """One evaluation of one checkpoint on some suites."""

    run: str = option("", "run name; the same name continues the run; empty makes a new one from the time")
    runs: str = option("runs", "folder of all runs; on a cluster, shared storage")
    checkpoint: str = option("", CHECKPOINT_KEY)
    generator: str = option("model", "model, identity (the source copied) or blend (target and source, for trying out)")
    suites: list[str] = option(["sample"], "what to run: sample, fashion, openve, refvie, imgedit, geneval, …")
    data: dict[str, str] = option({}, "suite to the folder of its download (data.openve=…)")
    limit: int = option(0, "most samples a suite, taken from its categories in turn; 0 for all")
    samples_per_prompt: int = option(1, "results a prompt; 0 for the official number (GenEval 4, VBench 5 or 25)")
    allow_missing: bool = option(False, "go on when input files of a suite are not on disk; they count as failed")
    seed: int = option(0, "base of the samples' seeds")
    identity: bool = option(True, "also measure the source copied, as a baseline")
    controls: bool = option(False, "also make edits with another instruction and without their source, as controls")
    learned: list[str] = option(
        [], "metrics with weights: clip, dino and lite (with KID), fvd, lpips, stlpips, nsfw, pyiqa-NAME"
    )
    learned_actors: int = option(1, "actors that keep the networks of learned metrics")
    learned_gpus: float = option(0.0, "GPUs of each of them")
    learned_cpus: float = option(1.0, "CPUs of each of them")
    learned_weights: dict[str, str] = option({}, "metric to the folder or file of its network (learned_weights.fvd=…)")
    store: str = option("", "where results are kept by content; empty for evaluation-store in the runs folder")
    compare_with: str = option(
        "", "evaluation run (evaluate/NAME, NAME or its folder) beside this one on the review page"
    )
    step: int = option(0, "training step of a probe; its metrics are logged at it")
    max_films: int = option(100, "samples a suite whose films are uploaded to MLflow; 0 for all")
    scorers: dict[str, str] = option(
        {}, "suite to the command of its outside scorer, with {results}, {output}, {data} and {dimensions}"
    )
    scorer_gpus: float = option(0.0, "GPUs of an outside scorer")
    external: dict[str, str] = option({}, "suite to the result file of its outside scorer (external.vbench=…)")
    tracking_uri: str = option("", "MLflow; empty takes MLFLOW_TRACKING_URI, else a sqlite store in the runs folder")
    inputs: InputsConfig = option(InputsConfig, "")
    generation: GenerationConfig = option(GenerationConfig, "")
    judge: SuiteJudgeConfig = option(SuiteJudgeConfig, "")

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        if not self.suites:
            raise UserError("suites: name at least one, such as suites=[sample]")
        if self.generator not in ("model", "identity", "blend"):
            raise UserError(f"generator={self.generator}: use model, identity or blend")
        if self.generation.prompts not in ("training", "published"):
            raise UserError(f"generation.prompts={self.generation.prompts}: use training or published")
        if self.learned_actors < 1:
            raise UserError(f"learned_actors={self.learned_actors}: at least 1")
        if self.samples_per_prompt < 0:
            raise UserError(f"samples_per_prompt={self.samples_per_prompt}: at least 0")
        for suite, command in self.scorers.items():
            for needed in ("{results}", "{output}"):
                if needed not in command:
                    raise UserError(f"scorers.{suite}: the command names no {needed}, where the scorer reads or writes")
        self.judge.check()
