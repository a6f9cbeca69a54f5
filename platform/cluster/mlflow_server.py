"""An MLflow server with users, proxied artifacts and a host check on one machine; Kubernetes runs the same flags."""

import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from loomvideo.platform.cluster import mlflow_user
from loomvideo.platform.errors import UserError, how_to_add

USER = "loomvideo"
PASSWORD_FILE = "password"
ADMINISTRATOR = "admin"
ADMINISTRATOR_FILE = "admin-password"
SETTINGS_FILE = "basic_auth.ini"
SECRET_FILE = "flask-secret-key"


@dataclass(frozen=True)
class Server:
    """How a server is started.

    Attributes:
        folder: Its users, password and, without other settings, database and artifacts.
        command: The ``mlflow server`` line; holds no secret.
        environment: Variables with the secrets, for the server's process alone.
        url: The address at which it answers.
    """

    folder: Path
    command: tuple[str, ...]
    environment: dict[str, str]
    url: str

    @property
    def users(self) -> dict[str, str]:
        """Variables with administrator and jobs' user, for ``python mlflow_user.py URL``."""
        return {
            mlflow_user.ADMINISTRATOR[0]: ADMINISTRATOR,
            mlflow_user.ADMINISTRATOR[1]: (self.folder / ADMINISTRATOR_FILE).read_text(),
            mlflow_user.USER[0]: USER,
            mlflow_user.USER[1]: (self.folder / PASSWORD_FILE).read_text(),
        }

    @property
    def make_user(self) -> tuple[str, ...]:
        """The command that makes the jobs' user once the server answers; takes :attr:`users` as environment."""
        return (sys.executable, mlflow_user.__file__, self.url)

    def how_to_log_in(self) -> str:
        """Shell lines for jobs and people who use it; the password stays in its file."""
        return (
            f"export MLFLOW_TRACKING_URI={self.url} MLFLOW_TRACKING_USERNAME={USER}\n"
            f'export MLFLOW_TRACKING_PASSWORD="$(cat {self.folder / PASSWORD_FILE})"'
        )


def prepare_server(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    artifacts: str = "",
    allowed_hosts: str = "",
    workers: int = 1,
) -> Server:
    """Make what a server needs, once, and say how to start it.

    The database is ``MLFLOW_BACKEND_STORE_URI`` (``postgresql+psycopg2://…``; kept out of the
    command line, which every user of a machine can read) or sqlite in ``folder``; users are kept beside it.

    Args:
        folder: Kept between starts.
        host: Address to listen on.
        port: Port to listen on.
        artifacts: Folder or bucket for artifacts; ``folder/artifacts`` when empty.
        allowed_hosts: Host headers that are answered, comma-separated; the address itself and localhost when empty.
        workers: Server processes.

    Raises:
        UserError: if what users need to be checked with is not installed.
    """
    try:
        import flask_wtf  # noqa: F401
    except ImportError as error:
        raise UserError(f"mlflow-server: Flask-WTF is missing; {how_to_add('server')}") from error
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    _secret(folder / PASSWORD_FILE)
    password = _secret(folder / ADMINISTRATOR_FILE)
    database = os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{folder}/mlflow.db"
    users = f"sqlite:///{folder}/users.db"
    _private(
        folder / SETTINGS_FILE,
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = {users}\nadmin_username = {ADMINISTRATOR}\nadmin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    )
    mlflow = Path(sys.executable).with_name("mlflow")
    executable = str(mlflow) if mlflow.is_file() else shutil.which("mlflow") or "mlflow"
    hosts = allowed_hosts or f"{host}:{port},localhost:{port},127.0.0.1:{port}"
    command = (
        *(executable, "server", f"--host={host}", f"--port={port}", f"--workers={workers}", "--app-name=basic-auth"),
        *("--serve-artifacts", f"--artifacts-destination={artifacts or folder / 'artifacts'}"),
        f"--allowed-hosts={hosts}",
    )
    environment = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / SETTINGS_FILE),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _secret(folder / SECRET_FILE),
        # Its background workers serve features of other products and cost 2 GB.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return Server(folder, command, environment, f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")


def _secret(path: Path) -> str:
    if not path.is_file():
        _private(path, secrets.token_urlsafe(32))
    return path.read_text()


def _private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
