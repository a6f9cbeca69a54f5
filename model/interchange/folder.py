"""Folders that diffusers opens: one component a subfolder, and ``model_index.json``."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.conditioning.tokenizer import BUILTIN_FILE
from loomvideo.model.few_steps import FEW_STEPS_KEY
from loomvideo.model.interchange.components import EmbeddedCodec, LoomVideoTransformer3DModel
from loomvideo.model.interchange.parts import COMPONENTS, processor_values
from loomvideo.model.sizes import LEFT_OUT_KEY, PIPELINE_FILE, ModelSize, stated_note
from loomvideo.model.weights import load_dit
from loomvideo.platform.errors import UserError, full_disk_named

PIPELINE_CLASS = "LoomVideoDiffusionPipeline"
LOADER = "loomvideo_pipeline"
"""Module in the folder that diffusers runs, with the reader's consent, to find :data:`PIPELINE_CLASS`."""
INDEX_FILE = "model_index.json"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
SHARD_SIZE = "5GB"


def write_folder(
    weights: str | Path,
    size: ModelSize,
    output: Path,
    dtype: torch.dtype | None = None,
    allow: Sequence[str] = (),
) -> LoomVideoTransformer3DModel:
    """Write a checkpoint with its codec and MLLM as a diffusers folder.

    Files of a codec and an MLLM that lie in folders are linked where the file system can, else copied.

    Args:
        weights: See :func:`loomvideo.model.stored_weights.open_checkpoint`.
        size: Its model size, with the folders of codec and MLLM filled in.
        output: The folder, new or empty.
        dtype: The type of the transformer's weights; None keeps them.
        allow: Patterns of keys that the checkpoint may lack or have beside; see
            :func:`loomvideo.model.weights.load_dit`.

    Raises:
        UserError: if the folder holds something, or a folder that the size needs is missing.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: already holds files; name a new folder")
    for kind, key, folder in ((size.codec.kind == "wan", "codec_folder", size.codec.folder),
                              (size.mllm.kind == "qwen3_vl", "mllm_folder", size.mllm.folder)):  # fmt: skip
        if kind and not Path(folder or "/nowhere").is_dir():
            raise UserError(f"{key}={folder}: format=diffusers writes the whole model; name the folder of its files")
    transformer = LoomVideoTransformer3DModel.from_dit(load_dit(weights, size.dit, dtype=dtype, allow=allow))
    output.mkdir(parents=True, exist_ok=True)
    with full_disk_named(output):
        _write_parts(transformer, size, output, stated_note(weights))
    return transformer


def _write_parts(
    transformer: LoomVideoTransformer3DModel, size: ModelSize, output: Path, note: Mapping[str, Any]
) -> None:
    transformer.save_pretrained(output / COMPONENTS["dit"], max_shard_size=SHARD_SIZE)
    size.scheduler.scheduler().save_pretrained(output / "scheduler")
    index = {
        "transformer": [LoomVideoTransformer3DModel.__module__, LoomVideoTransformer3DModel.__name__],
        "vae": _write_codec(size, output / COMPONENTS["codec"]),
        "text_encoder": ["transformers", "Qwen3VLModel"],
        "tokenizer": ["transformers", TOKENIZER_CLASS],
        "scheduler": ["diffusers", type(size.scheduler.scheduler()).__name__],
        "processor": processor_values(_write_mllm(size, output)),
        "negative_prompt": size.negative_prompt,
        "few_steps": note.get(FEW_STEPS_KEY),
        "sampling": size.sampling_notes() or None,
    }
    kept = {key: note[key] for key in (FEW_STEPS_KEY, LEFT_OUT_KEY) if key in note}
    (output / PIPELINE_FILE).write_text(json.dumps({"model": size.name, **kept}, indent=2) + "\n")
    declare_pipeline(output, index)


def declare_pipeline(folder: Path, index: dict[str, Any]) -> None:
    """Write ``model_index.json`` and the module that it names."""
    loader = f"from loomvideo.model.interchange.pipeline import {PIPELINE_CLASS}\n\n__all__ = ['{PIPELINE_CLASS}']\n"
    (folder / f"{LOADER}.py").write_text(loader)
    own = {name: value for name, value in index.items() if not name.startswith("_")}
    stated = {**own, "_class_name": [LOADER, PIPELINE_CLASS], "_diffusers_version": diffusers.__version__}
    partial = folder / f"{INDEX_FILE}.partial"
    partial.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / INDEX_FILE)


def _write_codec(size: ModelSize, folder: Path) -> list[str]:
    """The codec's files; where its class is."""
    if size.codec.kind == "wan":
        source = Path(size.codec.folder)
        _link(source / "vae" if (source / "vae" / "config.json").is_file() else source, folder)
        return ["diffusers", "AutoencoderKLWan"]
    EmbeddedCodec(dataclasses.asdict(size.codec)).save_pretrained(folder)
    return [EmbeddedCodec.__module__, EmbeddedCodec.__name__]


def _write_mllm(size: ModelSize, output: Path) -> Any:
    """The MLLM's files and its tokenizer's; its processor's settings."""
    folder, tokenizer = output / COMPONENTS["mllm"], output / "tokenizer"
    tokenizer.mkdir()
    if size.mllm.kind == "qwen3_vl":
        from loomvideo.model.conditioning.inputs import read_processor_config

        _link(Path(size.mllm.folder), folder)
        shutil.copy2(folder / "tokenizer.json", tokenizer / "tokenizer.json")
        processor = read_processor_config(folder)
    else:
        mllm = FrozenMLLM.of_size(size)
        mllm.model.save_pretrained(folder)
        shutil.copy2(BUILTIN_FILE, tokenizer / "tokenizer.json")
        processor = mllm.processor
    stated = {"tokenizer_class": TOKENIZER_CLASS, "clean_up_tokenization_spaces": False}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(stated, indent=2) + "\n")
    return processor


def _link(source: Path, target: Path) -> None:
    """The files of a folder under another name, without a second copy where the file system can."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not file.is_file():
            continue
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:  # another file system
            shutil.copy2(file, target / file.name)
