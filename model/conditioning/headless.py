"""Qwen3-VL as its files are read: transformers take seconds to import, so who loads one imports this late."""

from transformers import Qwen3VLModel


class HeadlessQwen3VL(Qwen3VLModel):
    """For loading: the language head of the files is left out, anything else unexpected is reported."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)
