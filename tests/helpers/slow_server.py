"""A page whose generator takes a while and notes what it made: ``python slow_server.py PORT STORE LOG``."""

import asyncio
import sys
from pathlib import Path

import uvicorn

from loomvideo.pipelines.serving.app import PageConfig, create_app
from loomvideo.pipelines.serving.jobs import Progress, Result
from loomvideo.pipelines.serving.requests import RequestLimits

port, store, log = sys.argv[1:]
one_at_a_time = asyncio.Semaphore(4)


async def generate(request):
    """Four at a time, each a moment."""
    async with one_at_a_time:
        yield Progress(0, 1)
        await asyncio.sleep(0.05)
        with Path(log).open("a") as file:
            file.write(request.prompt + "\n")
        yield Result(request.prompt.encode(), "image/png")


config = PageConfig(store=store, requests=RequestLimits(max_waiting=1000, kept_results=1000))
uvicorn.run(create_app(generate, config), host="127.0.0.1", port=int(port), log_level="warning")
