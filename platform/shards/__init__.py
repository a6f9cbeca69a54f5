"""Shard format v1: tars of encoded samples with an index and a manifest."""

from loomvideo.platform.shards.manifest import Manifest, ShardEntry
from loomvideo.platform.shards.reader import ShardDataset
from loomvideo.platform.shards.sample import ShardSample
from loomvideo.platform.shards.storage import Storage

__all__ = ["Manifest", "ShardDataset", "ShardEntry", "ShardSample", "Storage"]
