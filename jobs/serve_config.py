"""The configuration of ``loomvideo serve``."""

from dataclasses import dataclass

from loomvideo.pipelines.serving.deployment import ReplicaConfig
from loomvideo.pipelines.serving.jobs import RequestLimits
from loomvideo.pipelines.serving.model_generator import GenerationDefaults
from loomvideo.pipelines.serving.uploads import UploadLimits
from loomvideo.platform.config import option


@dataclass
class ServeConfig:
    """What is served, where, and what is accepted."""

    checkpoint: str = option("", "training run as JOB/NAME, or a weights path; empty takes the newest training run")
    runs: str = option("runs", "folder of training runs")
    model: str = option("", "model preset; empty takes the one that the weights state")
    codec_folder: str = option("", "the codec's weights, for presets that need them")
    mllm_folder: str = option("", "the MLLM, for presets that need one")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every network")
    port: int = option(8000, "port to listen on")
    token: str = option("", "what people must enter first; better set as LOOMVIDEO_SERVE_TOKEN; empty lets everyone in")
    title: str = option("LoomVideo", "name on the page")
    generation: GenerationDefaults = option(GenerationDefaults, "what a request that does not say gets")
    replicas: ReplicaConfig = option(ReplicaConfig, "generators")
    uploads: UploadLimits = option(UploadLimits, "what may be uploaded")
    requests: RequestLimits = option(RequestLimits, "what may be asked for")
