"""The artefact store: one build a node, whatever dies, is missing, or is broken."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from loomvideo.platform.errors import UserError
from loomvideo.platform.nodes.artifacts import ArtifactKey, ArtifactStore

KEY = ArtifactKey("thing", "source1", {"machine": "m1"}, "compiler 1")


def write_thing(folder: Path) -> None:
    (folder / "thing.so").write_bytes(b"code")


def refuse(folder: Path) -> None:
    raise AssertionError("must not build")


def test_built_once_then_found_in_the_cache(tmp_path):
    store = ArtifactStore(tmp_path / "cache")
    first = store.get(KEY, write_thing)
    assert first.origin == "built"
    second = store.get(KEY, refuse)
    assert (second.origin, second.path) == ("cache", first.path)
    assert (second.path / "thing.so").read_bytes() == b"code"
    manifest = store.contents()[0]
    assert manifest["target"] == {"machine": "m1"}
    assert manifest["compiler"] == "compiler 1"


@pytest.mark.parametrize(
    "other",
    [
        ArtifactKey("thing", "source2", {"machine": "m1"}, "compiler 1"),
        ArtifactKey("thing", "source1", {"machine": "m2"}, "compiler 1"),
        ArtifactKey("thing", "source1", {"machine": "m1"}, "compiler 2"),
    ],
    ids=["source", "target", "compiler"],
)
def test_another_source_target_or_compiler_is_another_artefact(tmp_path, other):
    store = ArtifactStore(tmp_path)
    store.get(KEY, write_thing)
    assert store.get(other, write_thing).origin == "built"


def test_without_a_compiler_what_another_one_built_is_taken(tmp_path):
    store = ArtifactStore(tmp_path)
    store.get(KEY, write_thing)
    assert store.get(ArtifactKey("thing", "source1", {"machine": "m1"}, None), refuse).origin == "cache"


SCRIPT = """
    import sys, time, os
    from pathlib import Path
    from loomvideo.platform.nodes.artifacts import ArtifactKey, ArtifactStore

    def build(folder):
        with open(sys.argv[2], "a") as log:
            log.write(f"{os.getpid()}\\n")
        time.sleep(float(sys.argv[3]))
        (folder / "thing.so").write_bytes(b"code")

    key = ArtifactKey("thing", "source1", {"machine": "m1"}, "compiler 1")
    print(ArtifactStore(Path(sys.argv[1])).get(key, build).origin)
