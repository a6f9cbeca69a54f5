"""The vocabulary of the tiny and small models: byte-level BPE in which the fashion words are one token each.

``tokenizer.json`` beside this file is what :func:`build` makes; it is shipped so that token ids never depend on the
version of the library that trains it. ``python -m loomvideo.model.conditioning.vocabulary`` writes it anew.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from loomvideo.model.conditioning.prompts import SPECIAL_TOKENS

TOKENIZER_FILE = Path(__file__).with_name("tokenizer.json")

WORDS_FILE = Path(__file__).with_name("words.txt")

# As in Qwen's tokenizer: words with the space before them, digits one by one, runs of punctuation and white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# How tasks began when the vocabulary was made. A later task is spelled in the tokens there are: its own would move the
# ids that shards hold and weights know.
OPENINGS = (
    "Generate an image: ", "Generate a video: ", "Edit this image: ", "Edit this video: ",
    "Edit this video with reference images: ", "Generate an image with reference images: ",
    "Generate a video with reference images: ", "Reconstruct this image: ", "Reconstruct this video: ",
)  # fmt: skip


def build() -> Tokenizer:
    """Train until every word of ``words.txt``, bare, after a space and capitalised, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = sorted(set(WORDS_FILE.read_text(encoding="utf-8").split()))
    lines = [form for word in words for form in (word, " " + word, word.capitalize())]
    lines += [" seconds>", *OPENINGS]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


if __name__ == "__main__":
    TOKENIZER_FILE.write_text(build().to_str(pretty=False) + "\n", encoding="utf-8")
