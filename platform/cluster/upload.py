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


@dataclass(frozen=True)
class Upload:
    """A folder's files that go along.

    Attributes:
        root: The folder.
        files: Paths relative to it, with their sizes in bytes.
    """

    root: Path
    files: tuple[tuple[Path, int], ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size in self.files)

    def copy_to(self, folder: Path) -> None:
        """Copy the files; what is uploaded is then exactly what was checked."""
        for relative, _ in self.files:
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / relative, target)


def plan_upload(root: Path, limit_bytes: int, excluded: Sequence[str] = ()) -> Upload:
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
    files = []
    for folder, names, entries in os.walk(root):
        names[:] = sorted(name for name in names if not _matches(name, patterns))
        for name in sorted(entries):
            path = Path(folder) / name
            if not _matches(name, patterns) and path.is_file():
                files.append((path.relative_to(root), path.stat().st_size))
    upload = Upload(root, tuple(files))
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


def too_large(what: str, files: Sequence[tuple[Path, int]], num_bytes: int, limit_bytes: int) -> str:
    """One line that names the largest files."""
    largest = sorted(files, key=lambda item: -item[1])[:SHOWN]
    named = ", ".join(f"{path} ({size / MIB:.1f} MiB)" for path, size in largest)
    return f"{what}: {num_bytes / MIB:.1f} MiB is over the limit of {limit_bytes / MIB:g} MiB; largest: {named}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
