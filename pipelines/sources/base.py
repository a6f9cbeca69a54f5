"""What every reader shares: where a dataset lies, rejected rows, keys, and the registry of formats."""

import codecs
import dataclasses
import difflib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec

from loomvideo.pipelines.sources.fields import FieldError, clean_fields, make_key
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.platform.errors import UserError

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"))
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic"))


@dataclass(frozen=True)
class Rejected:
    """A line or file that did not become a sample; it goes to the quarantine ledger, never out of sight.

    Attributes:
        where: File and line, row or item.
        dataset: Name of the dataset.
        reason: Code: ``invalid_json``, ``unreadable_table``, ``not_utf8``, ``missing_field``, ``invalid_field``,
            ``invalid_text``, ``missing_media``, ``unpaired``, ``invalid_sample``, ``no_text``.
        detail: One line for a person.
        unfinished: A sample that lacks nothing but its text, which captioning can write.
    """

    where: str
    dataset: str
    reason: str
    detail: str
    unfinished: Sample | None = None


Outcome = Sample | Rejected


class Root:
    """A folder on disk or in object storage, listed once a sub-folder."""

    def __init__(self, url: str, encoding: str = ""):
        """Open a folder by path or fsspec URL; ``encoding`` is that of its texts when it is not UTF-8 or UTF-16."""
        self.encoding = encoding
        self.fs, base = fsspec.url_to_fs(url)
        self.base = base.rstrip("/") or "/"
        self.is_local = "file" in self.fs.protocol
        self._listings: dict[str, dict[str, str]] = {}

    def path(self, *parts: str) -> str:
        """Absolute path or URL of something below; absolute parts and URLs stay as they are.

        Only ``.`` and ``..`` are resolved: ``//`` and everything else may be part of an object's name.
        """
        joined = self.base
        for part in parts:
            if "/." not in f"/{part}" and "://" not in part and part[:1] != "/" and joined != "/":
                joined = f"{joined}/{part}"  # of nearly every path there is, and there are millions
            elif "://" in part:
                joined = part
            elif part.startswith("/"):
                joined = os.path.normpath(part)
            else:
                joined = _below(joined, part)
        return joined if self.is_local or "://" in joined else self.fs.unstrip_protocol(joined)

    def names(self, folder: str = "") -> list[str]:
        """Names in a sub-folder, sorted; none when it does not exist."""
        return sorted(self._listing(folder))

    def has(self, path: str) -> bool:
        """Whether a file or folder exists below."""
        folder, _, name = path.rpartition("/")
        return name in self._listing(folder) or (name.startswith(".") and self.fs.exists(f"{self.base}/{path}"))

    def is_folder(self, path: str) -> bool:
        """Whether a sub-folder exists."""
        folder, _, name = path.rpartition("/")
        return self._listing(folder).get(name) == "directory"

    def open(self, path: str, mode: str = "rt", newline: str = "\n") -> IO:
        """Open a file below, unpacked when its name says that it is packed (.gz, .bz2, .xz).

        Text is UTF-8 or UTF-16 by its byte order mark, or in the folder's encoding; lines end at ``\\n`` alone, with
        ``newline=""`` also at ``\\r``. Bytes that do not decode are kept as lone surrogates, which the checks of fields
        find and name.
        """
        if "b" in mode:
            return self.fs.open(f"{self.base}/{path}", mode, compression="infer")
        with self.fs.open(f"{self.base}/{path}", "rb", compression="infer") as opened:
            encoding = _encoding(opened.read(4)) if not self.encoding else self.encoding
        return self.fs.open(
            f"{self.base}/{path}",
            mode,
            encoding=encoding,
            errors="surrogateescape",
            newline=newline,
            compression="infer",
        )

    def json(self, path: str) -> Any:
        """The content of a JSON file that a layout needs.

        Raises:
            UserError: when it is no JSON.
        """
        try:
            with self.open(path) as opened:
                return json.load(opened)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path(path)}: is no JSON: {error}") from error

    def lines(self, path: str) -> list[str]:
        """Stripped lines of a text file, empty ones left out."""
        # Read in one go: a folder may hold a small text beside each of 100,000 videos.
        with self.fs.open(f"{self.base}/{path}", "rb", compression="infer") as opened:
            content = opened.read()
        text = content.decode(self.encoding or _encoding(content[:4]), "surrogateescape")
        return [line.strip() for line in text.split("\n") if line.strip()]

    def _listing(self, folder: str) -> dict[str, str]:
        if folder not in self._listings:
            try:
                entries = self.fs.ls(f"{self.base}/{folder}" if folder else self.base, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                entries = []
            named = {}
            for entry in entries:
                name = entry["name"].rstrip("/").rpartition("/")[2]
                # Finder's ._ twins and other hidden files are nobody's data.
                if name and not name.startswith("."):
                    linked = self.is_local and entry.get("islink")
                    named[name] = "directory" if linked and self.fs.isdir(entry["name"]) else entry["type"]
            self._listings[folder] = named
        return self._listings[folder]


_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _encoding(head: bytes) -> str:
    return next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")


def _below(base: str, part: str) -> str:
    head, separator, rest = base.partition("://")
    segments = (rest if separator else base).split("/")
    # A bucket or a root is never left.
    floor = 1
    for segment in part.split("/"):
        if segment == "..":
            del segments[max(floor, len(segments) - 1) :]
        elif segment != ".":
            segments.append(segment)
    joined = "/".join(segments)
    return head + separator + joined if separator else joined


@dataclass(frozen=True)
class Place:
    """What the user pointed at: a folder, or a file in one."""

    root: Root
    file: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return self.root.path(self.file) if self.file else self.root.path()

    def files(self, *suffixes: str, folder: str = "") -> list[str]:
        """The named file, or the files of a folder with one of the suffixes, sorted."""
        if self.file:
            return [self.file]
        prefix = f"{folder}/" if folder else ""
        return [prefix + name for name in self.root.names(folder) if name.lower().endswith(suffixes)]


def locate(path: str, encoding: str = "") -> Place:
    """Open what a path or URL points at; ``encoding`` is that of texts that are neither UTF-8 nor UTF-16.

    Raises:
        UserError: when nothing is there.
    """
    if "\0" in path:
        raise UserError(f"source {path!r}: holds a NUL character")
    if "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
    fs, inside = fsspec.url_to_fs(path)
    try:
        kind = fs.info(inside)["type"]
    except FileNotFoundError as error:
        raise UserError(f"source {path}: no such file or folder") from error
    if kind == "directory":
        return Place(Root(path, encoding))
    folder, _, name = path.rstrip("/").rpartition("/")
    return Place(Root(folder or "/", encoding), name)


Reader = Callable[..., Iterator[Outcome]]


@dataclass(frozen=True)
class Format:
    """A registered format."""

    name: str
    help: str
    read: Reader
    detect: Callable[[Place], bool]
    options: dict[str, Any] = field(default_factory=dict)


FORMATS: dict[str, Format] = {}


def register(name: str, detect: Callable[[Place], bool]) -> Callable[[Reader], Reader]:
    """Register a reader; its keyword-only parameters are the format's options."""

    def decorate(read: Reader) -> Reader:
        parameters = inspect.signature(read).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        FORMATS[name] = Format(name, (read.__doc__ or "").partition("\n")[0], read, detect, options)
        return read

    return decorate


def open_source(path: str, format: str = "auto", extract_to: str = "", **options: Any) -> Iterator[Outcome]:
    """Read a dataset as samples with absolute media paths, and what was rejected of it.

    Args:
        path: A file or folder, on disk or an fsspec URL.
        format: One of ``FORMATS``, or ``auto`` to tell it from the layout.
        extract_to: Where pictures and videos go that lie inside tables and tars, unless the option ``extract`` says it;
            a folder or URL that other nodes reach. Empty takes this machine's cache.
        options: The options of the format; ``encoding`` is one of every format.

    Raises:
        UserError: for an unknown format or option, or a layout the format does not have.
    """
    place, chosen = choose_format(path, format, str(options.pop("encoding", "") or ""))
    for name in options:
        if name not in chosen.options:
            known = ", ".join([*chosen.options, "encoding"])
            hint = _nearest(name, chosen.options)
            raise UserError(f"source format {chosen.name}: unknown option {name!r}; its options: {known}{hint}")
    if extract_to and "extract" in chosen.options and not options.get("extract"):
        options["extract"] = extract_to
    return chosen.read(place, **options)


def choose_format(path: str, format: str = "auto", encoding: str = "") -> tuple[Place, Format]:
    """What a path points at, and the format that reads it.

    Args:
        path: A file or folder, on disk or an fsspec URL.
        format: One of ``FORMATS``, or ``auto``.
        encoding: The encoding of texts that are neither UTF-8 nor UTF-16.

    Raises:
        UserError: for an unknown format, none that fits, or more than one.
    """
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise UserError(f"source_options.encoding={encoding}: no such text encoding; cp1252, gbk, …") from error
    place = locate(path, encoding)
    chosen = _detect(place) if format == "auto" else FORMATS.get(format)
    if chosen is None:
        raise UserError(f"source format {format!r}: use one of {', '.join(sorted(FORMATS))}{_nearest(format, FORMATS)}")
    return place, chosen


def _detect(place: Place) -> Format:
    # Every published table is also a table: the column map comes last.
    found = [one for one in FORMATS.values() if one.name != "table" and one.detect(place)]
    if len(found) > 1:
        names = " and ".join(sorted(one.name for one in found))
        raise UserError(f"source {place.name}: fits {names}; set format to the one that it is")
    if found or FORMATS["table"].detect(place):
        return found[0] if found else FORMATS["table"]
    names = [place.file] if place.file else place.root.names()
    sheet = next((name for name in names if name.lower().endswith(SPREADSHEETS)), None)
    if sheet is not None:
        raise UserError(f"source {place.root.path(sheet)}: is a spreadsheet; save it as CSV (UTF-8) and name that")
    raise UserError(f"source {place.name}: format not recognised; set format to one of {', '.join(sorted(FORMATS))}")


def _nearest(name: str, names: dict) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def build(where: str, dataset: str, **fields: Any) -> Outcome:
    """A sample when its fields are complete and consistent, else why not; empty fields are left out.

    ``key`` is made from the other fields when it is not given.
    """
    try:
        values = clean_fields({"dataset": dataset} | fields)
    except FieldError as error:
        return Rejected(where, dataset, error.reason, str(error))
    values["dataset"] = values.get("dataset") or dataset
    if not values.get("target"):
        return Rejected(where, dataset, "missing_field", "no target")
    values.setdefault("task", infer_task(values["target"], values.get("source"), values.get("references", [])))
    if "key" not in values:
        identity = [values.get(k) for k in ("task", "target", "source", "references", "instruction", "caption")]
        values["key"] = make_key(dataset, PurePosixPath(values["target"].partition("#")[0]).stem, *identity)
    return checked(Sample(**values), where)


def checked(sample: Sample, where: str) -> Outcome:
    """The sample if it is complete and consistent, else why not."""
    try:
        # A stand-in tells a missing text from other mistakes.
        (sample if sample.text else dataclasses.replace(sample, caption="?")).validate(where)
    except UserError as error:
        return Rejected(where, sample.dataset, "invalid_sample", str(error).removeprefix(f"{where}: "))
    if not sample.text:
        return Rejected(where, sample.dataset, "no_text", "no instruction or caption", sample)
    return sample


def is_video(path: str) -> bool:
    """Whether a path names a video by its suffix; a folder of frames counts as one."""
    suffix = PurePosixPath(path.partition("#")[0]).suffix.lower()
    return suffix in VIDEO_SUFFIXES or suffix not in IMAGE_SUFFIXES


def infer_task(target: str, source: str | None, references: list[str]) -> str:
    """The task that a sample with these media serves."""
    video = is_video(target)
    if source:
        return ("ref_edit" if references else "video_edit") if video else "image_edit"
    if references and video:
        return "mi2v"
    return "t2v" if video else "t2i"


class Components:
    """Groups names that occur together (union-find): no split may separate a person from a garment worn."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The representative of a name's group."""
        self._parent.setdefault(name, name)
        root = name
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[name] != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def join(self, first: str, second: str) -> None:
        """Put two names into one group, named after the smaller representative."""
        a, b = self.find(first), self.find(second)
        low, high = min(a, b), max(a, b)
        self._parent[high] = low
