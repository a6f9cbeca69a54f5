"""Check every node of a cluster before a job burns GPUs on it: one task a node, one table, under a minute."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import requests
from rich.table import Table

from loomvideo.platform.cluster.node_checks import Check, Probe, node_probes, run_probes
from loomvideo.platform.cluster.pods import MIN_BUS_VARIABLE
from loomvideo.platform.console import coloured, console, table
from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import DASHBOARD, DOCTOR_COLLECTIVE, DOCTOR_NODE

CLOCK_SKEW_S = 2.0
# Between GPUs a small message measures latency; between CPUs a large one takes long.
ALL_REDUCE_MIB = {"gloo": 16, "nccl": 512}
GROUP_LABEL = "loomvideo.io/group"

COMPARED = ("versions", "abi")


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        rows: ``(node, check)``; checks of the cluster as a whole have the node ``cluster``.
        seconds: How long it took.
    """

    rows: tuple[tuple[str, Check], ...]
    seconds: float

    @property
    def failed(self) -> list[tuple[str, Check]]:
        """The failed checks."""
        return [(node, check) for node, check in self.rows if check.status == "fail"]

    def table(self) -> Table:
        """The findings, problems last where the eye is."""
        found = table("node", "check", "", "found", title=f"{len(self.rows)} checks in {self.seconds:.0f} s")
        order = {"ok": 0, "warn": 1, "fail": 2}
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for node, check in sorted(self.rows, key=lambda row: order[row[1].status]):
            found.add_row(node, check.name, coloured(check.status, colours[check.status]), check.detail)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For an artifact of the run."""
        rows = [{"node": node, "check": c.name, "status": c.status, "detail": c.detail} for node, c in self.rows]
        return {"seconds": self.seconds, "failed": len(self.failed), "checks": rows}


def examine_machine(
    storage: str | None = None, tracking_uri: str | None = None, extra: Sequence[Probe] = ()
) -> Diagnosis:
    """Check this machine alone."""
    started = time.monotonic()
    results = run_probes([*node_probes(storage, tracking_uri), *extra])
    rows = tuple((socket.gethostname(), Check(**result)) for result in results)
    return Diagnosis(rows, time.monotonic() - started)


def examine_cluster(
    storage: str | None = None,
    tracking_uri: str | None = None,
    dashboard_url: str | None = None,
    extra: Sequence[Probe] = (),
    timeout_s: float = 0.0,
) -> Diagnosis:
    """Check every node of the cluster this process is connected to (``ray.init`` was called).

    Args:
        storage: Folder or URL that jobs write to.
        tracking_uri: MLflow.
        dashboard_url: Checked for refusing anonymous requests; the connected cluster's when None.
        extra: Further checks to run on every node, importable there.
        timeout_s: How long a node may take to answer; the usual time when 0.
    """
    import ray

    timeout_s = timeout_s or DOCTOR_NODE.here()
    started = time.monotonic()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # A head without CPUs takes no tasks of jobs; it takes this one, which asks for none.
    task = ray.remote(num_cpus=0, max_retries=0)(_examine_node)
    references = {node["NodeID"]: task.options(**_pinned(node)).remote(storage, tracking_uri, extra) for node in nodes}
    rows: list[tuple[str, Check]] = []
    deadline = time.monotonic() + timeout_s
    for node in nodes:
        name = f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"
        try:
            results = ray.get(references[node["NodeID"]], timeout=max(deadline - time.monotonic(), 1.0))
        except (ray.exceptions.RayError, TimeoutError) as error:
            rows.append((name, Check("reached", "fail", _failure(error, timeout_s))))
            continue
        rows += [(name, Check(**result)) for result in results]
        rows.append((name, _clock(node, timeout_s)))
    rows += [("cluster", check) for check in _compare(rows)]
    rows.append(("cluster", _guarded(dashboard_url or _dashboard_url())))
    # An unreachable node would make the collective wait for its time-out and say nothing new.
    if len(nodes) > 1 and not any(check.name == "reached" for _, check in rows):
        rows += [("cluster", check) for check in all_reduce(nodes, timeout_s)]
    return Diagnosis(tuple(rows), time.monotonic() - started)


def preflight(examine: Callable[[], Diagnosis]) -> Diagnosis:
    """Examine before a job and refuse to start it on a sick cluster.

    Raises:
        UserError: naming the first failed check and how to skip.
    """
    diagnosis = examine()
    if diagnosis.failed:
        console(stderr=True).print(diagnosis.table())
        node, check = diagnosis.failed[0]
        more = f" and {len(diagnosis.failed) - 1} more" if len(diagnosis.failed) > 1 else ""
        raise UserError(f"doctor: {node}: {check.name}: {check.detail}{more}; fix it, or set doctor=false to go on")
    return diagnosis


def _examine_node(storage: str | None, tracking_uri: str | None, extra: Sequence[Probe]) -> list[dict]:
    return run_probes([*node_probes(storage, tracking_uri), *extra])


def _failure(error: Exception, timeout_s: float) -> str:
    import ray

    if isinstance(error, TimeoutError | ray.exceptions.GetTimeoutError):
        return f"no answer within {timeout_s:.0f} s"
    # The last line of a remote traceback names the error; the first ones are Ray's.
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _wall_time() -> float:
    return time.time()


def _pinned(node: dict[str, Any]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _compare(rows: Sequence[tuple[str, Check]]) -> list[Check]:
    """What must be equal on all nodes."""
    checks = []
    for name in COMPARED:
        values = {check.value for _, check in rows if check.name == name and check.value is not None}
        if len(values) > 1:
            checks.append(Check(f"same {name}", "fail", " | ".join(sorted(values))))
    return checks


def _clock(node: dict[str, Any], timeout_s: float) -> Check:
    """A node's clock against this one's: it must read a time between asking and hearing the answer."""
    import ray

    before = time.time()
    there = ray.get(ray.remote(num_cpus=0)(_wall_time).options(**_pinned(node)).remote(), timeout=timeout_s)
    skew = max(before - there, there - time.time(), 0.0)
    if skew > CLOCK_SKEW_S:
        return Check("clock", "fail", f"off by {skew:.1f} s or more; start chrony or ntpd on the node")
    return Check("clock", "ok", f"within {max(skew, time.time() - before):.2f} s")


def _dashboard_url() -> str | None:
    import ray

    address = ray._private.worker._global_node.webui_url if ray._private.worker._global_node else None
    return f"http://{address}" if address and not address.startswith("http") else address


def _guarded(url: str | None) -> Check:
    """The jobs API runs any command it is sent, so it must refuse who has no token."""
    if not url:
        return Check("dashboard", "ok", "none")
    try:
        status = requests.get(f"{url}/api/jobs/", timeout=DASHBOARD.here()).status_code
    except requests.RequestException as error:
        return Check("dashboard", "warn", f"{url}: not reachable from here ({type(error).__name__})")
    if status in (401, 403):
        return Check("dashboard", "ok", f"{url}: refuses anonymous requests ({status})")
    return Check("dashboard", "fail", f"{url}: answers anonymous requests; start Ray with RAY_AUTH_MODE=token")


def all_reduce(nodes: Sequence[dict[str, Any]], timeout_s: float) -> list[Check]:
    """Bandwidth of an all-reduce between one process a node, group by group (gloo on CPU, NCCL on GPU nodes).

    A group whose nodes state the least bandwidth they must have (``min_bus_gb_per_s`` of the profile) fails below it.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        if node["Resources"].get("CPU", 0) > 0:
            groups.setdefault((node.get("Labels") or {}).get(GROUP_LABEL, ""), []).append(node)
    checks = [
        _group_all_reduce(f"all-reduce {name}".strip(), members, timeout_s)
        for name, members in sorted(groups.items())
        if len(members) > 1
    ]
    return checks or [Check("all-reduce", "ok", "no group of more than one worker node")]


