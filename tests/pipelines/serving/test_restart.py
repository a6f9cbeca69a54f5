"""What a server was asked for outlives it: jobs, files, quotas; none is lost and none ends twice."""

import asyncio
import io
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
from fixtures.mlflow_server import own_postgres
from PIL import Image
from starlette.testclient import TestClient

from loomvideo.pipelines.serving.app import PageConfig, create_app
from loomvideo.pipelines.serving.client import Client
from loomvideo.pipelines.serving.jobs import Progress, Result
from loomvideo.pipelines.serving.requests import RequestLimits
from loomvideo.pipelines.serving.store import ServiceStore
from loomvideo.pipelines.serving.users import Users
from loomvideo.platform.errors import UserError

SERVER = Path(__file__).parents[2] / "helpers" / "slow_server.py"


async def never(request):
    yield Progress(1, 9)
    await asyncio.sleep(3600)
    yield Result(b"", "image/png")


async def at_once(request):
    yield Progress(1, 1)
    source = b"" if request.source is None else request.source.content
    yield Result(request.prompt.encode() + source[:4], "image/png")


@pytest.fixture(scope="module")
def postgres():
    """The address of a Postgres; None where it is not installed."""
    with own_postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    """A new store of either kind."""
    if request.param == "sqlite":
        return str(tmp_path / "new folder" / "jobs.sqlite")
    return new_database(request.getfixturevalue("postgres"))


def new_database(address):
    if address is None:
        pytest.skip("needs Debian's postgresql")
    pytest.importorskip("psycopg2")
    name = f"jobs_{secrets.token_hex(4)}"
    engine = sqlalchemy.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"create database {name}"))
    engine.dispose()
    return f"{address.replace('+psycopg2', '').rpartition('/')[0]}/{name}"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def submit(client, prompt, **body):
    headers = {"authorization": f"Bearer {body.pop('token')}"} if "token" in body else {}
    return client.post("/api/jobs", json={"task": "t2i", "prompt": prompt, **body}, headers=headers)


def wait(client, job_id, *states):
    end = time.monotonic() + 20
    while (job := client.get(f"/api/jobs/{job_id}").json())["status"] not in states:
        assert time.monotonic() < end, job
        time.sleep(0.02)
    return job


def test_the_next_server_goes_on_with_what_is_unfinished(store):
    config = PageConfig(store=store)
    with TestClient(create_app(never, config)) as client:
        upload = client.post("/api/uploads", content=png()).json()["id"]
        running = submit(client, "one", task="edit", source=upload).json()["id"]
        wait(client, running, "running")
        waiting = submit(client, "two").json()["id"]
        unused = client.post("/api/uploads", content=png()).json()["id"]
    with TestClient(create_app(at_once, config)) as client:
        assert wait(client, running, "done")["source"]["width"] == 64
        assert client.get(f"/api/jobs/{running}/result").content == b"one\x89PNG"
        assert client.get(f"/api/jobs/{running}/source").content == png()
        assert wait(client, waiting, "done")["step"] == 1
        assert submit(client, "three", task="edit", source=unused).status_code == 202
    with TestClient(create_app(never, config)) as client:  # finished: not begun again
        assert wait(client, running, "done")["prompt"] == "one"


def test_a_job_that_stops_the_server_is_given_up(store):
    config = PageConfig(store=store, requests=RequestLimits(max_attempts=2))
    with TestClient(create_app(never, config)) as client:
        job = submit(client, "x").json()["id"]
        wait(client, job, "running")
    left = ServiceStore(store)
    left.start(job, attempts=2, started_s=time.time())  # as a server leaves it that was killed
    left.close()
    with TestClient(create_app(at_once, config)) as client:
        assert wait(client, job, "failed")["error"] == "the server stopped 2 times while it ran"


def test_draining_lets_the_running_end_and_keeps_the_waiting(tmp_path):
    config = PageConfig(store=str(tmp_path / "jobs.sqlite"))
    gate = asyncio.Event()

    async def first_alone(request):
        if request.prompt == "later":
            await asyncio.sleep(3600)
        yield Progress(1, 2)
        await gate.wait()
        yield Result(b"made", "image/png")

    app = create_app(first_alone, config)
    with TestClient(app) as client:
        running, later = (submit(client, prompt).json()["id"] for prompt in ("now", "later"))
        wait(client, running, "running")
        draining = client.portal.start_task_soon(app.state.queue.drain, 20.0)
        while not app.state.queue.draining:
            time.sleep(0.01)
        refused = submit(client, "new")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
        assert client.get("/health").json()["status"] == "stopping"
        client.portal.call(gate.set)
        assert draining.result() == 1
        assert wait(client, running, "done")
    with TestClient(create_app(at_once, config)) as client:
        wait(client, later, "done")


