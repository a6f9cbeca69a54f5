"""A Ray cluster of several nodes on one machine, with a dashboard and a token, for rehearsals and tests."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
import requests
from node_network import RAY_FOLDER, Loopback, Namespaces


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class LocalCluster:
    """One head and any number of workers, as processes of this machine.

    Attributes:
        folder: The folder of Ray's files; its path must be short, for sockets.
        token: Opens the dashboard and the jobs API.
        environment: Further environment of the nodes.
        network: Where the nodes are; together on loopback when None.
        python: The nodes' interpreter.
        caches: Folder with a kernel cache for each node; by default they share the machine's.
        gcs_port: The head's port for nodes.
        dashboard_port: The port of the head's dashboard.
        processes: The nodes that run.
    """

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    environment: dict[str, str] = field(default_factory=dict)
    network: Loopback | Namespaces | None = None
    python: Path = Path(sys.executable)
    caches: Path | None = None
    gcs_port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = self.network or Loopback(self.folder)

    @property
    def address(self) -> str:
        """URL of the dashboard."""
        return f"http://{self.network.address_of('head')}:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """What workers and drivers on this machine join."""
        host = self.network.address_of("head")
        # Ray puts the machine's own address in the place of a loopback one, and then listens only there.
        return f"{ray.util.get_node_ip_address() if host.startswith('127.') else host}:{self.gcs_port}"

    def variables(self) -> dict[str, str]:
        """Environment of a client on this machine."""
        drop = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS")
        inherited = {key: value for key, value in os.environ.items() if key not in drop}
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_DISABLE_IMPORT_WARNING": "1"}
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"}
        # Ray makes its workers nice, which starves them on a busy machine.
        quiet["RAY_worker_niceness"] = "0"
        path = {"PATH": self._path_with_tools("bin", Path(sys.executable))}
        return inherited | mine | quiet | path | self.environment

    def node_variables(self, name: str) -> dict[str, str]:
        """Environment of a node."""
        path = {"PATH": self._path_with_tools("node-bin", self.python)}
        caches = {"LOOMVIDEO_KERNEL_CACHE": str(self.caches / name)} if self.caches else {}
        return self.variables() | path | self.network.environment | caches

    def _path_with_tools(self, folder: str, python: Path) -> str:
        tools = self.folder / folder
        tools.mkdir(parents=True, exist_ok=True)
        # Ray installs shipped wheels with whatever `pip` is on a node's PATH.
        for tool, options in (("pip", "-m pip"), ("ray", "-m ray.scripts.scripts"), ("python", "")):
            (tools / tool).write_text(f'#!/bin/sh\nexec {python} {options} "$@"\n')
            (tools / tool).chmod(0o755)
        return f"{tools}:{python.parent}:{os.environ['PATH']}"

    def start_head(self, num_cpus: int = 1) -> None:
        """Start the head and wait for it; a second call after a kill is a new head at the same address.

        On a very busy machine a head's helpers give each other up within 30 s, and the head with them: try again.
        """
        for last in (False, False, True):
            try:
                self._start_head(num_cpus)
                return
            except TimeoutError:
                if last:
                    raise

    def _start_head(self, num_cpus: int) -> None:
        self._start(
            "head",
            *("--head", f"--port={self.gcs_port}", f"--num-cpus={num_cpus}", "--include-dashboard=true"),
            f"--dashboard-host={self.network.address_of('head')}",
            *(f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={free_port()}"),
            *(f"--temp-dir={self.folder / RAY_FOLDER}", "--object-store-memory=100000000"),
        )
        self._wait("head", "/api/jobs/", lambda _: self.num_alive() == 1)

    def start_worker(self, name: str, num_cpus: int = 1, resources: dict[str, float] | None = None) -> None:
        """Start a worker node, with custom resources if any, and wait until the head counts it."""
        options = (f"--address={self.gcs_address}", f"--num-cpus={num_cpus}", "--object-store-memory=100000000")
        options += (f"--resources={json.dumps(resources)}",) if resources else ()
        # Not their number: one that was just killed may still count.
        known = self._alive()
        self._start(name, *options)
        self._wait(name, "/api/v0/nodes", lambda _: bool(self._alive() - known))

    def num_alive(self) -> int:
        """Nodes that the head counts as alive."""
        return len(self._alive())

    def _alive(self) -> set[str]:
        """Names of the nodes that the head counts as alive."""
        nodes = self._get("/api/v0/nodes").json()["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    def _get(self, page: str) -> requests.Response:
        return requests.get(self.address + page, headers={"Authorization": f"Bearer {self.token}"}, timeout=30)

    def _wait(self, name: str, page: str, ready: Callable[[requests.Response], bool], timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.processes[name].poll() is None:
            with contextlib.suppress(requests.ConnectionError):
                answer = self._get(page)
                if answer.status_code == 200 and ready(answer):
                    return
            time.sleep(0.5)
        raise TimeoutError((self.folder / f"{name}.log").read_text()[-3000:])

    def kill(self, name: str) -> None:
        """Kill a node and everything on it, as a machine that loses power does."""
        # Workers and their children may have left the node's process group.
        self._signal(name, signal.SIGKILL)
        self.processes.pop(name).wait()

    def pause(self, name: str) -> None:
        """Cut a node off: its cable is pulled or, on loopback, everything on it is stopped."""
        if isinstance(self.network, Namespaces):
            self.network.cut(name)
        else:
            self._signal(name, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """End a pause."""
        if isinstance(self.network, Namespaces):
            self.network.mend(name)
        else:
            self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: int) -> None:
        if self.processes[name].poll() is not None:
            return
        leader = psutil.Process(self.processes[name].pid)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        """End all nodes, the head last."""
        for name in [name for name in self.processes if name != "head"] + ["head"]:
            if name in self.processes:
                self.kill(name)

    def _start(self, name: str, *options: str) -> None:
        command = [
            *(str(self.python), "-m", "ray.scripts.scripts", "start", "--block"),
            f"--node-ip-address={self.network.address_of(name)}",
            # The default port may be another cluster's on this machine, and an agent without it takes no job.
            "--dashboard-agent-listen-port=0",
            *options,
        ]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.network.command(name, command),
                env=self.node_variables(name),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
