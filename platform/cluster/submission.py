"""Submit a job to a Ray cluster by run name, follow it, and return its exit code.

A run name is submitted at most once at a time: a second submit follows the job that is there, and one after a failure
starts the next attempt, which continues the run.
"""

import asyncio
import itertools
import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomvideo.platform.cluster.upload import MIB, ShippedFiles, plan_upload, refuse_secret, too_large
from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import JOB_AGENT, PACKAGES_INSTALLED

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

JOB_KEY = "loomvideo.job"
RUN_KEY = "loomvideo.run"
ACTIVE = ("PENDING", "RUNNING")
STOPPED_EXIT_CODE = 130
LOST_EXIT_CODE = 3


@dataclass(frozen=True)
class SubmissionPlan:
    """One submission, ready to be sent or printed.

    Attributes:
        address: URL of the dashboard.
        job: ``pretrain``, …
        run: Run name.
        entrypoint: Command on the cluster.
        wheel: Code to ship, or None to run the image's own.
        working_dir: Folder to ship, or None.
        environment: Variables of the job; no secrets.
        metadata: Further metadata of the job.
        packages: pip packages that the cluster's nodes install for the job; none where an image has them.
    """

    address: str
    job: str
    run: str
    entrypoint: tuple[str, ...]
    wheel: Path | None = None
    working_dir: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment, with local paths."""
        environment: dict[str, Any] = {"env_vars": self.environment} if self.environment else {}
        if self.wheel:
            environment["py_modules"] = [str(self.wheel)]
        if self.packages:
            environment["pip"] = {"packages": list(self.packages)}
            # Ray's own limit of ten minutes is short for torch's CUDA build.
            environment["config"] = {"setup_timeout_seconds": round(PACKAGES_INSTALLED.here())}
        return environment

    @property
    def all_metadata(self) -> dict[str, str]:
        """Metadata that finds the job again."""
        return {JOB_KEY: self.job, RUN_KEY: self.run, **self.metadata}

    def command_line(self, submission_id: str) -> str:
        """The ``ray job submit`` line that does the same."""
        command = ["ray", "job", "submit", "--address", self.address, "--submission-id", submission_id]
        if self.working_dir:
            command += ["--working-dir", str(self.working_dir)]
        if self.runtime_env:
            command += ["--runtime-env-json", json.dumps(self.runtime_env, sort_keys=True)]
        command += ["--metadata-json", json.dumps(self.all_metadata, sort_keys=True)]
        return f"{shlex.join(command)} -- {shlex.join(self.entrypoint)}"


def locked_packages(lock: Path) -> tuple[str, ...]:
    """The pins of a lock file as pip takes them; Ray's is left out, since a cluster runs its own.

    Raises:
        UserError: if the file is not there.
    """
    if not lock.is_file():
        raise UserError(f"{lock}: not found; run from a checkout, or list packages in the profile")
    pins = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    return tuple(pin for pin in pins if pin and not pin.startswith("ray=="))


def ship_files(arguments: Sequence[str], folder: Path) -> list[str]:
    """Copy local YAML files that arguments name (``preset=./mine.yaml``) into a folder and name the copies instead.

    Other arguments stay as they were typed, texts that happen to end in ``.yaml`` among them. Files of one name from
    several folders get a number.

    Raises:
        UserError: if the preset's file is missing, or a file looks secret.
    """
    shipped = []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if separator and value.endswith((".yaml", ".yml")):
            path = Path(value)
            if path.is_file():
                refuse_secret(path, path.stat().st_size)
                argument = f"{key}={_copy_beside(path, folder)}"
            elif key == "preset":
                raise UserError(f"{argument}: file {path} not found here, so it cannot be sent along")
        shipped.append(argument)
    return shipped


def _copy_beside(path: Path, folder: Path) -> str:
    """Copy a file into a folder and return its name there: another one when its own is taken by other content."""
    folder.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    for number in itertools.count(1):
        target = folder / (path.name if number == 1 else f"{path.stem}-{number}{path.suffix}")
        if not target.exists():
            target.write_bytes(content)
        if target.is_file() and target.read_bytes() == content:
            return target.name
    raise AssertionError("unreachable")


def ship_folder(source: Path, folder: Path, limit_bytes: int) -> ShippedFiles:
    """Copy a checked working directory into a folder."""
    upload = plan_upload(source, limit_bytes)
    upload.copy_to(folder)
    return upload


def check_size(wheel: Path | None, working_dir: Path | None, limit_bytes: int) -> None:
    """Refuse an upload over the limit.

    Raises:
        UserError: naming the largest files.
    """
    paths = [wheel] if wheel else []
    if working_dir:
        paths += [path for path in working_dir.rglob("*") if path.is_file()]
    files = [(path, path.stat().st_size) for path in paths]
    total = sum(size for _, size in files)
    if total > limit_bytes:
        raise UserError(too_large("upload", files, total, limit_bytes))


def connect(address: str) -> "JobSubmissionClient":
    """A client of a cluster's jobs API.

    Raises:
        UserError: if it cannot be reached, refuses the token, or runs another Ray.
    """
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        # Ray reads the server's version when it connects, for its own checks, and has no public name for it.
        running = client._server_ray_version
    except ConnectionError as error:
        raise UserError(
            f"{address}: no Ray dashboard answers there; is the cluster up and the address right?"
        ) from error
    except AuthenticationError as error:
        raise UserError(
            f"{address}: refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
        ) from error
    except (requests.HTTPError, RuntimeError) as error:
        raise UserError(f"{address}: {str(error).splitlines()[0]}") from error
    if running != ray.__version__:
        raise UserError(f"{address}: runs Ray {running}, this machine {ray.__version__}; install ray=={running}")
    return client


def jobs_of(client: "JobSubmissionClient", job: str | None = None, run: str | None = None) -> list["JobDetails"]:
    """Our jobs on a cluster, oldest first."""
    jobs = [
        details
        for details in client.list_jobs()
        if details.submission_id
        and details.metadata
        and JOB_KEY in details.metadata
        and job in (None, details.metadata[JOB_KEY])
        and run in (None, details.metadata.get(RUN_KEY))
    ]
    return sorted(jobs, key=lambda details: details.start_time or 0)


def next_submission_id(plan: SubmissionPlan, attempts: Sequence["JobDetails"]) -> str:
    """The id of a run's next attempt."""
    return f"{plan.job}-{plan.run}-{len(attempts) + 1}"


