"""The configuration of ``loomvideo serve``."""

from dataclasses import dataclass

from loomvideo.jobs.weights.model_choice import ModelChoice
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.serving.deployment import ReplicaConfig
from loomvideo.pipelines.serving.requests import RequestLimits
from loomvideo.pipelines.serving.uploads import UploadLimits
from loomvideo.platform.config import option


@dataclass
class ServeConfig(ModelChoice):
    """What is served, where, and what is accepted."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every network")
    port: int = option(8000, "port to listen on")
    token: str = option("", "what people must enter first; better set as LOOMVIDEO_SERVE_TOKEN; empty lets everyone in")
    users: str = option(
        "", "YAML file of people, NAME: {token: …, max_active: …, max_per_day: …}; empty: one token for everybody"
    )
    store: str = option(
        "",
        "where jobs and files are: a SQLite file, postgresql://… (better set as LOOMVIDEO_SERVE_STORE), or memory; "
        "empty: RUNS/serve/jobs.sqlite",
    )
    drain_s: float = option(
        120.0, "seconds that running generations may take to end when it is told to stop, or replaced"
    )
    hosts: list[str] = option(
        [], "names it answers as, without ports; empty: loopback names on a loopback host, else all"
    )
    title: str = option("LoomVideo", "name on the page")
    examples: str = option("", "samples.jsonl whose held-out samples the page offers to click; empty offers none")
    generation: Settings = option(Settings, "what a request that does not say gets")
    replicas: ReplicaConfig = option(ReplicaConfig, "generators")
    uploads: UploadLimits = option(UploadLimits, "what may be uploaded")
    requests: RequestLimits = option(RequestLimits, "what may be asked for")