def _group_all_reduce(name: str, members: Sequence[dict[str, Any]], timeout_s: float) -> Check:
    import ray

    on_gpu = all(node["Resources"].get("GPU", 0) >= 1 for node in members)
    actor = ray.remote(num_cpus=0, num_gpus=1 if on_gpu else 0)(_Member)
    actors = [actor.options(**_pinned(node)).remote() for node in members]
    try:
        address = ray.get(actors[0].address.remote(), timeout=timeout_s)
        rates = [member.run.remote(rank, len(actors), address, on_gpu) for rank, member in enumerate(actors)]
        slowest = min(ray.get(rates, timeout=timeout_s))
        wanted = max(ray.get([member.wanted_gb_per_s.remote() for member in actors], timeout=timeout_s))
    except (ray.exceptions.RayError, TimeoutError) as error:
        return Check(name, "fail", f"{len(actors)} nodes: {str(error).strip().splitlines()[-1]}")
    finally:
        for member in actors:
            ray.kill(member)
    return judge_bandwidth(name, len(actors), "nccl" if on_gpu else "gloo", slowest, wanted)


def judge_bandwidth(name: str, num_nodes: int, backend: str, slowest: float, wanted: float) -> Check:
    """The verdict on a measured bus bandwidth, both in GB/s; ``wanted`` 0 only reports."""
    found = f"{num_nodes} nodes, {ALL_REDUCE_MIB[backend]} MiB, {backend}: {slowest:.2f} GB/s"
    if slowest >= wanted:
        return Check(name, "ok", found)
    return Check(
        name,
        "fail",
        f"{found}, and min_bus_gb_per_s is {wanted:g}: NCCL does not use the fast network; NCCL_DEBUG=INFO in the "
        "group's environment says which it found",
    )


class _Member:
    """One process of the all-reduce."""

    def address(self) -> str:
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def wanted_gb_per_s(self) -> float:
        """What this node's profile says it must reach."""
        return float(os.environ.get(MIN_BUS_VARIABLE, 0.0))

    def run(self, rank: int, world_size: int, address: str, on_gpu: bool) -> float:
        """Bytes a second of the bus, in GB/s."""
        import datetime

        import torch
        from torch import distributed

        backend = "nccl" if on_gpu else "gloo"
        distributed.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=DOCTOR_COLLECTIVE.here()),
        )
        data = torch.ones(ALL_REDUCE_MIB[backend] * 1024**2 // 4, device="cuda" if on_gpu else "cpu")
        distributed.all_reduce(data)
        repeats = 3
        started = time.monotonic()
        for _ in range(repeats):
            data.fill_(1.0)
            distributed.all_reduce(data)
        # Reading a value waits for the device.
        total = float(data[0])
        seconds = (time.monotonic() - started) / repeats
        distributed.destroy_process_group()
        if total != world_size:
            raise ValueError(f"all-reduce of ones over {world_size} nodes gave {total}")
        return 2 * (world_size - 1) / world_size * data.numel() * 4 / seconds / 1e9
