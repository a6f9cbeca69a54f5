"""Model sizes as data: ``tiny`` for CPUs, ``small`` for one GPU or a long CPU run, ``5b`` as published."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loomvideo.model.codec import CodecConfig, LatentGrid
from loomvideo.model.conditioning.config import MLLMConfig, ProcessorConfig, VisionConfig
from loomvideo.model.config import DiTConfig
from loomvideo.model.guidance import Guidance
from loomvideo.model.sampler import SchedulerConfig
from loomvideo.model.tasks import wording
from loomvideo.platform.errors import UserError

# The built-in vocabulary of 3,242 tokens, rounded up.
BUILTIN_VOCAB_SIZE = 3_264


PIPELINE_FILE = "pipeline.json"
"""Beside exported weights: which model size's codec and MLLM they were trained with."""
ENCODERS_KEY = "encoders"
"""The fingerprints of that codec and MLLM."""
LEFT_OUT_KEY = "left_out"
"""Its tasks that the training's mixture gave no weight."""


PUBLISHED_NEGATIVE_PROMPT = (
    "Oversaturated colors, overexposure, static, blurry details, subtitles, stylized, artwork, painting, still frame, "
    "overall gray tone, worst quality, low quality, JPEG artifacts, ugly, incomplete, extra fingers, poorly drawn "
    "hands, poorly drawn face, deformed, disfigured, malformed limbs, fused fingers, static frame, "
    "cluttered background, three legs, crowded background, walking backwards"
)
"""With which the published model is evaluated (``configs/evaluation/evaluation.yaml`` of its repository)."""


@dataclass(frozen=True)
class ModelSize:
    """One size of the whole model."""

    name: str
    dit: DiTConfig
    codec: CodecConfig
    mllm: MLLMConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    generate_scheduler: SchedulerConfig | None = None
    """Of tasks without a source; None for the same."""
    negative_prompt: str | None = None
    """What the unconditional branch is told by default; None for the empty message of guidance dropout."""
    edit_guidance: Guidance | None = None
    """Scales of tasks with a source where nobody says; None for the published ones."""
    generate_guidance: Guidance | None = None
    """Those of tasks without."""

    @property
    def grid(self) -> LatentGrid:
        """How its codec and its transformer's patches divide pixels and frames."""
        return LatentGrid.of(self.codec, self.dit.patch_size)

    def guidance(self, task: str) -> Guidance:
        """The scales of a task where nobody says.

        Raises:
            UserError: if there is no such task.
        """
        found, default = wording(task), Guidance.default(task)
        own = self.edit_guidance if found.needs_source else self.generate_guidance
        return default if own is None else Guidance(own.scale, own.visual_scale if found.has_media else None)

    def sampling_notes(self) -> dict[str, dict[str, float]]:
        """Where it departs from the published sampling, for folders that others open.

        Returns:
            ``scale``, ``visual_scale``, ``flow_shift`` by ``edit`` and ``generate``: tasks with a source and without.
        """
        notes: dict[str, dict[str, float]] = {}
        for kind, own in (("edit", self.edit_guidance), ("generate", self.generate_guidance)):
            if own is not None:
                notes[kind] = {name: value for name, value in dataclasses.asdict(own).items() if value is not None}
        if self.generate_scheduler is not None:
            notes.setdefault("generate", {})["flow_shift"] = self.generate_scheduler.flow_shift
        return notes


