"""The project's code as a wheel for ``py_modules``: no dependencies, a name that follows from its content.

Ray installs a shipped wheel with ``pip install --target`` on every node and tells wheels apart by file name only.
Dependencies are therefore taken out (they are in the image; each node would fetch torch again), and the version ends in
a digest of the content, so that changed code is never mistaken for what a node already has.
"""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from loomvideo.platform.errors import UserError

ROOMS = ("platform", "model", "pipelines", "jobs")
FILES = ("pyproject.toml", "LICENSE", "README.md")
IGNORED = ("__pycache__", "*.pyc", "*.so", "*.egg-info")
# The earliest time a zip entry can have: the archive depends on the content alone.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class CodeWheel:
    """A built wheel.

    Attributes:
        path: The file.
        digest: Digest of its content, also the end of its version.
    """

    path: Path
    digest: str


def build_wheel(root: Path, output: Path) -> CodeWheel:
    """Build the wheel of a checkout; the same sources give the same file.

    Args:
        root: The checkout.
        output: Folder for the wheel; wheels of other code in it are left alone.

    Raises:
        UserError: if ``root`` is no checkout, or the build fails (with its last line).
    """
    if not (root / "pyproject.toml").is_file():
        raise UserError(f"{root.absolute()}/pyproject.toml: not found; run from a checkout or use --code image")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # A copy, because setuptools puts stale files of an earlier build/ into the wheel.
        source = Path(scratch) / "source"
        source.mkdir()
        for room in ROOMS:
            shutil.copytree(root / room, source / room, ignore=shutil.ignore_patterns(*IGNORED))
        for name in FILES:
            if (root / name).is_file():
                shutil.copy2(root / name, source / name)
            elif name == "README.md":
                (source / name).write_text("")
        built = _run_backend(source, Path(scratch) / "wheel")
        return _repack(built, output)


def _run_backend(source: Path, folder: Path) -> Path:
    folder.mkdir()
    code = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"pyproject.toml: the wheel does not build: {result.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("*.whl"))


def _repack(built: Path, output: Path) -> CodeWheel:
    name, version, *tags = built.stem.split("-")
    old_info = f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(built) as archive:
        content = {entry: archive.read(entry) for entry in sorted(archive.namelist())}
    del content[f"{old_info}RECORD"]
    metadata = content[f"{old_info}METADATA"].decode()
    content[f"{old_info}METADATA"] = re.sub(r"(?m)^(Requires-Dist|Provides-Extra): .*\n", "", metadata).encode()
    digest = hashlib.sha256()
    for entry, data in content.items():
        digest.update(f"{entry}\0{len(data)}\0".encode() + data)
    code = digest.hexdigest()[:12]
    new_version = f"{version}+{code}"
    info = f"{name}-{new_version}.dist-info/"
    content = {entry.replace(old_info, info, 1): data for entry, data in content.items()}
    content[f"{info}METADATA"] = re.sub(
        rb"(?m)^Version: .*$", f"Version: {new_version}".encode(), content[f"{info}METADATA"], count=1
    )
    content[f"{info}RECORD"] = _record(content, f"{info}RECORD").encode()
    path = output / "-".join([name, new_version, *tags])
    path = path.with_name(f"{path.name}.whl")
    partial = path.with_suffix(".tmp")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in content.items():
            member = zipfile.ZipInfo(entry, ZIP_TIME)
            member.external_attr = 0o644 << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    partial.replace(path)
    return CodeWheel(path, code)


def _record(content: dict[str, bytes], own_name: str) -> str:
    lines = []
    for entry, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{entry},sha256={digest},{len(data)}")
    return "\n".join([*lines, f"{own_name},,"]) + "\n"
