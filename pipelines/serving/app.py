"""The HTTP interface of the page: uploads, jobs, results, health and metrics.

Every error is JSON ``{"error": "one line"}``. Files are sent as raw bodies and never named by the client.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from loomvideo.model.codec import LatentGrid
from loomvideo.model.tasks import REQUESTED, meant, requested_task
from loomvideo.pipelines.serving.examples import PageExample
from loomvideo.pipelines.serving.guards import check_host, check_origin
from loomvideo.pipelines.serving.jobs import Backend, Job, JobQueue, QuotaReachedError, StoreAwayError, StoreFullError
from loomvideo.pipelines.serving.requests import GenerationRequest, RequestLimits
from loomvideo.pipelines.serving.schemas import (
    Health,
    JobBody,
    JobState,
    UploadState,
    files,
    job_schema,
    problems,
    raw_body,
)
from loomvideo.pipelines.serving.store import MEMORY, ServiceStore
from loomvideo.pipelines.serving.uploads import Upload, UploadLimits, UploadReader
from loomvideo.pipelines.serving.users import User, Users
from loomvideo.platform.errors import UserError

logger = logging.getLogger(__name__)
TAKEOVER_S = 60.0
"""How long the server before may take to let go of the store."""
# No script, style or picture from elsewhere; results are shown from blobs.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class PageConfig:
    """What the page offers and accepts; :class:`Users` says what ``token`` and ``users`` are."""

    token: str = ""
    users: str = ""
    store: str = MEMORY
    title: str = "LoomVideo"
    uploads: UploadLimits = field(default_factory=UploadLimits)
    requests: RequestLimits = field(default_factory=RequestLimits)
    # Shown as placeholders of the form's fields, such as {"steps": 50}.
    defaults: dict[str, Any] = field(default_factory=dict)
    # Names that the server answers as, without ports; none for every one.
    hosts: tuple[str, ...] = ()
    # Which sizes the model can make; None leaves that to the generator.
    grid: LatentGrid | None = None
    # Offered to click.
    examples: tuple[PageExample, ...] = ()
    # Seconds that running generations have to end when this server is stopped or replaced.
    stop_s: float = 0.0
    # Whether the next server may ask for the store; else it waits until this one is gone.
    hands_over: bool = False
    # Tasks that the checkpoint was not trained on of late.
    left_out: frozenset[str] = frozenset()


class Metrics:
    """Prometheus measures of one server."""

    def __init__(self, queue: Callable[[], JobQueue]):
        self.registry = CollectorRegistry()
        names = {"namespace": "loomvideo", "subsystem": "serve", "registry": self.registry}
        self.jobs = Counter("jobs", "Generations that ended", ["task", "status"], **names)
        self.seconds = Histogram(
            "job_seconds",
            "Seconds from start to end of a generation",
            ["task"],
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            **names,
        )
        self.uploads = Counter("uploads", "Uploads", ["outcome"], **names)
        self.rejected = Counter("rejected_requests", "Requests refused", ["status"], **names)
        Gauge("jobs_waiting", "Generations that have not started", **names).set_function(lambda: queue().num_waiting)
        Gauge("jobs_running", "Generations in progress", **names).set_function(lambda: queue().num_running)

    def count(self, job: Job) -> None:
        """Record a job that ended."""
        self.jobs.labels(job.request.task, job.status).inc()
        if job.started_s is not None:
            self.seconds.labels(job.request.task).observe(max(job.finished_s - job.started_s, 0.0))


def create_app(
    backend: Backend, config: PageConfig, live_generators: Callable[[], Awaitable[int]] | None = None
) -> FastAPI:
    """The page and its interface over a backend.

    Args:
        backend: Generates.
        config: What is offered and accepted.
        live_generators: How many generators are ready, for ``/health``; None where that is not known.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not config.hands_over:
            await asyncio.to_thread(store.take, max(TAKEOVER_S, config.stop_s + TAKEOVER_S / 6))
        else:
            # The server before goes on until this one can generate.
            while live_generators is not None and not await live_generators():
                await asyncio.sleep(1)
            await asyncio.to_thread(store.take, TAKEOVER_S + config.stop_s, ask=True)
        queue.resume()
        watching = asyncio.create_task(hand_over()) if config.hands_over else None
        yield
        if watching is not None:
            watching.cancel()
        if not app.state.replaced:
            await queue.drain(config.stop_s)
        reader.close()
        store.close()

    async def hand_over() -> None:
        """Let the next server have the store as soon as it asks."""
        while not await asyncio.to_thread(store.is_asked_for):
            await asyncio.sleep(1)
        logger.info("the next server takes over: running generations have %g s to end", config.stop_s)
        await queue.drain(config.stop_s)
        app.state.replaced = True
        store.close()

    app = FastAPI(title=config.title, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.replaced = False
    queue: JobQueue
    metrics = Metrics(lambda: queue)
    users, store = Users.read(config.token, config.users), ServiceStore(config.store)
    queue = app.state.queue = JobQueue(backend, config.requests, store, on_finished=metrics.count, grid=config.grid)
    reader = UploadReader(config.uploads)

    def authorised(request: Request) -> User:
        user = users.find(request.headers.get("authorization", "").removeprefix("Bearer "))
        if user is None:
            raise HTTPException(401, "a token is needed: ask whoever runs this server")
        return user

    Asking = Annotated[User, Depends(authorised)]  # noqa: N806 - a type

    def known(job_id: str, user: Asking) -> Job:
        job = queue.get(job_id)
        if job is None or job.owner != user.name:
            raise HTTPException(404, "no such generation, or it is forgotten")
        return job

    guarded = [Depends(authorised)]
    KnownJob = Annotated[Job, Depends(known)]  # noqa: N806 - a type

    @app.exception_handler(StarletteHTTPException)
    async def _http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        metrics.rejected.labels(error.status_code).inc()
        headers = dict(error.headers or {})
        if error.status_code == 405:  # each method is a route of its own, which knows no other
            headers["Allow"] = ", ".join(sorted(_methods(app, request.url.path)))
        return JSONResponse({"error": error.detail}, error.status_code, headers=headers)

    @app.exception_handler(UserError)
    async def _user_error(request: Request, error: UserError) -> JSONResponse:
        metrics.rejected.labels(422).inc()
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(StoreFullError)
    async def _full(request: Request, error: StoreFullError) -> JSONResponse:
        return await _http_error(request, HTTPException(507, str(error)))

    @app.exception_handler(StoreAwayError)
    async def _away(request: Request, error: StoreAwayError) -> JSONResponse:
        return await _http_error(request, HTTPException(503, str(error), {"Retry-After": "5"}))

    @app.exception_handler(RequestValidationError)
    async def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return await _http_error(request, HTTPException(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))

    @app.middleware("http")
    async def _headers(request: Request, call_next: Callable) -> Response:
        try:
            check_host(request, config.hosts)
            check_origin(request)
            if app.state.replaced:
                raise HTTPException(503, "a newer server takes over: try again in a moment", {"Retry-After": "3"})
        except HTTPException as refused:
            response: Response = await _http_error(request, refused)
        else:
            response = await call_next(request)
        response.headers.update(SECURITY_HEADERS)
        return response

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return (resources.files("loomvideo.pipelines.serving") / "page.html").read_text(encoding="utf-8")

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        alive = None if live_generators is None else await live_generators()
        state = "stopping" if queue.draining else "no generator" if alive == 0 else "ok"
        if state != "ok":
            response.status_code = 503
        return Health(status=state, generators=alive, waiting=queue.num_waiting, running=queue.num_running)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/api/options", dependencies=guarded)
    async def options() -> dict:
        limits = {
            "upload_mib": config.uploads.max_bytes / 2**20,
            "duration_s": config.uploads.max_duration_s,
            "side": config.uploads.max_side,
            "references": config.requests.max_references,
            "prompt_characters": config.requests.max_prompt_characters,
            "steps": config.requests.max_steps,
            "frames": config.requests.max_frames,
            "pixels": config.requests.max_pixels,
        }
        offered = {name: requested_task(name) for name in REQUESTED}
        tasks = {
            name: {
                "source": task.needs_source,
                "references": task.needs_references,
                "trained": not config.left_out.issuperset(meant(name)),
            }
            for name, task in offered.items()
        }
        examples = [example.describe() for example in config.examples]
        told = {"title": config.title, "tasks": tasks, "limits": limits, "defaults": config.defaults}
        return told | {"examples": examples}

    @app.get(
        "/api/examples/{number}/{name}",
        dependencies=guarded,
        response_class=Response,
        responses=files("image/*", "video/*") | problems(404),
    )
    async def example(number: int, name: str) -> Response:
        found = config.examples[number] if 0 <= number < len(config.examples) else None
        media = {} if found is None else {str(index): media for index, media in enumerate(found.references)}
        media |= {} if found is None or found.source is None else {"source": found.source}
        if name not in media:
            raise HTTPException(404, "no such example")
        return Response(media[name].content, media_type=media[name].media_type)

    @app.post(
        "/api/uploads",
        dependencies=guarded,
        status_code=201,
        response_model=UploadState,
        responses=problems(413),
        openapi_extra=raw_body("application/octet-stream", schema={"type": "string", "format": "binary"}),
    )
    async def upload(request: Request, user: Asking) -> dict:
        content = await _body(request, config.uploads.max_bytes)
        try:
            checked = await asyncio.to_thread(reader.check, content)
        except UserError:
            metrics.uploads.labels("refused").inc()
            raise
        metrics.uploads.labels("accepted").inc()
        await asyncio.to_thread(store.add_upload, checked, config.uploads, user.name)
        return checked.describe()

    @app.post(
        "/api/jobs",
        dependencies=guarded,
        status_code=202,
        response_model=JobState,
        responses=problems(413, 429, 503),
        openapi_extra=raw_body("application/json", schema=job_schema(config.requests)),
    )
    async def submit(
        request: Request, user: Asking, idempotency_key: Annotated[str | None, Header(max_length=100)] = None
    ) -> dict:
        if queue.draining:
            raise HTTPException(503, "the server is stopping: try again in a minute", {"Retry-After": "60"})
        body = _parse(await _body(request, 1 << 20))
        values = body.model_dump()
        named = [body.source, *body.references[: config.requests.max_references + 1]]
        source, *references = await asyncio.to_thread(_uploads, store, named, config.uploads, user.name)
        values |= {"source": source, "references": references}
        quotas = user.quotas(config.requests.max_active_per_user, config.requests.max_per_day_per_user)
        try:
            job = queue.submit(GenerationRequest(**values), user.name, quotas, idempotency_key or None)
        except asyncio.QueueFull as error:
            message = "too many generations are waiting: try again in a few minutes"
            raise HTTPException(429, message, {"Retry-After": "60"}) from error
        except QuotaReachedError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_after_s)}) from error
        return _describe(job, queue)

    @app.get("/api/jobs/{job_id}", dependencies=guarded, response_model=JobState, responses=problems(404))
    async def status(job: KnownJob) -> dict:
        return _describe(job, queue)

    @app.get(
        "/api/jobs/{job_id}/result",
        dependencies=guarded,
        response_class=Response,
        responses=files("image/png", "video/mp4") | problems(404, 409),
    )
    async def result(job: KnownJob) -> Response:
        made = await asyncio.to_thread(store.result, job.id)
        if made is None:
            raise HTTPException(409, f"the generation is {job.status}")
        return Response(made.content, media_type=made.media_type)

    @app.get(
        "/api/jobs/{job_id}/source",
        dependencies=guarded,
        response_class=Response,
        responses=files("image/*", "video/*") | problems(404, 409),
    )
    async def source(job: KnownJob) -> Response:
        original = await asyncio.to_thread(store.source, job.id)
        if original is None:
            raise HTTPException(409, "the generation had no source")
        return Response(original.content, media_type=original.media_type)

    @app.delete("/api/jobs/{job_id}", dependencies=guarded, status_code=204, responses=problems(404))
    async def cancel(job: KnownJob) -> Response:
        queue.cancel(job.id)
        return Response(status_code=204)

    return app


