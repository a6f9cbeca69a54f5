"""The safetensors format on byte ranges: written from tensor memory without a copy, read one tensor at a time.

The ``safetensors`` library reads what this writes and the reverse; it is not used here because it copies every tensor
into one buffer when saving and cannot open a file at an offset inside a tar.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import, and opening a dataset needs none
    import torch
    from torch import Tensor

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
HEADER_SIZE_BYTES = 8


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items()}


def serialized(tensors: Mapping[str, Tensor]) -> tuple[list[bytes | memoryview], int]:
    """The file content of ``tensors`` as chunks that share the tensors' memory, and its size in bytes.

    The order is fixed (largest element first, then name) and equal tensors give equal bytes.

    Raises:
        TypeError: for a dtype that safetensors does not know.
    """
    import torch

    dtype_names = {dtype: name for name, dtype in _dtypes().items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in dtype_names:
            raise TypeError(f"tensor {name!r}: safetensors has no dtype {tensor.dtype}")
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, position, data = {}, 0, []
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtype_names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + num_bytes],
        }
        position += num_bytes
        if num_bytes:
            data.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(HEADER_SIZE_BYTES, "little") + text
    return [head, *data], len(head) + position


def parse_header(text: bytes | bytearray | memoryview, num_bytes: int | None = None) -> Mapping[str, Mapping]:
    """``{name: {dtype, shape, data_offsets}}`` from the JSON part of a file; offsets count from its end.

    Args:
        text: The JSON part.
        num_bytes: How many bytes follow it, when that is known.

    Raises:
        ValueError: if it is none, or describes what cannot be there.
    """
    return _parsed_header(bytes(text), num_bytes)


# Samples of one shape have one header: most of a dataset's are among the last thousand.
@functools.lru_cache(1024)
def _parsed_header(text: bytes, num_bytes: int | None) -> Mapping[str, Mapping]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            size = math.prod(entry["shape"]) * _dtypes()[entry["dtype"]].itemsize
            if min([begin, *entry["shape"]]) < 0 or end - begin != size or (num_bytes is not None and end > num_bytes):
                raise ValueError(f"tensor {name!r} does not fit its place")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"no safetensors header: {error}") from error
    return MappingProxyType(header)


def tensor_from(entry: Mapping, data: bytearray | memoryview) -> Tensor:
    """A tensor that shares the memory of ``data``, the bytes of one header entry, which must be writable."""
    import torch

    dtype = _dtypes()[entry["dtype"]]
    if not len(data):
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(*entry["shape"] or ((),))


def parse(data: bytearray | bytes | memoryview) -> dict[str, Tensor]:
    """All tensors of a file in memory, which they share where it is writable.

    Raises:
        ValueError: if it is none.
    """
    view = memoryview(data)
    if view.readonly:
        view = memoryview(bytearray(data))
    start = HEADER_SIZE_BYTES + int.from_bytes(view[:HEADER_SIZE_BYTES], "little")
    header = parse_header(view[HEADER_SIZE_BYTES:start], len(view) - start)
    places = ((name, entry, entry["data_offsets"]) for name, entry in header.items())
    return {name: tensor_from(entry, view[start + begin : start + end]) for name, entry, (begin, end) in places}
