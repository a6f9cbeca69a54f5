"""Readers that turn datasets on disk or in object storage into samples.

``open_source(path, format)`` yields a :class:`~loomvideo.pipelines.sources.samples.Sample` or a :class:`Rejected` for
every line and file, so that nothing is lost silently. Importing a module registers its formats.
"""

from loomvideo.pipelines.sources import (  # noqa: F401
    catalogue,
    edits,
    folders,
    image_edits,
    native,
    tables,
    tryon,
    videos,
)
from loomvideo.pipelines.sources.base import FORMATS, Format, Outcome, Rejected, open_source

__all__ = ["FORMATS", "Format", "Outcome", "Rejected", "open_source"]
