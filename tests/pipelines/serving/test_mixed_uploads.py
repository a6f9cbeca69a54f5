"""The web page is given everything people bring: an upload that can be used, or one line."""

import pytest
from fixtures.mixed_folder import everything, reasons_of_files

from loomvideo.pipelines.serving.uploads import UploadLimits, UploadReader
from loomvideo.platform.errors import UserError

# Kinds of files that a browser's user has no use for; raw streams and noise are told by no first bytes.
UNKNOWN = {"raw.h264", "page.mp4", "pointer.mp4", "noise.mp4"}


def test_every_file_is_taken_or_one_line(tmp_path):
    rows = everything(tmp_path)
    wanted = reasons_of_files(rows)
    reader = UploadReader(UploadLimits())
    try:
        for path in sorted(tmp_path.iterdir()):
            said = ""
            try:
                frame = reader.frames(reader.check(path.read_bytes()), [0])
                assert frame.shape[-1] == 3
            except UserError as error:
                said = str(error)
            assert bool(said) == bool(wanted.get(path.name) or path.name in UNKNOWN), (path.name, said)
            assert ("unknown file type" in said) == (path.name in UNKNOWN), (path.name, said)
            assert "\n" not in said
            assert "/tmp" not in said
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x08wide\0\0\0\0mdat", "video/quicktime"),
        (b"G" + bytes(187) + b"G", "video/mp2t"),
        (b"MM\0*", "image/tiff"),
    ],
)
def test_files_are_told_by_their_first_bytes(content, kind):
    from loomvideo.pipelines.serving.uploads import media_type

    assert media_type(content) == kind
    with pytest.raises(UserError, match="unknown file type"):
        media_type(b"ffconcat version 1.0\nfile x")
