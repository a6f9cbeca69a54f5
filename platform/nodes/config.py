"""Configuration of the per-node kernels."""

from dataclasses import dataclass

from loomvideo.platform.config import option
from loomvideo.platform.nodes.artifacts import (
    CACHE_VARIABLE,
    LOCK_TIMEOUT_VARIABLE,
    PREBUILT_VARIABLE,
    SHARED_VARIABLE,
)


@dataclass
class KernelConfig:
    """The ``kernels`` section of a job."""

    backend: str = option("auto", "auto (cpp on CPU, triton on CUDA), eager, cpp or triton")
    attention: str = option(
        "auto", "on CUDA: auto (the fastest there is, checked), flash3, flash4, cudnn, flash2, sdpa or math"
    )
    required: bool = option(False, "stop rather than replace a back end that cannot be built or disagrees with eager")
    cache_dir: str = option("", "node-local folder of compiled kernels; default /tmp/loomvideo-kernels-UID")
    shared_store: str = option("", "folder all nodes reach (fsspec path) to seed caches from and publish builds to")
    prebuilt: str = option("", "read-only folders of the image with compiled kernels, joined by ':'")
    lock_timeout_s: float = option(600.0, "how long to wait for another process's build on the same node")
    watch_interval_s: float = option(5.0, "how often to look for nodes that joined, to prepare them too")

    def environment(self) -> dict[str, str]:
        """Environment variables for every process of a job; what is unset leaves the node's own value."""
        values = {
            CACHE_VARIABLE: self.cache_dir,
            SHARED_VARIABLE: self.shared_store,
            PREBUILT_VARIABLE: self.prebuilt,
            LOCK_TIMEOUT_VARIABLE: str(self.lock_timeout_s),
        }
        return {name: value for name, value in values.items() if value}
