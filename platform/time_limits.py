"""Every fixed time limit of the platform, with its reason.

Limits that a user may set are configuration keys; those here nobody has to think about. They are meant for an ordinary
machine: :meth:`TimeLimit.here` gives a slower one more, except where somebody else counts the seconds (Kubernetes, a
package index). Pauses between two looks at something are no limits and stay where they are.
"""

from dataclasses import dataclass

from loomvideo.platform.machine import patience


@dataclass(frozen=True)
class TimeLimit:
    """How long something is waited for.

    Attributes:
        seconds: The limit on an ordinary machine.
        reason: Why there is a limit, and what happens then.
        scaled: Whether a slow machine gets more.
    """

    seconds: float
    reason: str
    scaled: bool = True

    def here(self) -> float:
        """Seconds for this machine as slow as it runs now."""
        return patience(self.seconds) if self.scaled else self.seconds


RAY_START = TimeLimit(60, "Ray's processes on this machine answer, else the start is tried again, three times in all")
RAY_WORKER_START = TimeLimit(60, "a worker process of Ray imports the code and registers, else Ray starts another")
SERVE_PROXY = TimeLimit(60, "Ray Serve's proxy listens, else serving ends")
SERVE_STOP = TimeLimit(30, "the page writes down what its generators left, after `drain_s`")
WORKER_GROUP_START = TimeLimit(300, "training workers import torch and start, else the next attempt takes other nodes")
ELASTIC_GROUP_START = TimeLimit(75, "then an elastic run starts with fewer workers")
PROCESS_GROUP = TimeLimit(1800, "ranks may be apart: one writes a checkpoint to slow storage")
TRAINING_REPORTS = TimeLimit(30, "reports of workers are read, else with the next")
FATAL_GRACE = TimeLimit(5, "always waited out: the other ranks' errors may name the cause of a failure", scaled=False)
STOP_GRACE = TimeLimit(60, "a stopped run writes a checkpoint before Kubernetes kills it", scaled=False)
RESIZE_GRACE = TimeLimit(120, "an elastic run that gets other nodes writes a checkpoint first")
DUMP_GRACE = TimeLimit(5, "always waited out: ranks that hang write their stacks before the first leaves", scaled=False)
LOADER_STOP = TimeLimit(5, "threads that read samples end with the run; they are daemons and hold nothing")
BESIDE_TRAINING = TimeLimit(1800, "evaluations beside training end before the run does, else they are given up")
RAY_STATE = TimeLimit(5, "Ray's dashboard says why a worker died, where it runs")
RANK_FAILED_ALONE = TimeLimit(20, "the other ranks of a generation fail too, or wait for the one that did")
NODES_PREPARED = TimeLimit(1800, "every node builds its kernels, else the run ends naming the nodes")
DECODER = TimeLimit(60, "one read of one file, where no key says otherwise, else the file has the reason `timeout`")
REPORT_STRIP = TimeLimit(20, "a report reads the frames of one medium, else that card has no strip")
REWARD_ANSWER = TimeLimit(60, "a reward server scores one result, else it is asked again", scaled=False)
PAGE_ANSWER = TimeLimit(60, "the web page answers its Python client, else it is asked again", scaled=False)
RUN_HELD = TimeLimit(5, "another process leaves the run's folder, else this one ends")
LOCAL_STORE = TimeLimit(60, "other runs write to the same local MLflow store")
TRACKING_END = TimeLimit(
    30, "a server takes the last metrics of a run, else they are kept in `unsent_metrics.jsonl`", scaled=False
)
SAMPLE_DOWNLOAD = TimeLimit(
    180, "pip fetches the clips of the sample data, else it says how to go without", scaled=False
)
JOB_AGENT = TimeLimit(60, "a cluster that has just started takes its first job a moment later")
PACKAGES_INSTALLED = TimeLimit(
    1800, "the nodes of an existing cluster install a job's packages, else the job fails", scaled=False
)
PORT_FORWARD = TimeLimit(30, "kubectl opens a way to the cluster, else submitting ends")
DOCTOR_NODE = TimeLimit(60, "a node answers the doctor, else it is reported")
DOCTOR_COLLECTIVE = TimeLimit(30, "the nodes meet for the doctor's all-reduce, else it is reported")
DOCTOR_COMMAND = TimeLimit(10, "nvidia-smi, a compiler or MLflow answers the doctor, else it is reported")
DASHBOARD = TimeLimit(10, "the dashboard answers the doctor, else it is reported")
IDLE_NODES = TimeLimit(300, "nodes of a long-lived cluster without work are given back", scaled=False)
SERVICE_READY = TimeLimit(
    1800, "a generator of a RayService reads its weights, else KubeRay starts another", scaled=False
)
OLD_SERVICE = TimeLimit(300, "the cluster that a RayService replaces finishes what it began", scaled=False)


def all_limits() -> dict[str, TimeLimit]:
    """Every limit by its name, in the order above."""
    return {name: value for name, value in globals().items() if isinstance(value, TimeLimit)}
