"""The configuration of ``loomvideo generate``."""

from dataclasses import dataclass

from loomvideo.platform.config import option


@dataclass
class GenerateConfig:
    """One generation, or a batch of them."""

    task: str = option("", "t2i, t2v, edit, ref_edit or mi2v (edit is of a video or a picture, as the source is)")
    prompt: str = option("", "instruction or caption")
    out: str = option("", "file to write: .mp4 for videos, .png or .webp for pictures")
    source: str = option("", "video or picture to edit")
    refs: list[str] = option([], "reference pictures")
    negative_prompt: str = option("", "what the unconditional branch is told")
    seed: int = option(0, "seed of the noise; the same seed gives the same file")
    batch: str = option("", "JSONL file with task, prompt, out, source, refs, seed a line; done ones are kept")
    checkpoint: str = option("", "JOB/NAME of a run, a weights folder or gen_model.pth; empty takes the newest run")
    runs: str = option("runs", "folder of all runs")
    model: str = option("tiny", "model preset of the checkpoint: tiny, small or 5b")
    codec_folder: str = option("", "folder of the codec's weights, for presets that need one")
    mllm_folder: str = option("", "folder of the MLLM, for presets that need one")
    buckets: list[int] = option([640], "resolution classes for sources and references")
    width: int = option(0, "width; 0 takes the source's bucket, or the preset's size")
    height: int = option(0, "height")
    default_size: list[int] = option([832, 480], "width and height where neither a source nor width and height say")
    num_frames: int = option(97, "frames of a video, at most the source's; 4k+1")
    steps: int = option(50, "denoising steps")
    scale: float | None = option(None, "guidance scale; null takes the task's (2.5 for edits, 5 otherwise)")
    visual_scale: float | None = option(None, "guidance scale of media; null takes 1.5")
    batch_branches: bool = option(False, "run the guidance branches in one pass: faster for small videos, more memory")
    workers: int = option(1, "batch: pipelines in parallel")
    gpus: float = option(0.0, "batch: GPUs a pipeline")
