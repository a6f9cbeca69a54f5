"""``loomvideo serve``: the page on Ray Serve until it is interrupted."""

import functools
import ipaddress
import os
import signal
import threading
from pathlib import Path

from ray import serve

from loomvideo.jobs.command import job_config
from loomvideo.jobs.serving.config import ServeConfig
from loomvideo.jobs.weights.model_choice import model_source
from loomvideo.model.loading import ModelSource
from loomvideo.model.sizes import stated_left_out
from loomvideo.pipelines.serving.app import PageConfig
from loomvideo.pipelines.serving.deployment import APPLICATION, build_application, drain
from loomvideo.pipelines.serving.examples import read_examples
from loomvideo.pipelines.serving.guards import LOOPBACK_NAMES
from loomvideo.pipelines.serving.model_generator import PageGenerator
from loomvideo.pipelines.serving.store import MEMORY
from loomvideo.pipelines.serving.users import Users
from loomvideo.platform.console import console
from loomvideo.platform.ray_session import ray_session
from loomvideo.platform.time_limits import SERVE_PROXY

TOKEN_VARIABLE, STORE_VARIABLE = "LOOMVIDEO_SERVE_TOKEN", "LOOMVIDEO_SERVE_STORE"


def run(config: ServeConfig) -> None:
    """Serve until SIGINT, which stops at once, or SIGTERM, which lets running generations end.

    Raises:
        UserError: if there is no such checkpoint, or its size is unknown.
    """
    out = console()
    source, application = _application(config)
    token = _token(config)
    # A busy machine takes longer than Serve's 5 s to start its proxy.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(round(SERVE_PROXY.here())))
    if not token and not config.users and not _is_local(config.host):
        out.print(f"warning: everyone who reaches {config.host} can use this; set {TOKEN_VARIABLE}", style="yellow")
    told_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.set())
    with ray_session():
        try:
            serve.start(http_options={"host": config.host, "port": config.port})
            serve.run(application, name=APPLICATION, route_prefix="/")
            out.print(f"serving {source.weights} on http://{config.host}:{config.port}; Ctrl-C stops it")
            try:
                told_to_stop.wait()
                seconds = config.drain_s
                out.print(f"stopping: running generations have {seconds:g} s to end")
            except KeyboardInterrupt:
                seconds = 0.0
                out.print("stopping")
            out.print(f"{drain(seconds)} generations are left for the next start")
        except KeyboardInterrupt:
            out.print("stopped")
        finally:
            serve.shutdown()


def build(arguments: dict[str, list[str]]) -> serve.Application:
    """The application of a RayService: ``{"arguments": ["preset=5b", "checkpoint=…"]}``, as on the command line.

    Raises:
        UserError: if there is no such checkpoint, or an argument is wrong.
    """
    # The service of Ray listens where it is told to, not on `host`.
    return _application(job_config(ServeConfig, "serve", arguments["arguments"]), on_host=False)[1]


def _application(config: ServeConfig, on_host: bool = True) -> tuple[ModelSource, serve.Application]:
    config.generation.check()
    source = model_source(config, drop_exact=True)
    width, height = config.generation.size()
    defaults = {
        "steps": config.generation.steps,
        "num_frames": config.generation.num_frames,
        "width": width,
        "height": height,
    }
    negative = config.generation.negative_prompt
    negative = source.size.negative_prompt if negative is None else negative
    if negative:
        defaults["negative_prompt"] = negative
    left_out = stated_left_out(source.weights)
    hosts = tuple(config.hosts) or (LOOPBACK_NAMES if on_host and _is_local(config.host) else ())
    page = PageConfig(
        token=_token(config),
        users=config.users,
        store=_store(config),
        title=config.title,
        uploads=config.uploads,
        requests=config.requests,
        defaults=defaults,
        hosts=hosts,
        grid=source.size.grid,
        examples=read_examples(config.examples, left_out=left_out) if config.examples else (),
        stop_s=config.drain_s,
        # A RayService is replaced by a whole new one beside it.
        hands_over=not on_host,
        left_out=left_out,
    )
    Users.read(page.token, page.users)  # a mistake in the file is said here, not in a replica's log
    load = functools.partial(PageGenerator.load, source, config.generation, config.requests)
    return source, build_application(load, page, config.replicas)


def _store(config: ServeConfig) -> str:
    """Where jobs are, from any working directory."""
    place = config.store or os.environ.get(STORE_VARIABLE) or str(Path(config.runs) / "serve" / "jobs.sqlite")
    return place if place == MEMORY or "://" in place else str(Path(place).absolute())


def _token(config: ServeConfig) -> str:
    return config.token or os.environ.get(TOKEN_VARIABLE, "")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
