"""Compiled artefacts, built once a node and shared between nodes.

An artefact is a small folder of files that one machine compiled and others of its kind can load: a kernel
library. It is looked for in this order: prebuilt folders of the image, the node's cache, shared storage; else it is
built, put into the cache by an atomic rename and published to shared storage. Only a build (or a download) takes
the lock, which is a ``flock``: the kernel drops it when its owner dies, however it dies, and nobody has to clean up.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import fsspec

from loomvideo.platform.errors import UserError, full_disk_named
from loomvideo.platform.folders import give_name

logger = logging.getLogger(__name__)

MANIFEST = "artifact.json"
CACHE_VARIABLE = "LOOMVIDEO_KERNEL_CACHE"
PREBUILT_VARIABLE = "LOOMVIDEO_KERNEL_PREBUILT"
SHARED_VARIABLE = "LOOMVIDEO_KERNEL_SHARED"
LOCK_TIMEOUT_VARIABLE = "LOOMVIDEO_KERNEL_LOCK_TIMEOUT_S"


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ArtifactKey:
    """What an artefact depends on.

    Attributes:
        name: The name of the artefact.
        source: Digest of sources and compiler flags.
        target: What a machine must have to load it (processor, C library, torch, GPU architecture).
        compiler: Identity of the compiler, or None on a machine without one, which can load what others built.
    """

    name: str
    source: str
    target: Mapping[str, str]
    compiler: str | None

    @property
    def family(self) -> str:
        """Folder name without the compiler."""
        return f"{self.name}-{self.source[:12]}-{_digest(dict(self.target))}"

    @property
    def folder(self) -> str:
        """Folder name of the artefact that this machine builds."""
        return f"{self.family}-{_digest(self.compiler)}"


@dataclass(frozen=True)
class Artifact:
    """A loadable artefact.

    Attributes:
        path: Its folder.
        origin: ``prebuilt``, ``cache``, ``shared`` or ``built``.
        seconds: Time until it was ready, waiting for another process's build included.
        notes: What went wrong on the way without stopping it.
    """

    path: Path
    origin: str
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class ArtifactStore:
    """The node's cache of artefacts, with optional image and shared storage behind it.

    Attributes:
        cache_dir: Node-local folder; must belong to this user.
        shared_url: Folder that all nodes reach (fsspec path), or None.
        prebuilt_dirs: Read-only folders of the image.
        lock_timeout_s: How long to wait for another process's build.
    """

    cache_dir: Path
    shared_url: str | None = None
    prebuilt_dirs: Sequence[Path] = ()
    lock_timeout_s: float = 600.0
    _notes: list[str] = field(default_factory=list, repr=False)

    @classmethod
    def from_environment(cls) -> "ArtifactStore":
        """The store that the ``LOOMVIDEO_KERNEL_*`` variables describe; by default a folder in ``/tmp``."""
        prebuilt = os.environ.get(PREBUILT_VARIABLE, "")
        return cls(
            cache_dir=Path(os.environ.get(CACHE_VARIABLE) or default_cache_dir()),
            shared_url=os.environ.get(SHARED_VARIABLE) or None,
            prebuilt_dirs=[Path(p) for p in prebuilt.split(os.pathsep) if p],
            lock_timeout_s=float(os.environ.get(LOCK_TIMEOUT_VARIABLE) or 600),
        )

    def get(
        self, key: ArtifactKey, build: Callable[[Path], None], check: Callable[[Path], None] | None = None
    ) -> Artifact:
        """Return the artefact of ``key``, building it if nobody has.

        Args:
            key: What to look for.
            build: Writes the files into the empty folder it is given.
            check: Raises ``ValueError`` if the files of a folder cannot be used on this machine; such an artefact
                is set aside and built anew.

        Raises:
            UserError: if the cache cannot be written, a build is missing its compiler, or the lock times out.
        """
        start = time.monotonic()
        self._notes = []
        found = self.find(key, check)
        if found is not None:
            return Artifact(*found, seconds=time.monotonic() - start, notes=tuple(self._notes))
        self._make_cache_dir()
        with self._lock(key):
            found = self.find(key, check)  # another process may have built it while we waited
            if found is None:
                found = self._fetch(key, check) or self._build(key, build, check)
        return Artifact(*found, seconds=time.monotonic() - start, notes=tuple(self._notes))

    def find(self, key: ArtifactKey, check: Callable[[Path], None] | None = None) -> tuple[Path, str] | None:
        """Look into the prebuilt folders and the cache alone: ``(folder, origin)`` or None."""
        self._check_owner()
        for root, origin in [*((Path(p), "prebuilt") for p in self.prebuilt_dirs), (self.cache_dir, "cache")]:
            for path in self._candidates(root, key):
                reason = _defect(path, check)
                if reason is None:
                    return path, origin
                self._note(f"artefact {path} is unusable here and was not loaded: {reason}")
                if origin == "cache":
                    shutil.rmtree(path, ignore_errors=True)
        return None

    def clear(self) -> list[str]:
        """Remove every artefact of the cache, and return their names; locks stay, so running builds are safe."""
        removed = []
        if self.cache_dir.is_dir():
            for path in sorted(self.cache_dir.iterdir()):
                if (path / MANIFEST).is_file() or ".tmp-" in path.name:
                    shutil.rmtree(path)
                    removed.append(path.name)
        return removed

    def contents(self) -> list[dict]:
        """The manifest of every artefact in the cache and the prebuilt folders, with its ``path`` and ``origin``."""
        rows = []
        for root, origin in [*((Path(p), "prebuilt") for p in self.prebuilt_dirs), (self.cache_dir, "cache")]:
            for manifest in sorted(root.glob(f"*/{MANIFEST}")):
                rows.append({**json.loads(manifest.read_text()), "path": str(manifest.parent), "origin": origin})
        return rows

    def _candidates(self, root: Path, key: ArtifactKey) -> list[Path]:
        # A machine without a compiler takes what any compiler made for the same sources and target.
        pattern = f"{key.family}-*" if key.compiler is None else key.folder
        return [path.parent for path in sorted(root.glob(f"{pattern}/{MANIFEST}"))]

    def _build(
        self, key: ArtifactKey, build: Callable[[Path], None], check: Callable[[Path], None] | None
    ) -> tuple[Path, str]:
        with self._staging(key) as folder:
            start = time.monotonic()
            build(folder)
            _write_manifest(folder, key, time.monotonic() - start)
            reason = _defect(folder, check)
            if reason is not None:
                raise RuntimeError(f"{key.name} was built but cannot be loaded: {reason}")
            path = self._install(folder, key.folder)
        if self.shared_url:
            self._publish(path)
        return path, "built"

    def _fetch(self, key: ArtifactKey, check: Callable[[Path], None] | None) -> tuple[Path, str] | None:
        if not self.shared_url:
            return None
        try:
            filesystem, root = fsspec.core.url_to_fs(self.shared_url)
            pattern = f"{key.family}-*.tar" if key.compiler is None else f"{key.folder}.tar"
            for name in sorted(filesystem.glob(f"{root}/{pattern}")):
                with self._staging(key) as folder:
                    with tarfile.open(fileobj=io.BytesIO(filesystem.cat_file(name))) as archive:
                        archive.extractall(folder, filter="data")
                    reason = _defect(folder, check)
                    if reason is None:
                        return self._install(folder, Path(name).stem), "shared"
                    self._note(f"artefact {name} in shared storage is unusable here: {reason}")
        except (OSError, tarfile.TarError) as error:
            self._note(f"shared kernel storage {self.shared_url} could not be read ({error}); building here")
        return None

    def _publish(self, path: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for file in sorted(path.iterdir()):
                archive.add(file, arcname=file.name)
        try:
            filesystem, root = fsspec.core.url_to_fs(self.shared_url)
            filesystem.makedirs(root, exist_ok=True)
            partial = f"{root}/.{path.name}-{uuid.uuid4().hex}"
            filesystem.pipe_file(partial, buffer.getvalue())
            filesystem.mv(partial, f"{root}/{path.name}.tar")
        except OSError as error:
            self._note(f"artefact {path.name} could not be published to {self.shared_url}: {error}")

    @contextlib.contextmanager
    def _staging(self, key: ArtifactKey) -> Iterator[Path]:
        # Holding the lock, so whatever an earlier owner left behind is dead.
        for leftover in self.cache_dir.glob(f"{key.folder}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{key.folder}.tmp-", dir=self.cache_dir))
        try:
            with full_disk_named(self.cache_dir):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _install(self, folder: Path, name: str) -> Path:
        path = self.cache_dir / name
        # Of an image, built by root and read by its user; who may enter a cache is up to its own folder.
        folder.chmod(0o755)
        give_name(folder, path, MANIFEST)
        return path

    @contextlib.contextmanager
    def _lock(self, key: ArtifactKey) -> Iterator[None]:
        path = self.cache_dir / "locks" / key.folder
        with path.open("a+") as file:
            deadline = time.monotonic() + self.lock_timeout_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        file.seek(0)
                        raise UserError(
                            f"kernel lock {path} has been held for over {self.lock_timeout_s:.0f} s by"
                            f" {file.read() or 'an unknown process'}; end that process or raise kernels.lock_timeout_s"
                        ) from None
                    time.sleep(0.05)
            # The lock file is never removed: removing it would let two owners hold two files of one name.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def _make_cache_dir(self) -> None:
        try:
            (self.cache_dir / "locks").mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self.cache_dir):
                pass
        except OSError as error:
            raise UserError(
                f"kernel cache {self.cache_dir} is not writable ({error.strerror}): set kernels.cache_dir or"
                f" {CACHE_VARIABLE} to a folder on this node's own disk"
            ) from error

    def _check_owner(self) -> None:
        # /tmp is everyone's, and what lies in the cache is loaded into this process.
        if self.cache_dir.is_dir() and self.cache_dir.stat().st_uid != os.getuid():
            raise UserError(
                f"kernel cache {self.cache_dir} belongs to another user: set {CACHE_VARIABLE} to a folder of yours"
            )

    def _note(self, message: str) -> None:
        logger.warning(message)
        self._notes.append(message)


def default_cache_dir() -> Path:
    """Node-local by design: home folders are often on a network disk, where locks and renames are not safe."""
    return Path(tempfile.gettempdir()) / f"loomvideo-kernels-{os.getuid()}"


def _write_manifest(folder: Path, key: ArtifactKey, build_seconds: float) -> None:
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    manifest = {**asdict(key), "files": files, "build_seconds": round(build_seconds, 3), "host": socket.gethostname()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def _defect(folder: Path, check: Callable[[Path], None] | None) -> str | None:
    """Why an artefact cannot be loaded, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                return f"{name} does not match its checksum"
        if check is not None:
            check(folder)
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None