def _methods(app: FastAPI, path: str) -> set[str]:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return {method for route in routes if route.path_regex.match(path) for method in route.methods}


def _uploads(store: ServiceStore, ids: Sequence[str | None], limits: UploadLimits, owner: str) -> list[Upload | None]:
    return [None if upload_id is None else store.upload(upload_id, limits, owner) for upload_id in ids]


async def _body(request: Request, most: int) -> bytes:
    """The body, refused as soon as it is longer than allowed, whatever its header said."""
    too_long = HTTPException(413, f"too large: at most {most / 2**20:.0f} MiB")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise too_long
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise too_long
    return bytes(content)


def _parse(body: bytes) -> JobBody:
    try:
        return JobBody.model_validate_json(body)
    except ValueError as error:
        problems = getattr(error, "errors", list)()
        where = ".".join(str(part) for part in problems[0]["loc"]) if problems else ""
        raise HTTPException(422, f"{where or 'request'}: {problems[0]['msg'] if problems else 'not JSON'}") from error


def _describe(job: Job, queue: JobQueue) -> dict:
    request = job.request
    return {
        "id": job.id,
        "status": job.status,
        "position": queue.position(job) if job.status == "queued" else 0,
        "step": job.step,
        "steps": job.steps,
        "error": job.error,
        "task": request.task,
        "prompt": request.prompt,
        "seed": request.seed,
        "created_s": job.created_s,
        "started_s": job.started_s,
        "finished_s": job.finished_s,
        "source": request.source.describe() if request.source else None,
        "references": [reference.describe() for reference in request.references],
        "media_type": job.media_type,
    }