def test_asking_twice_under_one_name_makes_one(store):
    config = PageConfig(store=store)
    body, headers = {"task": "t2i", "prompt": "x"}, {"idempotency-key": "mine"}
    with TestClient(create_app(at_once, config)) as client:
        first = client.post("/api/jobs", json=body, headers=headers).json()["id"]
        wait(client, first, "done")
        assert client.post("/api/jobs", json=body, headers=headers).json()["id"] == first
        assert client.post("/api/jobs", json=body).json()["id"] != first
        other = client.post("/api/jobs", json=body | {"prompt": "y"}, headers=headers)
        assert (other.status_code, "another request" in other.json()["error"]) == (422, True)
        unnamed = [client.post("/api/jobs", json=body, headers={"idempotency-key": ""}).json()["id"] for _ in "ab"]
        assert unnamed[0] != unnamed[1]
        refused = client.post("/api/jobs", json=body, headers={"idempotency-key": "x" * 101})
        assert (refused.status_code, "idempotency-key" in refused.json()["error"]) == (422, True)


def test_two_servers_do_not_share_a_store(store):
    first, second = ServiceStore(store), ServiceStore(store)
    first.take()
    with pytest.raises(UserError, match="another server uses it"):
        second.take()
    first.close()
    second.take()
    second.close()


def test_stores_that_cannot_be_opened_are_named_without_their_password(monkeypatch):
    pytest.importorskip("psycopg2")
    with pytest.raises(UserError, match=r"store=nosuch://x: cannot be opened"):
        ServiceStore("nosuch://x")
    with pytest.raises(UserError, match=r"store=postgresql://ann:\*\*\*@localhost:1/x: cannot be opened") as refused:
        ServiceStore("postgresql://ann:secret@localhost:1/x")
    assert "secret" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match="make setup EXTRAS=server"):
        ServiceStore("postgresql://ann:secret@localhost:1/x")


def test_a_database_that_is_away_for_a_while_costs_nothing(postgres, monkeypatch):
    store = new_database(postgres)
    monkeypatch.setattr("loomvideo.pipelines.serving.jobs.STORE_PAUSE_S", 0.02)
    gate = asyncio.Event()

    async def after_the_gate(request):
        yield Progress(1, 2)
        await gate.wait()
        yield Result(b"made", "image/png")

    app = create_app(after_the_gate, PageConfig(store=store))
    with TestClient(app) as client:
        job = submit(client, "x").json()["id"]
        wait(client, job, "running")
        refuse(postgres, store, True)
        answer = submit(client, "y")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "does not answer" in answer.json()["error"]
        client.portal.call(gate.set)
        time.sleep(0.1)
        assert client.get(f"/api/jobs/{job}").json()["status"] == "running"
        refuse(postgres, store, False)
        assert wait(client, job, "done")
        assert client.get(f"/api/jobs/{job}/result").content == b"made"
        with pytest.raises(UserError, match="another server uses it"):  # the lock is taken again
            ServiceStore(store).take()
        refuse(postgres, store, True)
        refuse(postgres, store, False)
        other = ServiceStore(store)
        other.take()
        assert "another server has taken" in submit(client, "z").json()["error"]
        other.close()


def refuse(postgres, store, refused):
    """End all connections to a database and let none in, or let them in again."""
    name = store.rpartition("/")[2]
    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"alter database {name} allow_connections {not refused}"))
        ends = "select pg_terminate_backend(pid) from pg_stat_activity where datname = :name"
        connection.execute(sqlalchemy.text(ends), {"name": name})
    engine.dispose()


def test_names_that_no_database_takes_are_unknown(store):
    with TestClient(create_app(at_once, PageConfig(store=store))) as client:
        assert client.get("/api/jobs/a%00b").status_code == 404
        assert submit(client, "x", task="edit", source="a\0b").status_code == 422
        assert submit(client, "x\0y", negative_prompt="\0").status_code in (202, 422)
        body, odd = {"task": "t2i", "prompt": "x"}, {"idempotency-key": b"\xe9\x01"}
        assert client.post("/api/jobs", json=body, headers=odd).is_success


def test_the_next_server_takes_over_and_no_request_is_lost(store):
    async def short_or_long(request):
        yield Progress(1, 2)
        await asyncio.sleep(3600 if request.prompt == "long" else 0.2)
        yield Result(b"by the first", "image/png")

    async def one_generator():
        return 1

    config = PageConfig(store=store, hands_over=True, stop_s=1.0)
    with TestClient(create_app(short_or_long, config)) as old:
        long, short = (submit(old, prompt).json()["id"] for prompt in ("long", "short"))
        wait(old, short, "running", "done")
        with TestClient(create_app(at_once, config, one_generator)) as new:
            contents = []
            for job in (short, long):
                wait(new, job, "done")
                contents.append(new.get(f"/api/jobs/{job}/result").content)
            assert contents == [b"by the first", b"long"]
            answer = submit(old, "late")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
            wait(new, submit(new, "late").json()["id"], "done")
    with TestClient(create_app(at_once, config)) as last:
        assert wait(last, long, "done")["status"] == "done"


