"""What the caption stage can be told."""

import importlib.util
from dataclasses import dataclass

from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

BACKENDS = ("existing", "openai", "transformers", "vllm")
MODES = ("caption", "fashion", "instruction")


@dataclass
class CaptionOptions:
    """How texts of samples are made."""

    backend: str = option(
        "existing",
        "existing: keep what there is; openai: a compatible server; transformers or vllm: in the Ray cluster",
    )
    mode: str = option("fashion", "caption: a sentence; fashion: attributes and a sentence; instruction: of an edit")
    model: str = option("Qwen/Qwen3-VL-8B-Instruct", "model on the server or for vllm; a folder for transformers")
    base_url: str = option("http://localhost:8000/v1", "the server's address, for example vLLM's")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable with the server's key")
    overwrite: bool = option(False, "make texts for samples that have one")
    cache: str = option("data/captions", "folder of answers already paid for")
    concurrency: int = option(8, "requests at a time, of each actor")
    per_minute: float = option(0.0, "requests started a minute at most, by all actors together; 0: no limit")
    max_attempts: int = option(5, "calls before a failure counts")
    timeout_s: float = option(120.0, "seconds before a call is given up")
    max_tokens: int = option(1024, "tokens of an answer at most")
    verify: bool = option(
        False, "instruction: ask again, whether it leads from source to target; others have the reason `not_verified`"
    )
    wordings: int = option(
        0, "other wordings of each text that are asked for with it, from a few words to several sentences; 0 to 8"
    )
    input_usd: float = option(0.0, "price of a million input tokens, for the estimate before the first question")
    output_usd: float = option(0.0, "price of a million output tokens")
    budget_usd: float = option(0.0, "an estimate above it ends the command before the first question; 0: no limit")
    num_frames: int = option(8, "frames of a video that are shown")
    max_side: int = option(768, "longer side of the frames shown")

    def check(self) -> None:
        """Raise UserError for values that mean nothing."""
        for key, value, valid in (("backend", self.backend, BACKENDS), ("mode", self.mode, MODES)):
            if value not in valid:
                raise UserError(f"captions.{key}={value}: choose one of {', '.join(valid)}")
        if not 0 <= self.wordings <= 8:
            raise UserError(f"captions.wordings={self.wordings}: 0 to 8")
        if self.verify and self.mode != "instruction":
            raise UserError(f"captions.verify=true: is about instructions, not captions.mode={self.mode}; leave it out")
        if min(self.input_usd, self.output_usd, self.budget_usd) < 0:
            raise UserError("captions: input_usd, output_usd and budget_usd must be at least 0")
        if self.budget_usd and not self.input_usd + self.output_usd:
            raise UserError("captions.budget_usd: needs captions.input_usd and output_usd, the prices of the model")
        if min(self.concurrency, self.max_attempts, self.num_frames) < 1:
            raise UserError("captions: concurrency, max_attempts and num_frames must be at least 1")
        if self.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError(
                "captions.backend=vllm: vllm is not installed; pip install vllm here and on the GPU nodes, or use "
                "captions.backend=openai with the address of a vLLM server, or captions.backend=transformers"
            )


@dataclass
class CaptionWorkers:
    """Ray actors that hold a model, or that decode and ask a server (``openai`` in ``data prepare``)."""

    count: int = option(1, "actors at most; 0: as many as the cluster has, or gets, room for (`data prepare`)")
    gpus: float = option(1.0, "GPUs an actor reserves (transformers)")
    cpus: float = option(1.0, "CPUs an actor reserves")
