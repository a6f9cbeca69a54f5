"""The frozen Qwen3-VL that conditions the DiT layer by layer.

DiT block i reads the output of decoder layer ``i + (MLLM layers - DiT blocks)``, without the final norm. The first
layers, where Qwen adds its vision features ("deepstack") to the output, count with that addition, as the published code
computes them; with 36 layers and 30 blocks none of them is read. Only the states read are kept; the language head is
never loaded. Pictures that several prompts of a call share pass the vision tower once.
"""

import hashlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loomvideo.model.conditioning.config import MLLMConfig, ProcessorConfig
from loomvideo.model.conditioning.inputs import MLLMInputs, read_processor_config
from loomvideo.model.conditioning.random_weights import RECIPE_VERSION, random_model
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.fingerprints import folder_fingerprint
from loomvideo.platform.errors import UserError

if TYPE_CHECKING:
    from transformers import Qwen3VLModel

# Tokens that go through the decoder at once, padding among them.
MAX_BATCH_TOKENS = 8192


class FrozenMLLM:
    """Qwen3-VL without its head, giving the hidden states of the DiT-aligned layers.

    Attributes:
        tokenizer: Text to ids.
        processor: Patch geometry and size limits.
        hidden_size: Width of the states.
        num_states: Layers returned, one for each DiT block.
        fingerprint: Changes with whatever changes the states.
    """

    def __init__(
        self,
        model: "Qwen3VLModel",
        num_states: int,
        tokenizer: MLLMTokenizer,
        processor: ProcessorConfig,
        fingerprint: str,
    ):
        layers = model.config.text_config.num_hidden_layers
        if not 1 <= num_states <= layers:
            raise UserError(
                f"MLLM of {layers} layers cannot feed {num_states} DiT blocks: each reads a layer of its own"
            )
        if len(model.visual.deepstack_merger_list) > layers:
            raise UserError(f"MLLM of {layers} layers takes fewer vision features than its vision tower gives")
        self.model = model.eval().requires_grad_(False)
        self.num_states = num_states
        self.tokenizer = tokenizer
        self.processor = processor
        self.hidden_size = model.config.text_config.hidden_size
        self.fingerprint = f"{fingerprint}-last{num_states}"
        self.is_packed = False

    @classmethod
    def from_config(
        cls,
        config: MLLMConfig,
        num_states: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "FrozenMLLM":
        """The MLLM a configuration names, for a DiT of ``num_states`` blocks."""
        if config.kind == "qwen3_vl":
            if not config.folder:
                raise UserError("MLLM: set its folder to one with Qwen3-VL-8B-Instruct (config.json, *.safetensors, …)")
            return cls.from_pretrained(config.folder, num_states, device, dtype)
        tokenizer = MLLMTokenizer()
        model = random_model(config, tokenizer).to(device, dtype)
        sizes = json.dumps(asdict(config), sort_keys=True) + tokenizer.fingerprint + RECIPE_VERSION
        fingerprint = "random-" + hashlib.sha256(sizes.encode()).hexdigest()[:16]
        return cls(model, num_states, tokenizer, config.processor, fingerprint)

    @classmethod
    def of_size(
        cls, size: object, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "FrozenMLLM":
        """The MLLM of a model size (its ``mllm`` section), aligned with its DiT."""
        return cls.from_config(size.mllm, size.dit.num_layers, device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        num_states: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> "FrozenMLLM":
        """Load a Qwen3-VL folder: ``config.json``, safetensors, ``tokenizer.json``, ``preprocessor_config.json``.

        Raises:
            UserError: if a file or weight is missing, or a weight is not of a Qwen3-VL.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; give the folder of a Qwen3-VL model")
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
        if model_type != "qwen3_vl":
            raise UserError(f"{folder / 'config.json'}: model_type {model_type!r}; give the folder of a Qwen3-VL model")
        from loomvideo.model.conditioning.headless import HeadlessQwen3VL

        tokenizer, processor = MLLMTokenizer.from_pretrained(folder), read_processor_config(folder)
        try:
            model, report = HeadlessQwen3VL.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},  # straight to the device, no second copy in host memory
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them below
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: {str(error).splitlines()[0]}") from error
        for problem in ("missing", "unexpected", "mismatched"):
            keys = sorted(key if isinstance(key, str) else key[0] for key in report[f"{problem}_keys"])
            if keys:
                raise UserError(f"{folder}: {len(keys)} {problem} weights of a Qwen3-VL, first {keys[0]}")
        return cls(model, num_states, tokenizer, processor, folder_fingerprint(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def pack_prompts(self) -> None:
        """From now on let prompts share a row, one behind another: no token is padding.

        The same states up to rounding. Attention and rotary positions are each prompt's own.
        """
        from loomvideo.model.conditioning.packed_attention import PACKED

        for part in (self.model.language_model, self.model.visual):
            # Not by the library's own way, which takes "flash" for the name of a package to import.
            part.config._attn_implementation = PACKED
        self.is_packed = True

    @torch.no_grad()
    def encode(self, prompts: list[MLLMInputs], max_batch_tokens: int = MAX_BATCH_TOKENS) -> list[torch.Tensor]:
        """Hidden states ``[DiT blocks, tokens, hidden size]`` of each prompt, on the MLLM's device in its dtype.

        Prompts of similar length share a batch, padded on the right, where causal attention does not see it; or, after
        :meth:`pack_prompts`, prompts in their order share a row.

        Args:
            prompts: Any number.
            max_batch_tokens: Tokens in a batch, padding among them; one longer prompt goes alone.

        Raises:
            UserError: if the vision tokens of a prompt do not fit its pictures.
        """
        vision = self._encode_media(prompts)
        states: list[torch.Tensor | None] = [None] * len(prompts)
        cut = batches_in_order if self.is_packed else batches_by_length
        for batch in cut([prompt.num_tokens for prompt in prompts], max_batch_tokens):
            found = self._decode([prompts[index] for index in batch], [vision[index] for index in batch])
            for index, one in zip(batch, found, strict=True):
                states[index] = one
        return states

    def _encode_media(self, prompts: list[MLLMInputs]) -> list[torch.Tensor | None]:
        """Vision features ``[1 + deepstack layers, vision tokens, hidden size]`` of each prompt, in token order."""
        unique: dict[bytes, tuple[torch.Tensor, list[int]]] = {}
        wanted: list[tuple[list[bytes], list[bytes]]] = []
        for prompt in prompts:
            keys = ([], [])
            media = (prompt.pixel_values, prompt.image_grid_thw), (prompt.pixel_values_videos, prompt.video_grid_thw)
            for kind, (patches, grids) in enumerate(media):
                if patches is None:
                    continue
                for part, grid in zip(patches.split(grids.prod(1).tolist()), grids.tolist(), strict=True):
                    key = hashlib.sha256(repr(grid).encode() + _content(part)).digest()
                    unique.setdefault(key, (part, grid))
                    keys[kind].append(key)
            wanted.append(keys)
        if not unique:
            return [None] * len(prompts)
        features = self._tower([part for part, _ in unique.values()], [grid for _, grid in unique.values()])
        features = dict(zip(unique, features, strict=True))
        return [self._in_token_order(prompt, keys, features) for prompt, keys in zip(prompts, wanted, strict=True)]

    def _tower(self, parts: list[torch.Tensor], grids: list[list[int]]) -> list[torch.Tensor]:
        patches = torch.cat([part.to(self.device, self.model.dtype) for part in parts])
        output = self.model.visual(patches, grid_thw=torch.tensor(grids, device=self.device))
        stacked = torch.stack([output.pooler_output, *output.deepstack_features])
        merged = self.processor.merge_size**2
        return list(stacked.split([part.shape[0] // merged for part in parts], dim=1))

    def _in_token_order(
        self, prompt: MLLMInputs, keys: tuple[list[bytes], list[bytes]], features: dict[bytes, torch.Tensor]
    ) -> torch.Tensor | None:
        if not any(keys):
            return None
        config = self.model.config
        ids = prompt.input_ids.to(self.device)
        is_vision = (ids == config.image_token_id) | (ids == config.video_token_id)
        example = next(iter(features.values()))
        ordered = example.new_empty(len(example), int(is_vision.sum()), self.hidden_size)
        for token, name, own in ((config.image_token_id, "image", keys[0]), (config.video_token_id, "video", keys[1])):
            here = (ids == token)[is_vision]
            count = sum(features[key].shape[1] for key in own)
            if count != int(here.sum()):
                raise UserError(f"prompt has {int(here.sum())} {name} tokens for {count} merged {name} patches")
            if own:
                ordered[:, here] = torch.cat([features[key] for key in own], dim=1)
        return ordered

    def _decode(self, prompts: list[MLLMInputs], vision: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """States ``[DiT blocks, tokens, hidden size]`` of each prompt of a batch."""
        config, decoder = self.model.config, self.model.language_model
        lengths = [prompt.num_tokens for prompt in prompts]
        starts = [sum(lengths[:row]) for row in range(len(prompts))] if self.is_packed else [0] * len(prompts)
        rows = [0] * len(prompts) if self.is_packed else list(range(len(prompts)))
        places = [(row, slice(start, start + length)) for row, start, length in zip(rows, starts, lengths, strict=True)]
        shape = (1, sum(lengths)) if self.is_packed else (len(prompts), max(lengths))
        ids = torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros(3, *shape, dtype=torch.int64)
        for prompt, (row, columns) in zip(prompts, places, strict=True):
            ids[row, columns] = prompt.input_ids
            positions[:, row, columns] = prompt_positions(
                prompt.input_ids,
                [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist(),
                [] if prompt.video_grid_thw is None else prompt.video_grid_thw.tolist(),
                config.image_token_id,
                config.video_token_id,
                self.processor.merge_size,
            )
        is_vision = ((ids == config.image_token_id) | (ids == config.video_token_id)).to(self.device)
        shown = [features for features in vision if features is not None]
        added = torch.cat(shown, dim=1) if shown else None
        hidden = decoder.embed_tokens(ids.to(self.device))
        if added is not None:
            hidden[is_vision] = added[0].to(hidden.dtype)
        rotary = decoder.rotary_emb(hidden, positions.to(self.device))
        packing = self._packing(lengths) if self.is_packed else {}
        first = len(decoder.layers) - self.num_states
        states = []
        for index, layer in enumerate(decoder.layers):
            # No mask: attention is causal, and padding comes after every token that counts.
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, **packing)
            if added is not None and index + 1 < len(added):
                hidden[is_vision] += added[index + 1].to(hidden.dtype)
            if index >= first:
                states.append(hidden)
        outputs = torch.stack(states)
        return [outputs[:, row, columns].clone() for row, columns in places]

    def _packing(self, lengths: list[int]) -> dict[str, Any]:
        """Where the prompts of a row begin, as transformers names it."""
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)
        longest = max(lengths)
        return {
            "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip


def _content(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def batches_in_order(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in order, as many together as stay within ``max_tokens``."""
    batches: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if batches and tokens + length <= max_tokens:
            batches[-1].append(index)
            tokens += length
        else:
            batches.append([index])
            tokens = length
    return batches


def batches_by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length so that rows times the longest stays within ``max_tokens``."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Ascending order: the newest prompt is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def prompt_positions(
    input_ids: torch.Tensor,
    image_grids: list[list[int]],
    video_grids: list[list[int]],
    image_token: int,
    video_token: int,
    merge_size: int,
) -> torch.Tensor:
    """Multimodal rotary positions ``[3, tokens]`` of one prompt: where each token sits in (time, height, width).

    Text advances all three axes by one a token. The tokens of an image, or of one frame pair of a video, share the time
    at which they start and count rows and columns from it; text goes on after the longer of the two sides.

    Args:
        input_ids: ``[tokens]``.
        image_grids: ``(1, rows, columns)`` of patches, one for each image, in order.
        video_grids: ``(frame pairs, rows, columns)``, one for each video, in order.
        image_token: The id that stands for a merged image patch.
        video_token: The id that stands for a merged video patch.
        merge_size: Patches a side of a merged patch.
    """
    grids = {image_token: iter(image_grids), video_token: iter([g[1:] for g in video_grids for _ in range(g[0])])}
    ids = input_ids.tolist()
    positions, start, index = [], 0, 0
    while index < len(ids):
        if ids[index] in grids:
            rows, columns = (side // merge_size for side in next(grids[ids[index]])[-2:])
            row = torch.arange(rows).repeat_interleave(columns)
            column = torch.arange(columns).repeat(rows)
            positions.append(torch.stack([torch.zeros_like(row), row, column]) + start)
            start += max(rows, columns)
            index += rows * columns
        else:
            positions.append(torch.full((3, 1), start))
            start += 1
            index += 1
    return torch.cat(positions, dim=1)
