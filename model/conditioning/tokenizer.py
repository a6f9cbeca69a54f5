"""Text to token ids: the built-in vocabulary, or the ``tokenizer.json`` of a Qwen3-VL folder."""

import hashlib
from pathlib import Path

import tokenizers

from loomvideo.model.conditioning.prompts import SPECIAL_TOKENS
from loomvideo.platform.errors import UserError

BUILTIN_FILE = Path(__file__).with_name("tokenizer.json")


class MLLMTokenizer:
    """A tokenizer with the special tokens of Qwen's chat and vision spans.

    Args:
        file: A ``tokenizer.json``; the built-in vocabulary when left out.

    Raises:
        UserError: if the file is missing, unreadable or lacks a special token.
    """

    def __init__(self, file: Path | str = BUILTIN_FILE):
        file = Path(file)
        if not file.is_file():
            raise UserError(f"{file}: not found; a Qwen3-VL folder holds its vocabulary there")
        self._read(file.read_bytes(), str(file))

    def _read(self, content: bytes, file: str) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: not a tokenizer file ({str(error).splitlines()[0]})") from error
        missing = [token for token in SPECIAL_TOKENS if self.backend.token_to_id(token) is None]
        if missing:
            raise UserError(f"{file}: lacks the special token {missing[0]}; use the tokenizer of a Qwen3-VL model")
        self.backend.no_padding()
        self.backend.no_truncation()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "MLLMTokenizer":
        """The tokenizer of a Qwen3-VL folder."""
        return cls(Path(folder) / "tokenizer.json")

    @classmethod
    def from_text(cls, text: str, name: str) -> "MLLMTokenizer":
        """One whose file's content is at hand; ``name`` is what errors call it."""
        tokenizer = cls.__new__(cls)
        tokenizer._read(text.encode(), name)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens spelled out."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int:
        """The id of a special token."""
        return self.backend.token_to_id(token)
