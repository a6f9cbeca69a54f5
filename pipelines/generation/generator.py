"""One generation from files to a file: read source and references, run the pipeline, write the result and its facts."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loomvideo.model import adapters
from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.conditions import Conditions
from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.model.guidance import Guidance
from loomvideo.model.loading import ModelSource, fitted
from loomvideo.model.pipeline import LoomVideoPipeline, load_pipeline
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.model.tasks import Task, requested_task
from loomvideo.pipelines.generation.film import edit_whole
from loomvideo.pipelines.generation.memory import largest_work
from loomvideo.pipelines.generation.playback import Playback
from loomvideo.pipelines.generation.requests import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Request
from loomvideo.pipelines.generation.results import content_hash, digest, sidecar_path, write_result
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.media.decode import DecodeError, MediaInfo
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.windows import media_window, picture_window
from loomvideo.platform.errors import UserError

MAX_SIDE = 4096


@dataclass(frozen=True)
class Prepared:
    """A request whose files are read and encoded."""

    request: Request
    task: str
    conditions: Conditions
    facts: dict[str, Any]
    playback: Playback | None = None
    """How an edit plays like its source; None for what has no source, or does not take after it."""
    num_frames: int = 1
    """Frames of the file."""

    @property
    def frames_left_out(self) -> int:
        """Frames at the source's end that are not edited."""
        return 0 if self.playback is None else self.playback.num_frames - self.num_frames


