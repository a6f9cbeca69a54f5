from pathlib import Path

import pytest

from loomvideo.platform.nodes.jit_caches import SUBFOLDERS, filesystem_type, point_jit_caches

MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb /home/me/local\\040disk ext4 rw 0 0
"""


@pytest.fixture
def mounts(tmp_path):
    (tmp_path / "mounts").write_text(MOUNTS)
    return tmp_path / "mounts"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/tmp/x", "tmpfs"), ("/home/me", "nfs4"), ("/home/me/local disk/a", "ext4"), ("/homes", "overlay")],
)
def test_filesystem_of_a_path(mounts, path, kind):
    assert filesystem_type(Path(path), mounts) == kind


def test_unset_caches_go_under_the_root_and_set_ones_stay(monkeypatch, tmp_path):
    for variable in SUBFOLDERS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    values = point_jit_caches(tmp_path)
    assert values["TRITON_CACHE_DIR"] == "/elsewhere"
    assert values["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    assert set(values) == set(SUBFOLDERS)


def test_a_cache_on_a_network_disk_is_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/me/.triton")
    monkeypatch.setattr("loomvideo.platform.nodes.jit_caches.filesystem_type", lambda path: "nfs4")
    assert point_jit_caches(tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
