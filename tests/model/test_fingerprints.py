import pytest

from loomvideo.model.fingerprints import folder_fingerprint, weights_fingerprint


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_published_file_counts_by_its_content(tmp_path, whole_folder):
    file = tmp_path / "gen_model.pth"
    file.write_bytes(b"one")
    path = tmp_path if whole_folder else file
    first = weights_fingerprint(path)
    assert weights_fingerprint(str(path)) == first
    file.write_bytes(b"two")
    assert weights_fingerprint(path) != first


def test_a_folder_of_safetensors_keeps_its_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("not counted")
    assert weights_fingerprint(tmp_path) == folder_fingerprint(tmp_path)
