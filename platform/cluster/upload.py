"""What a submission may upload: small, without history, data or secrets, and refused by name when not."""

import fnmatch
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loomvideo.platform.cluster.validate import secrets_in
from loomvideo.platform.errors import UserError

EXCLUDED = (
    *(".git", ".hg", ".svn", ".venv", "venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"),
    *("node_modules", "build", "dist", "data", "runs", "mlruns", "mlartifacts", "*.egg-info", "*.pyc", "*.so"),
    *("*.tar", "*.zip", "*.mp4", "*.mov", "*.webm", "*.mkv", "*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt"),
    *("*.parquet", "*.db"),
)
SECRET_FILES = (".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", ".pgpass", "auth_token")
SHOWN = 10
SCANNED_BYTES = 1_000_000
MIB = 1024**2
COPY_ATTEMPTS = 3
CACHES = (".git", ".hg", ".svn", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "*.pyc")


@dataclass(frozen=True)
class ShippedFiles:
    """A folder's files that go along.

    Attributes:
        root: The folder.
        files: Paths relative to it, with their sizes in bytes.
        left_out: Files and folders that stay here, relative to it, but for caches that nobody misses.
    """

    root: Path
    files: tuple[tuple[Path, int], ...]
    left_out: tuple[Path, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size in self.files)

    def copy_to(self, folder: Path) -> None:
        """Copy the files; what is uploaded is then exactly what was checked.

        Raises:
            UserError: naming a file that is gone, that keeps changing, or that has become a secret meanwhile.
        """
        for relative, _ in self.files:
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_at_rest(self.root / relative, target)
            refuse_secret(target, target.stat().st_size)


def _copy_at_rest(source: Path, target: Path) -> None:
    """Copy a file that may be written to meanwhile: a copy counts when the file did not change under it."""
    for _ in range(COPY_ATTEMPTS):
        try:
            before = source.stat()
            shutil.copy2(source, target)
            after = source.stat()
        except FileNotFoundError as error:
            raise UserError(f"{source}: was removed while it was packed; submit again") from error
        if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            return
    raise UserError(f"{source}: changes while it is packed; stop what writes it, or move it out of the folder")


def plan_upload(root: Path, limit_bytes: int, excluded: Sequence[str] = ()) -> ShippedFiles:
    """Choose the files of a working directory.

    Args:
        root: The folder.
        limit_bytes: Largest size of all files.
        excluded: Name patterns to leave out besides :data:`EXCLUDED`.

    Raises:
        UserError: if the folder is missing, is too large (naming the largest files) or holds what looks like a secret.
    """
    if not root.is_dir():
        raise UserError(f"working directory {root}: not a folder")
    patterns = [*EXCLUDED, *excluded]
    files, left_out = [], []

    def goes_along(path: Path) -> bool:
        # A Python package called data or build is code, whatever folders of that name hold elsewhere.
        kept = not _matches(path.name, patterns) or (path / "__init__.py").is_file()
        if not kept and not _matches(path.name, CACHES):
            left_out.append(path.relative_to(root))
        return kept

    for folder, names, entries in os.walk(root):
        names[:] = sorted(name for name in names if goes_along(Path(folder) / name))
        for name in sorted(entries):
            path = Path(folder) / name
            if path.is_file() and goes_along(path):
                files.append((path.relative_to(root), path.stat().st_size))
    upload = ShippedFiles(root, tuple(files), tuple(left_out))
    if upload.num_bytes > limit_bytes:
        raise UserError(too_large(f"working directory {root}", upload.files, upload.num_bytes, limit_bytes))
    for relative, size in upload.files:
        refuse_secret(root / relative, size)
    return upload


def refuse_secret(path: Path, size: int) -> None:
    """Refuse a file that is named like a secret or reads like one.

    Raises:
        UserError: naming the file.
    """
    if _matches(path.name, SECRET_FILES):
        raise UserError(f"{path}: looks like a secret and would be readable by everyone on the cluster; move it away")
    if size <= SCANNED_BYTES:
        kinds = secrets_in(path.read_bytes().decode(errors="replace"))
        if kinds:
            raise UserError(f"{path}: holds what looks like a {kinds[0]}; use a Kubernetes secret instead")


def left_out_line(upload: ShippedFiles) -> str:
    """One line that names what stays here, empty when nothing does."""
    if not upload.left_out:
        return ""
    named = ", ".join(str(path) for path in upload.left_out[:SHOWN])
    more = f" and {len(upload.left_out) - SHOWN} more" if len(upload.left_out) > SHOWN else ""
    return f"{upload.root}: not sent along: {named}{more} (put data on shared storage; packages need an __init__.py)"


def too_large(what: str, files: Sequence[tuple[Path, int]], num_bytes: int, limit_bytes: int) -> str:
    """One line that names the largest files."""
    largest = sorted(files, key=lambda item: -item[1])[:SHOWN]
    named = ", ".join(f"{path} ({size / MIB:.1f} MiB)" for path, size in largest)
    return f"{what}: {num_bytes / MIB:.1f} MiB is over the limit of {limit_bytes / MIB:g} MiB; largest: {named}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
