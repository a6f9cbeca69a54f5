"""Names for the weights that encoded something, so that features of one model never reach another."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

# Whole files up to this size; of larger ones the size and evenly spaced pieces.
WHOLE_FILE_BYTES = 1 << 26
PIECES, PIECE_BYTES = 64, 1 << 14


def folder_fingerprint(folder: Path | str, suffixes: tuple[str, ...] = (".json", ".safetensors")) -> str:
    """16 hex digits over the names and content of a weights folder.

    Files over 64 MiB are sampled (64 pieces of 16 KiB and the size), which tells checkpoints apart in a second.
    """
    return _fingerprint(path for path in Path(folder).iterdir() if path.suffix in suffixes and path.is_file())


def weights_fingerprint(weights: Path | str) -> str:
    """:func:`folder_fingerprint` of a weights folder, or the same of a single file such as ``gen_model.pth``."""
    weights = Path(weights)
    return (
        folder_fingerprint(weights, (".json", ".safetensors", ".pth")) if weights.is_dir() else _fingerprint([weights])
    )


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE_FILE_BYTES:
                digest.update(content.read())
                continue
            for piece in range(PIECES):
                content.seek(piece * (size - PIECE_BYTES) // (PIECES - 1))
                digest.update(content.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