"""


def start(tmp_path: Path, seconds: float) -> subprocess.Popen:
    arguments = [str(tmp_path / "cache"), str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True
    )


def test_four_processes_starting_at_once_cause_one_build(tmp_path):
    processes = [start(tmp_path, 1.0) for _ in range(4)]
    origins = sorted(process.communicate()[0].strip() for process in processes)
    assert origins == ["built", "cache", "cache", "cache"]
    assert len((tmp_path / "log").read_text().split()) == 1


def test_a_killed_build_leaves_no_lock_and_no_rubbish(tmp_path):
    process = start(tmp_path, 600)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "cache").glob("*.tmp-*"))
    artifact = ArtifactStore(tmp_path / "cache", lock_timeout_s=5).get(KEY, write_thing)
    assert artifact.origin == "built"
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_held_lock_times_out_with_its_owner_named(tmp_path):
    process = start(tmp_path, 600)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        with pytest.raises(UserError, match=f"held for over 0 s by process {process.pid} on .*kernels.lock_timeout_s"):
            ArtifactStore(tmp_path / "cache", lock_timeout_s=0.1).get(KEY, write_thing)
    finally:
        process.kill()
        process.wait()


def test_an_unwritable_cache_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"kernel cache .*/file/cache is not writable \(Not a directory\): set kernels"):
        ArtifactStore(tmp_path / "file" / "cache").get(KEY, write_thing)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a folder away")
def test_a_cache_of_another_user_is_not_loaded_from(tmp_path):
    store = ArtifactStore(tmp_path / "cache")
    store.get(KEY, write_thing)
    os.chown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(UserError, match="belongs to another user"):
        store.get(KEY, refuse)


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise UserError("no compiler")

    store = ArtifactStore(tmp_path)
    with pytest.raises(UserError, match="no compiler"):
        store.get(KEY, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]
    assert store.get(KEY, write_thing).origin == "built"


def test_a_damaged_file_is_built_anew_and_said(tmp_path, caplog):
    store = ArtifactStore(tmp_path)
    (store.get(KEY, write_thing).path / "thing.so").write_bytes(b"cod")
    with caplog.at_level(logging.WARNING):
        artifact = store.get(KEY, write_thing)
    assert artifact.origin == "built"
    assert "thing.so does not match its checksum" in artifact.notes[0]


def wrong_architecture(folder: Path) -> None:
    raise ValueError("for ELF machine 183")


def test_an_artefact_that_the_check_refuses_is_never_loaded(tmp_path):
    store = ArtifactStore(tmp_path)
    store.get(KEY, write_thing)
    with pytest.raises(RuntimeError, match="thing was built but cannot be loaded: for ELF machine 183"):
        store.get(KEY, write_thing, wrong_architecture)
    assert not list(tmp_path.glob("thing*"))


@pytest.mark.parametrize("scheme", ["{}", "file://{}"])
def test_shared_storage_seeds_other_nodes(tmp_path, scheme):
    shared = scheme.format(tmp_path / "shared")
    ArtifactStore(tmp_path / "node1", shared).get(KEY, write_thing)
    assert [p.name for p in (tmp_path / "shared").iterdir()] == [f"{KEY.folder}.tar"]
    second = ArtifactStore(tmp_path / "node2", shared).get(KEY, refuse)
    assert second.origin == "shared"
    assert second.path.parent == tmp_path / "node2"
    without_compiler = ArtifactKey("thing", "source1", {"machine": "m1"}, None)
    assert ArtifactStore(tmp_path / "node3", shared).get(without_compiler, refuse).origin == "shared"


def test_unusable_shared_storage_does_not_stop_a_build_but_is_noted(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / f"{KEY.folder}.tar").write_bytes(b"not a tar")
    artifact = ArtifactStore(tmp_path / "node", str(shared)).get(KEY, write_thing)
    assert artifact.origin == "built"
    assert "could not be read" in artifact.notes[0]
    (tmp_path / "file").write_text("")
    artifact = ArtifactStore(tmp_path / "other", str(tmp_path / "file" / "x")).get(KEY, write_thing)
    assert any("could not be published" in note for note in artifact.notes)


def test_prebuilt_folders_come_first_and_are_never_written(tmp_path):
    built = ArtifactStore(tmp_path / "image").get(KEY, write_thing)
    # By root, for the image's user.
    assert built.path.stat().st_mode & 0o777 == 0o755
    store = ArtifactStore(tmp_path / "cache", prebuilt_dirs=[tmp_path / "image"])
    assert store.get(KEY, refuse).origin == "prebuilt"
    assert not (tmp_path / "cache").exists()
    assert store.clear() == []
    assert store.get(KEY, refuse).origin == "prebuilt"


def test_clear_removes_artefacts_and_keeps_locks(tmp_path):
    store = ArtifactStore(tmp_path)
    store.get(KEY, write_thing)
    assert store.clear() == [KEY.folder]
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]


def test_the_environment_describes_the_store(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOMVIDEO_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setenv("LOOMVIDEO_KERNEL_PREBUILT", f"/a{os.pathsep}/b")
    monkeypatch.setenv("LOOMVIDEO_KERNEL_SHARED", "s3://bucket/kernels")
    monkeypatch.setenv("LOOMVIDEO_KERNEL_LOCK_TIMEOUT_S", "7")
    store = ArtifactStore.from_environment()
    assert (store.cache_dir, store.shared_url, store.lock_timeout_s) == (tmp_path, "s3://bucket/kernels", 7)
    assert store.prebuilt_dirs == [Path("/a"), Path("/b")]
    assert json.loads(json.dumps(store.contents())) == []
