"""Object stores that know nothing of S3's newer checksums (R2, old MinIO), and disks that get full at any write."""

import errno
import io
import os

import pytest
from botocore.awsrequest import AWSResponse
from fixtures.datasets import make_sample, write_dataset

from loomvideo.platform.errors import UserError
from loomvideo.platform.shards import storage as storage_module
from loomvideo.platform.shards.reader import ShardDataset


class _Answer(io.BytesIO):
    def stream(self, **options):
        yield self.read()


def headers_of_a_write():
    """What a client of S3 sends with an object, caught before it leaves."""
    session = pytest.importorskip("botocore.session").Session()
    client = session.create_client(
        "s3", region_name="auto", aws_access_key_id="x", aws_secret_access_key="y", endpoint_url="http://127.0.0.1:9"
    )
    sent = []

    def catch(request, **options):
        sent.append({name.lower() for name in request.headers})
        return AWSResponse(request.url, 200, {}, _Answer())

    client.meta.events.register("before-send.s3", catch)
    client.put_object(Bucket="bucket", Key="a.json", Body=b"{}")
    return [name for name in sent[0] if "checksum" in name or name == "x-amz-trailer"]


def test_stores_without_checksums_are_not_sent_any(monkeypatch):
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
    assert headers_of_a_write() == []
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert headers_of_a_write(), "clients send them unasked; otherwise nothing is to be set"


SAMPLES = [make_sample(f"s-{n}", "t2i", latent_shape=(1, 2, 2)) for n in range(3)]


@pytest.fixture(scope="module")
def num_writes(tmp_path_factory):
    """How often a dataset of three samples is synced to disk."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:

        def sync(descriptor):
            nonlocal count
            count += 1

        patch.setattr(storage_module.os, "fsync", sync)
        write_dataset(tmp_path_factory.mktemp("d") / "data", SAMPLES, samples_per_shard=2)
    return count


def test_a_disk_that_gets_full_at_any_write_leaves_nothing_half(tmp_path, monkeypatch, num_writes):
    whole = write_dataset(tmp_path / "whole", SAMPLES, samples_per_shard=2)
    assert num_writes > 8
    for number in range(num_writes):
        left, folder = [number], tmp_path / str(number)

        def full(descriptor, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(storage_module.os, "fsync", full)
            with pytest.raises(UserError, match="no space left"):
                write_dataset(folder, SAMPLES, samples_per_shard=2)
        assert not list(folder.rglob("*.tmp-*")), number
        assert write_dataset(folder, SAMPLES, samples_per_shard=2).digest == whole.digest
        assert len(ShardDataset.open(folder)) == len(SAMPLES)
