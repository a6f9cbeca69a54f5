"""What a worker runs on: its peak for MFU, and the state of its node while it trains."""

import os
import socket
import time
from pathlib import Path

import psutil
import torch

# Dense bf16 peaks in TFLOP/s from the makers' data sheets; longer names first.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def device_name(device: torch.device) -> str:
    """The accelerator's name; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def peak_tflops(name: str, configured: float = 0.0) -> float:
    """Dense bf16 peak of a device in TFLOP/s; 0 when it is not known, and then there is no MFU.

    Args:
        name: The name of the accelerator.
        configured: ``training.peak_tflops``, which wins.
    """
    return configured or next((peak for known, peak in PEAK_TFLOPS.items() if known in name), 0.0)


class NodeMonitor:
    """State of this worker's node; the first worker of each node watches it.

    Args:
        device: The device of the worker.
        disk: Folder whose disk the run writes to.
        interval_s: Least time between two readings.
    """

    def __init__(self, device: torch.device, disk: Path, interval_s: float = 10.0):
        self.device, self.disk, self.interval_s = device, disk, interval_s
        self.node = socket.gethostname()
        self._watches = os.environ.get("LOCAL_RANK", "0") == "0"
        self._read_at = time.monotonic()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def read(self, at_once: bool = False) -> dict[str, float]:
        """The figures since the last reading, or nothing when that was just now or another worker watches.

        Args:
            at_once: Read however short the time is.
        """
        elapsed_s = time.monotonic() - self._read_at
        if not self._watches or (elapsed_s < self.interval_s and not at_once):
            return {}
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        figures = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_gib": memory.used / 2**30,
            "memory_percent": memory.percent,
            "worker_memory_gib": psutil.Process().memory_info().rss / 2**30,
            "disk_free_gib": psutil.disk_usage(str(self.disk)).free / 2**30,
            "network_sent_mb_per_s": (network.bytes_sent - self._network.bytes_sent) / elapsed_s / 1e6,
            "network_received_mb_per_s": (network.bytes_recv - self._network.bytes_recv) / elapsed_s / 1e6,
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            figures["gpu_memory_used_gib"] = (total - free) / 2**30
        self._read_at, self._network = time.monotonic(), network
        return figures