def _tiny() -> ModelSize:
    mllm = MLLMConfig(
        num_hidden_layers=6,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mrope_section=(8, 4, 4),
        vocab_size=BUILTIN_VOCAB_SIZE,
        rope_theta=10_000.0,
        # Its random weights see nothing: one token of a picture, so that words are not lost among them.
        processor=ProcessorConfig(image_min_pixels=1_024, image_max_pixels=1_024, video_max_pixels=4_096),
        vision=VisionConfig(
            depth=3,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            num_position_embeddings=256,
            deepstack_visual_indexes=(0, 1, 2),
        ),
    )
    dit = DiTConfig(
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        ffn_dim=384,
        # Of the learned codec: 32 of the picture, 3 of what stands where.
        in_channels=35,
        mllm_dim=mllm.hidden_size,
        freq_dim=32,
        # Noise and source of one latent take half of the width: the blocks need not write over them.
        patch_size=(1, 1, 1),
    )
    codec = CodecConfig(kind="learned", latent_channels=dit.in_channels, spatial_stride=8)
    # Steps where its presets train, the last from much noise: what is left to less noise is little.
    scheduler = SchedulerConfig(flow_shift=60.0)
    # From words alone a picture is decided where less noise is left.
    generate_scheduler = SchedulerConfig(flow_shift=16.0)
    guidance = {"edit_guidance": Guidance(1.0, 1.0), "generate_guidance": Guidance(2.0, 1.0)}
    return ModelSize("tiny", dit, codec, mllm, scheduler, generate_scheduler, **guidance)


def _small() -> ModelSize:
    mllm = MLLMConfig(
        num_hidden_layers=12,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        mrope_section=(16, 8, 8),
        vocab_size=BUILTIN_VOCAB_SIZE,
        rope_theta=10_000.0,
        processor=ProcessorConfig(image_min_pixels=16_384),
        vision=VisionConfig(
            depth=6,
            hidden_size=256,
            intermediate_size=1024,
            num_heads=4,
            num_position_embeddings=1024,
            deepstack_visual_indexes=(1, 3, 5),
        ),
    )
    dit = DiTConfig(
        num_layers=10,
        num_attention_heads=12,
        attention_head_dim=64,
        ffn_dim=3072,
        in_channels=48,
        mllm_dim=mllm.hidden_size,
    )
    return ModelSize("small", dit, CodecConfig(latent_channels=dit.in_channels), mllm)


def _5b() -> ModelSize:
    mllm = MLLMConfig(
        num_hidden_layers=36,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        mrope_section=(24, 20, 20),
        kind="qwen3_vl",
        vision=VisionConfig(
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            num_heads=16,
            num_position_embeddings=2304,
            deepstack_visual_indexes=(8, 16, 24),
        ),
    )
    dit = DiTConfig(
        num_layers=30,
        num_attention_heads=24,
        attention_head_dim=128,
        ffn_dim=14336,
        in_channels=48,
        mllm_dim=mllm.hidden_size,
    )
    codec = CodecConfig(kind="wan", latent_channels=dit.in_channels)
    return ModelSize("5b", dit, codec, mllm, negative_prompt=PUBLISHED_NEGATIVE_PROMPT)


_SIZES = {"tiny": _tiny, "small": _small, "5b": _5b}
SIZES = tuple(_SIZES)
PUBLISHED = "5b"
"""The size of the published weights."""


def model_size(name: str) -> ModelSize:
    """A model size by name.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in _SIZES:
        raise UserError(f"model={name}: unknown; choose one of {', '.join(SIZES)}")
    return _SIZES[name]()


def with_folders(model: ModelSize, codec_folder: str, mllm_folder: str) -> ModelSize:
    """The model with the weights of its codec and MLLM looked for in the given folders; empty keeps its own."""
    codec = dataclasses.replace(model.codec, folder=codec_folder or model.codec.folder)
    mllm = dataclasses.replace(model.mllm, folder=mllm_folder or model.mllm.folder)
    return dataclasses.replace(model, codec=codec, mllm=mllm)


def stated_note(weights: str | Path) -> dict[str, Any]:
    """What an exported weights folder says of itself; nothing where it says nothing."""
    note = Path(weights) / PIPELINE_FILE
    return json.loads(note.read_text()) if note.is_file() else {}


def stated_size(weights: str | Path) -> str | None:
    """The model size that an exported weights folder says it belongs to; None where it says nothing."""
    note = stated_note(weights)
    return note["model"] if note else None


def stated_left_out(weights: str | Path) -> frozenset[str]:
    """The tasks that an exported weights folder's training left out of its mixture; none where it says nothing."""
    return frozenset(stated_note(weights).get(LEFT_OUT_KEY, ()))
