"""The page on Ray Serve: one light replica for HTTP, and generator replicas, one a GPU, that scale with the queue."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException

from loomvideo.pipelines.serving.app import PageConfig, create_app
from loomvideo.pipelines.serving.jobs import Progress, Result
from loomvideo.pipelines.serving.requests import GenerationRequest
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError
from loomvideo.platform.time_limits import SERVE_STOP

APPLICATION = "loomvideo"
GENERATOR, PAGE = "Generator", "Page"


class RequestGenerator(Protocol):
    """A loaded model."""

    def generate(self, request: GenerationRequest, on_step: Callable[[int, int], None]) -> Result:
        """Generate one file; ``on_step(done, all)`` may raise to stop it."""
        ...


@dataclass
class ReplicaConfig:
    """Generator replicas: each holds the whole model."""

    min_replicas: int = option(1, "generators kept ready")
    max_replicas: int = option(1, "generators at most; more than the minimum are started while requests wait")
    num_gpus: float = option(0, "GPUs of a generator")
    num_cpus: float = option(1, "CPUs of a generator")
    upscale_delay_s: float = option(10, "seconds of waiting requests before another generator starts")
    downscale_delay_s: float = option(600, "idle seconds before one stops")


class _Stopped(Exception):  # noqa: N818 - a request that nobody waits for any more
    pass


class GeneratorReplica:
    """Runs one request at a time in a thread and streams its progress."""

    def __init__(self, load: Callable[[], RequestGenerator]):
        self._generator = load()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Progress | Result]:
        """Events of one request; cancelling it stops the generation at its next step."""
        loop, events, stopped = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def on_step(step: int, steps: int) -> None:
            if stopped.is_set():
                raise _Stopped
            loop.call_soon_threadsafe(events.put_nowait, Progress(step, steps))

        yield Progress(0, 0)
        work = asyncio.ensure_future(asyncio.to_thread(self._generator.generate, request, on_step))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield work.result()
        finally:
            stopped.set()
            # The next request must not run beside this one's last step.
            await asyncio.gather(work, return_exceptions=True)

    def check_health(self) -> None:
        """Serve's probe: a replica whose process answers is healthy."""


def build_application(
    load: Callable[[], RequestGenerator], page: PageConfig, replicas: ReplicaConfig
) -> serve.Application:
    """The Serve application: ``load`` runs once in every generator replica."""
    scaling = {
        "min_replicas": replicas.min_replicas,
        "max_replicas": max(replicas.max_replicas, replicas.min_replicas),
        "target_ongoing_requests": 1,
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
    }
    generator = serve.deployment(
        name=GENERATOR,
        max_ongoing_requests=1,
        autoscaling_config=scaling,
        ray_actor_options={"num_gpus": replicas.num_gpus, "num_cpus": replicas.num_cpus},
        # Serve stops generators that it replaces or no longer needs: none may lose what it makes.
        graceful_shutdown_timeout_s=page.requests.max_run_s,
    )(GeneratorReplica)

    @serve.deployment(
        name=PAGE,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=page.stop_s + SERVE_STOP.here(),
    )
    @serve.ingress(lambda: page_app(page))
    class Page:
        def __init__(self, generator: serve.handle.DeploymentHandle):
            self.generator = generator

        async def drain(self, seconds: float) -> int:
            return await drain_here(seconds)

    return Page.bind(generator.bind(load))


_APPS: list[FastAPI] = []
"""The page's interface in the process of its replica."""


def page_app(page: PageConfig) -> FastAPI:
    """The page's interface in this process."""
    _APPS.append(create_app(generate_on_a_replica, page, ready_generators))
    return _APPS[-1]


async def drain_here(seconds: float) -> int:
    """Drain the interface of this process; see :meth:`JobQueue.drain`."""
    return sum([await app.state.queue.drain(seconds) for app in _APPS])


def drain(seconds: float) -> int:
    """Take no more requests and let the running ones end.

    Args:
        seconds: How long they may take.

    Returns:
        How many stay in the store for the next server.
    """
    return serve.get_deployment_handle(PAGE, APPLICATION).drain.remote(seconds).result(timeout_s=seconds + 30)


async def ready_generators() -> int:
    """Generator replicas that are running."""

    def count() -> int:
        application = serve.status().applications.get(APPLICATION)
        deployment = application.deployments.get(GENERATOR) if application else None
        states = deployment.replica_states if deployment else {}
        return sum(number for state, number in states.items() if str(state).endswith("RUNNING"))

    return await asyncio.to_thread(count)


async def generate_on_a_replica(request: GenerationRequest) -> AsyncIterator[Progress | Result]:
    """The page's backend: the generators of its application, whose queue is Serve's own."""
    handle = serve.get_deployment_handle(GENERATOR, APPLICATION).options(stream=True)
    stream = handle.generate.remote(request)
    try:
        async for event in stream:
            yield event
    except RayTaskError as error:
        raise error.cause from error
    except (ActorDiedError, RayServeException) as error:
        raise UserError("the generator stopped in the middle: try again") from error
    finally:
        stream.cancel()