class FileGenerator:
    """Generates files with a loaded pipeline; media are decoded in a process of their own.

    Args:
        pipeline: The model.
        settings: How to generate; may be replaced between requests.
        checkpoint: What the results' facts say of the model.
    """

    def __init__(self, pipeline: LoomVideoPipeline, settings: Settings, checkpoint: dict[str, Any]):
        self.pipeline, self.settings, self.checkpoint = pipeline, settings, checkpoint
        self.decoder = IsolatedDecoder()

    @classmethod
    def load(cls, source: ModelSource, settings: Settings, requests: Sequence[Request] = ()) -> "FileGenerator":
        """Load a checkpoint onto the GPU, or the CPU where there is none.

        Args:
            source: What to load; ``memory=auto`` is decided for the largest of the requests.
            settings: How to generate; may be replaced between requests.
            requests: What will be asked for, as far as it is known; none stands for an edit with one reference.

        Raises:
            UserError: if it cannot be read or does not fit.
        """
        if settings.shortcuts.fp8:
            dataclasses.replace(source, drop_exact=True).check()
        source = dataclasses.replace(source, drop_exact=source.drop_exact and settings.shortcuts.fp8)
        source = fitted(source, largest_work(source.size, settings, requests))
        with _memory_errors(f"checkpoint={source.weights}: does not fit into memory"):
            pipeline = load_pipeline(source)
        checkpoint: dict[str, Any] = {
            "path": source.weights,
            "fingerprint": weights_fingerprint(source.weights),
            "model": source.size.name,
        }
        if pipeline.few_steps is not None:
            checkpoint["few_steps"] = pipeline.few_steps.to_dict()
        if source.lora:
            checkpoint["lora"] = adapters.fingerprints(source.lora)
        return cls(pipeline, settings, checkpoint)

    def close(self) -> None:
        """End the decoder process."""
        self.decoder.close()

    def facts(self, request: Request) -> dict[str, Any]:
        """What determines the result: request, settings, checkpoint and the content of its files."""
        files = {path: content_hash(path) for path in [request.source, *request.refs] if path}
        settings = self.settings.facts()
        if settings["negative_prompt"] is None:
            settings["negative_prompt"] = self.pipeline.negative_prompt
        return {**asdict(request), "settings": settings, "checkpoint": self.checkpoint, "inputs": files}

    def is_done(self, request: Request) -> bool:
        """Whether the file is there and was made from exactly this."""
        sidecar = sidecar_path(request.out)
        if not (Path(request.out).is_file() and sidecar.is_file()):
            return False
        return json.loads(sidecar.read_text())["digest"] == digest(self.facts(request))

    def generate(self, request: Request, on_step: Callable[[int, int], None] | None = None) -> Path:
        """Generate one file and the JSON of its facts beside it.

        Args:
            request: What to generate.
            on_step: Called after each step with the steps done and all.

        Raises:
            UserError: for a file that cannot be used, a size that cannot be made, or too little memory.
        """
        task, info = self._checked(request)
        if self.settings.whole and info is not None and task.source == "video":
            playback = Playback.of(request.source, info, self.settings, "video")
            return edit_whole(self, request, task, playback, on_step)
        prepared = self._prepared(request, task, info)
        return self.write(prepared, self.sample(prepared, on_step=on_step))

    def prepare(self, request: Request) -> Prepared:
        """Read and encode what a request names.

        Raises:
            UserError: as :meth:`generate`.
        """
        return self._prepared(request, *self._checked(request))

    def _checked(self, request: Request) -> tuple[Task, MediaInfo | None]:
        """The task of a request, and what its source holds."""
        request.check()
        settings = self.settings
        settings.check()
        self.pipeline.grid.check_frames("num_frames", settings.num_frames)
        if max(settings.size()) > MAX_SIDE:
            raise UserError(f"width={settings.width} height={settings.height}: sides of at most {MAX_SIDE} are made")
        info = self.probe("source", request.source) if request.source else None
        task = requested_task(request.task, info.kind if info else None)
        accepted = IMAGE_SUFFIXES if task.is_image else VIDEO_SUFFIXES
        if Path(request.out).suffix.lower() not in accepted:
            made = "a picture" if task.is_image else "a video"
            raise UserError(f"out={request.out}: {task.name} makes {made}, name a {' or '.join(accepted)} file")
        return task, info

    def _prepared(self, request: Request, task: Task, info: MediaInfo | None) -> Prepared:
        settings = self.settings
        playback, source = None, None
        num_frames = 1 if task.is_image else settings.num_frames
        with self.memory_errors(request):
            if info is not None and settings.keep:
                playback = Playback.of(request.source, info, settings, task.makes)
                num_frames = min(playback.num_frames, num_frames)
                source = self.read("source", request.source, playback.indices(0, num_frames), playback.fit)
                missing = self.pipeline.grid.covering_frames(num_frames) - num_frames
                source = np.concatenate([source, np.repeat(source[-1:], missing, axis=0)])
            elif info is not None:
                source = self._clip(request.source, info, task)
                num_frames = len(source)
            references = [self.picture(path) for path in request.refs]
            conditions = self.pipeline.encode(
                task.name,
                request.prompt,
                source,
                references,
                None if source is not None else settings.size(),
                num_frames,
                settings.negative_prompt if request.negative_prompt is None else request.negative_prompt,
            )
        return Prepared(request, task.name, conditions, self.facts(request), playback, num_frames)

    def sample(
        self,
        prepared: Prepared,
        shortcuts: Shortcuts | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Denoise: latents [channels, frames, height, width].

        Args:
            prepared: What :meth:`prepare` gave.
            shortcuts: Approximations; None takes those of the settings.
            on_step: Called after each step with the steps done and all.

        Raises:
            UserError: for too little memory, or shortcuts that cannot be used.
        """
        settings = self.settings
        shortcuts = settings.shortcuts if shortcuts is None else shortcuts
        steps = self.pipeline.num_steps(shortcuts.steps or settings.steps)

        def count(step: int, latents: torch.Tensor) -> None:
            if on_step:
                on_step(step + 1, steps)

        with self.memory_errors(prepared.request):
            return self.pipeline.sample(
                prepared.conditions,
                settings.steps,
                self.guidance(prepared.task),
                prepared.request.seed,
                settings.batch_branches,
                on_step=count,
                shortcuts=shortcuts,
            )

    def guidance(self, task: str) -> Guidance:
        """The scales of a task."""
        return self.settings.guidance(self.pipeline.default_guidance(task))

    def generate_seeds(
        self,
        requests: Sequence[Request],
        on_step: Callable[[int, int], None] | None = None,
        write: Callable[[Prepared, torch.Tensor], Future[Path]] | None = None,
    ) -> Iterator[Path]:
        """Generate files of requests that differ in nothing but ``seed`` and ``out``: files are read and encoded once.

        Args:
            requests: One a seed; ``batch_seeds`` of them are denoised in one pass.
            on_step: Called after each step with the steps done and all.
            write: Begins to write a result, which ends while the next pass is denoised; None writes it at once.

        Raises:
            UserError: as :meth:`generate`.
        """
        settings, prepared = self.settings, self.prepare(requests[0])
        passes = [requests[start:][: settings.batch_seeds] for start in range(0, len(requests), settings.batch_seeds)]
        steps = self.pipeline.num_steps(settings.shortcuts.steps or settings.steps)
        pending: list[Future[Path]] = []
        for number, together in enumerate(passes):

            def count(step: int, latents: torch.Tensor, number: int = number) -> None:
                if on_step:
                    on_step(number * steps + step + 1, len(passes) * steps)

            with self.memory_errors(together[0]):
                made = self.pipeline.sample_seeds(
                    prepared.conditions, [request.seed for request in together], settings.steps,
                    self.guidance(prepared.task), settings.batch_branches, count, settings.shortcuts,
                )  # fmt: skip
            yield from (written.result() for written in pending)
            pending = []
            for request, latents in zip(together, made, strict=True):
                result = dataclasses.replace(prepared, request=request, facts=self.facts(request))
                if write is None:
                    yield self.write(result, latents)
                else:
                    pending.append(write(result, latents))
        yield from (written.result() for written in pending)

    def write(self, prepared: Prepared, latents: torch.Tensor) -> Path:
        """Decode latents and write the file, decoding while it is encoded.

        Raises:
            UserError: for too little memory.
        """
        path, playback = Path(prepared.request.out), prepared.playback
        _, _, rows, columns = prepared.conditions.latent_shape
        facts = {
            **prepared.facts,
            "digest": digest(prepared.facts),
            "task": prepared.task,
            "num_frames": prepared.num_frames,
            "size": list(playback.size if playback else self.pipeline.grid.size(rows, columns)),
        }
        with self.memory_errors(prepared.request):
            pieces = self.pipeline.decode_stream(latents)
            if playback is None:
                write_result(path, pieces, facts, self.settings.fps or TARGET_FPS)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                write_result(path, playback.shown(pieces, 1), facts)
            else:
                shown = playback.shown(pieces, prepared.num_frames)
                write_result(path, shown, facts, playback.fps, playback.colours(), playback.add_sound)
        return path

    def memory_errors(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Says in one line that memory ran out for a request."""
        return _memory_errors(f"out={request.out}: out of memory; lower width, height, buckets or num_frames")

    def probe(self, key: str, path: str) -> MediaInfo:
        """What a file holds.

        Raises:
            UserError: naming key and file, if it cannot be used.
        """
        try:
            info = self.decoder.probe(path, TARGET_FPS)
        except DecodeError as error:
            raise UserError(f"{key}={path}: {error}") from error
        if max(info.width, info.height) > MAX_SIDE:
            raise UserError(
                f"{key}={path}: {info.width}x{info.height} pixels, sides of at most {MAX_SIDE} are accepted"
            )
        if info.num_frames < 1:
            raise UserError(f"{key}={path}: has no frames")
        return info

    def _clip(self, path: str, info: MediaInfo, task: Task) -> np.ndarray:
        """Frames of the source as training saw clips, cropped to its bucket."""
        settings = self.settings
        rate = settings.fps or TARGET_FPS
        window = media_window(info, task.makes, settings.buckets, settings.num_frames, self.pipeline.grid, rate)
        window = dataclasses.replace(window, size=settings.asked_size() or window.size)
        return self.read("source", path, window.indices, window.fit)

    def picture(self, path: str) -> np.ndarray:
        """A reference, brought to its bucket: uint8 [height, width, 3]."""
        window = picture_window(self.probe("refs", path), self.settings.buckets)
        return self.read("refs", path, window.indices, window.fit)[0]

    def read(
        self, key: str, path: str, indices: Sequence[int], fit: Callable[[torch.Tensor], torch.Tensor]
    ) -> np.ndarray:
        """Frames of a file at the size that ``fit`` gives them, uint8 [frames, height, width, 3].

        They are fitted in pieces: a large source is never in memory whole.
        """
        try:
            pieces = self.decoder.read(path, indices, TARGET_FPS)
            return np.concatenate([fit(torch.from_numpy(piece)).numpy() for piece in pieces])
        except DecodeError as error:
            raise UserError(f"{key}={path}: {error}") from error


@contextlib.contextmanager
def _memory_errors(message: str) -> Iterator[None]:
    """Say in one line that memory ran out, on the GPU or beside it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(message) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(message) from error