def test_a_server_that_no_longer_waits_is_not_waited_for(tmp_path):
    held, waiting = (ServiceStore(str(tmp_path / "jobs.sqlite")) for _ in range(2))
    held.take()
    with pytest.raises(UserError, match="another server uses it"):
        waiting.take(0.2, ask=True)
    assert not held.is_asked_for()
    held.close()


def test_deadlines_end_what_nobody_waits_for(tmp_path):
    config = PageConfig(requests=RequestLimits(max_run_s=0.1))
    with TestClient(create_app(never, config)) as client:
        late = wait(client, submit(client, "x").json()["id"], "failed")
        assert late["error"].startswith("the generation took longer than 0.1 s")
    with TestClient(create_app(never, PageConfig())) as client:
        late = wait(client, submit(client, "x", deadline_s=0.1).json()["id"], "failed")
        assert late["error"] == "not done within the 0.1 s that were asked for"


def test_people_have_their_own_jobs_and_quotas(tmp_path):
    people = tmp_path / "people.yaml"
    people.write_text(
        "ann: {token: an-example-of-a-token, max_active: 1}\n"
        "bob: {token_sha256: '" + "0" * 63 + "1', max_per_day: 2}\n"
        "cat: {token: another-long-token-here, max_per_day: 2}\n"
    )
    config = PageConfig(users=str(people), store=str(tmp_path / "jobs.sqlite"))
    ann, cat = "an-example-of-a-token", "another-long-token-here"
    with TestClient(create_app(never, config)) as client:
        assert client.get("/api/options").status_code == 401
        job = submit(client, "x", token=ann).json()["id"]
        second = submit(client, "x", token=ann)
        assert (second.status_code, second.headers["retry-after"]) == (429, "30")
        assert "1 requests waiting or running: at most 1" in second.json()["error"]
        for token, status in ((ann, 200), (cat, 404)):
            answer = client.get(f"/api/jobs/{job}", headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == status
        assert submit(client, "x", token=cat).status_code == 202
    with TestClient(create_app(never, config)) as client:  # the day's count outlives the server
        assert submit(client, "x", token=cat).status_code == 202
        assert "2 requests in 24 hours: at most 2" in submit(client, "x", token=cat).json()["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a line NAME"),
        ("ann: {}", "ann: give one of token and token_sha256"),
        ("ann: {token: short}", "shorter than 16 characters"),
        ("ann: {token: an-example-of-a-token, colour: red}", "ann: expected token"),
        ("ann: {token: an-example-of-a-token, max_active: many}", "max_active='many'"),
        ("{ann: {token: an-example-of-a-token}, bob: {token: an-example-of-a-token}}", "token is ann's too"),
    ],
)
def test_mistakes_in_the_file_of_people_are_named(tmp_path, text, message):
    (tmp_path / "people.yaml").write_text(text)
    with pytest.raises(UserError, match=r"users=.*people\.yaml") as refused:
        Users.read(file=str(tmp_path / "people.yaml"))
    assert message in str(refused.value)


@pytest.mark.slow
def test_a_hundred_clients_and_a_kill(tmp_path, store):
    """Every client gets its own picture although the server is killed in the middle; none is recorded twice."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "made.txt"
    command = [sys.executable, str(SERVER), str(port), store, str(log)]
    url = f"http://127.0.0.1:{port}"

    def ask(number):
        return Client(url, patience_s=240).generate(f"picture {number}", task="t2i").content

    server = subprocess.Popen(command)
    try:
        with ThreadPoolExecutor(100) as clients:
            asked = [clients.submit(ask, number) for number in range(100)]
            end = time.monotonic() + 240
            while not (log.is_file() and len(log.read_text().splitlines()) >= 20):
                assert time.monotonic() < end
                time.sleep(0.05)
            server.kill()
            server.wait()
            server = subprocess.Popen(command)
            answers = [future.result(timeout=300) for future in asked]
    finally:
        server.kill()
        server.wait()
    assert answers == [f"picture {number}".encode() for number in range(100)]
    kept = ServiceStore(store)
    assert kept.unfinished() == []
    kept.close()
    made = Counter(log.read_text().splitlines())
    # What ran when the server was killed is made again; nothing whose result was recorded is.
    assert sum(made.values()) - len(made) <= 4