@dataclass(frozen=True)
class Submitted:
    """What a submit came to.

    Attributes:
        submission_id: The job.
        started: False when the job was there already.
        finished: True when there is nothing to do: the same command has succeeded.
    """

    submission_id: str
    started: bool
    finished: bool = False


def submit(client: "JobSubmissionClient", plan: SubmissionPlan, again: bool = False) -> Submitted:
    """Start a run's job unless it is running already or has succeeded with the same command.

    Args:
        client: What :func:`connect` gave.
        plan: What to submit.
        again: Start even after the same command has succeeded.
    """
    attempts = jobs_of(client, plan.job, plan.run)
    active = [details for details in attempts if details.status in ACTIVE]
    if active:
        return Submitted(active[-1].submission_id, started=False)
    entrypoint = shlex.join(plan.entrypoint)
    done = attempts and attempts[-1].status == "SUCCEEDED" and attempts[-1].entrypoint == entrypoint
    if done and not again:
        return Submitted(attempts[-1].submission_id, started=False, finished=True)
    submission_id = next_submission_id(plan, attempts)
    runtime_env = plan.runtime_env | ({"working_dir": str(plan.working_dir)} if plan.working_dir else {})
    deadline = time.monotonic() + JOB_AGENT.here()
    while True:
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=plan.all_metadata,
            )
            return Submitted(submission_id, started=True)
        except RuntimeError as error:
            # A cluster that has just started takes jobs a moment after it answers.
            if "No available agent" in str(error) and time.monotonic() < deadline:
                time.sleep(2.0)
                continue
            # Two people may submit the same run at once: the second follows the first's job.
            if submission_id not in {details.submission_id for details in jobs_of(client, plan.job, plan.run)}:
                raise
            return Submitted(submission_id, started=False)


