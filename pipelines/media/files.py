"""The files of a sample: where they lie, their content hash, and a local copy while one is decoded."""

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR

import fsspec

from loomvideo.pipelines.media.decode import DecodeError, on_disk, refuse_endless
from loomvideo.pipelines.media.fragments import split_fragment, with_fragment
from loomvideo.pipelines.media.media_info import first_line
from loomvideo.platform.errors import full_disk_behind
from loomvideo.platform.shards.storage import patiently

_READ_BYTES = 1 << 20
_KNOWN_FILMS = 256


def resolve(path: str, base: str) -> str:
    """A media path as absolute path or URL; relative ones start at ``base``, the sample file's folder."""
    if "://" in path or path.startswith("/"):
        return path
    return f"{base.rstrip('/')}/{path}"


def base_folder(source: str) -> str:
    """The folder that an input's relative paths start at, as absolute path or URL: itself, or the file's folder."""
    if "://" in source:
        fs, path = fsspec.url_to_fs(source)
        return source.rstrip("/") if fs.isdir(path) else source.rsplit("/", 1)[0]
    path = os.path.abspath(os.path.expanduser(source))
    return path if os.path.isdir(path) else os.path.dirname(path)


def media_stamp(path: str) -> list | None:
    """``[size, modification time]`` of a local file, the entries of a folder hashed; None if absent or remote."""
    path, _ = split_fragment(path)
    if "://" in path:
        return None
    try:
        found = os.stat(path)
        if not S_ISDIR(found.st_mode):
            return [found.st_size, found.st_mtime_ns]
        entries = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path))
        return [len(entries), hashlib.sha256(repr(entries).encode()).hexdigest()[:16]]
    except OSError:
        return None


@contextlib.contextmanager
def local_copies(paths: list[str]) -> Iterator[dict[str, str]]:
    """Local names of the paths; remote ones are downloaded and deleted afterwards.

    Raises:
        DecodeError: ``missing_file`` or ``download_failed``.
    """
    folder = None
    names = {}
    try:
        for number, full in enumerate(dict.fromkeys(paths)):
            path, fragment = split_fragment(full)
            if "://" not in path:
                found = on_disk(path)
                names[full] = full if found == path else with_fragment(found, fragment) if fragment else found
                continue
            folder = folder or tempfile.mkdtemp(prefix="loomvideo-media-")
            local = os.path.join(folder, f"{number}{Path(path).suffix}")
            try:
                patiently(path, _download, path, local)
            except FileNotFoundError as error:
                raise DecodeError("missing_file", f"{path}: no such object") from error
            except Exception as error:  # of any store's client, and what URLs of unknown or absent ones raise
                if full_disk_behind(error) is not None:
                    raise  # this machine's temporary folder: no fault of the file
                raise DecodeError("download_failed", f"{path}: {first_line(error)}") from error
            names[full] = with_fragment(local, fragment) if fragment else local
        yield names
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _download(path: str, local: str) -> None:
    fs, remote = fsspec.url_to_fs(path)
    if fs.isdir(remote):
        fs.get(remote, local, recursive=True)
    else:
        fs.get_file(remote, local)  # `get` would read [, ] and * in a name as a pattern


@functools.lru_cache(_KNOWN_FILMS)
def _film_hash(path: str, version: tuple[int, int] | None) -> str:
    """The hash of a file that more parts are likely to be asked of; read again only when it was written anew."""
    return content_hash(path)


def _version(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # content_hash says what is wrong, and nothing is kept of it
    return found.st_size, found.st_mtime_ns


def content_hash(path: str) -> str:
    """SHA-256 of a local file or a part of one, or of the names and contents of a folder.

    Raises:
        DecodeError: ``missing_file``.
    """
    path, fragment = split_fragment(path)
    if fragment is not None:
        return hashlib.sha256(f"{_film_hash(path, _version(path))}#{fragment}".encode()).hexdigest()
    if os.path.isdir(path):
        files = sorted(Path(path).iterdir())
        return hashlib.sha256(repr([(f.name, content_hash(str(f))) for f in files if f.is_file()]).encode()).hexdigest()
    hasher = hashlib.sha256()
    refuse_endless(Path(path))
    try:
        with open(path, "rb") as opened:
            while chunk := opened.read(_READ_BYTES):
                hasher.update(chunk)
    except FileNotFoundError as error:
        raise DecodeError("missing_file", f"{path}: no such file") from error
    except OSError as error:
        raise DecodeError("unreadable", f"{path}: {error.strerror}") from error
    return hasher.hexdigest()