def follow(
    client: "JobSubmissionClient",
    submission_id: str,
    write: Callable[[str], None],
    lost_after_s: float = 120.0,
    retry_s: float = 2.0,
) -> int:
    """Write a job's log as it grows and return its exit code.

    The connection may break (a proxy's timeout, a restarting port-forward) without consequence for the job or for what
    is returned: only the job's own status decides.

    Args:
        client: What :func:`connect` gave.
        submission_id: The job.
        write: Takes pieces of the log, each once.
        lost_after_s: How long the dashboard may be away.
        retry_s: Pause between attempts.

    Returns:
        0 when it succeeded, its own exit code (or 1) when it failed, 130 when it was stopped, 3 when the cluster is
        gone: submitting the same run again continues it.
    """
    log = _Log(client, submission_id, write)
    last_contact = time.monotonic()
    while True:
        try:
            # Of a job that it does not know Ray's dashboard logs the whole request of its log, the token included.
            client.get_job_info(submission_id)
            asyncio.run(log.tail())
            details = client.get_job_info(submission_id)
            last_contact = time.monotonic()
        except Exception as error:  # aiohttp, requests and Ray each have their own kind for a broken connection
            if _unknown_job(error):
                write(f"\nthe cluster does not know {submission_id}: its head was replaced; submit the run again\n")
                return LOST_EXIT_CODE
            if log.connected:
                # It may have held for hours: the cluster is away only since now.
                last_contact = time.monotonic()
            if time.monotonic() - last_contact > lost_after_s:
                write(f"\nno answer for {lost_after_s:.0f} s ({error}); submit the run again to continue it\n")
                return LOST_EXIT_CODE
            time.sleep(retry_s)
            continue
        if details.status not in ACTIVE:
            return _exit_code(details, write)
        time.sleep(retry_s)


class _Log:
    """A log that is read from its beginning on every connection and written once."""

    def __init__(self, client: "JobSubmissionClient", submission_id: str, write: Callable[[str], None]):
        self.client, self.submission_id, self.write = client, submission_id, write
        self.written = 0
        self.connected = False

    async def tail(self) -> None:
        position, self.connected = 0, False
        async for piece in self.client.tail_job_logs(self.submission_id):
            self.connected = True
            fresh = piece[max(0, self.written - position) :]
            position += len(piece)
            if fresh:
                self.write(fresh)
                self.written = position


def _exit_code(details: "JobDetails", write: Callable[[str], None]) -> int:
    if details.status == "SUCCEEDED":
        return 0
    # Ray's message repeats the end of the log that was just written; its first line says why.
    reason = (details.message or "").splitlines() or ["no reason given"]
    write(f"\n{details.submission_id}: {details.status}: {reason[0]}\n")
    if details.status == "STOPPED":
        return STOPPED_EXIT_CODE
    return details.driver_exit_code or 1


def _unknown_job(error: Exception) -> bool:
    return "status code 404" in str(error) or "does not exist" in str(error)


def upload_summary(plan: SubmissionPlan) -> str:
    """What is shipped, in words."""
    parts = []
    if plan.wheel:
        parts.append(f"{plan.wheel.name} ({plan.wheel.stat().st_size / MIB:.2f} MiB)")
    if plan.working_dir:
        files = [path for path in plan.working_dir.rglob("*") if path.is_file()]
        parts.append(f"{len(files)} files ({sum(path.stat().st_size for path in files) / MIB:.2f} MiB)")
    if plan.packages:
        parts.append(f"a list of {len(plan.packages)} pip packages, which nodes install once")
    return " and ".join(parts) or "nothing (the image's code)"
