"""Where a rehearsal's nodes are: together, or as root in namespaces with a network and a disk of their own each."""

import ipaddress
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

OUTSIDE_HOST = 254
# Gives a process its own names of hosts, host name and Ray folder, then becomes the command.
ENTER = 'mount --bind "$0" /etc/hosts && hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
RAY_FOLDER = "t"


@dataclass
class Loopback:
    """All nodes on this machine's loopback interface, with one folder for Ray's files.

    Attributes:
        folder: Ray's files are in ``folder/t``; the path must be short, for sockets.
        outside: Address of those who are no node.
        environment: Variables of every node's processes.
    """

    folder: Path
    outside: str = "127.0.0.1"
    environment: dict[str, str] = field(default_factory=dict)

    def address_of(self, name: str) -> str:
        """A node's address."""
        return self.outside

    def command(self, name: str, command: list[str]) -> list[str]:
        """A command that runs on a node."""
        return command

    def logs(self) -> list[Path]:
        """Folders with the logs of Ray's nodes."""
        return sorted((self.folder / RAY_FOLDER).glob("session_2*/logs"))

    def close(self) -> None:
        """Nothing to take down."""


class Namespaces:
    """Every node with its own address, host name, processes and Ray folder, joined by a bridge; needs root.

    The nodes reach each other and ``outside``, this machine's address on the bridge, and nothing else. Each sees its
    own folder as ``folder/t``: what Ray unpacks for one is not there for the others.

    Args:
        folder: The path must be short, for sockets.
    """

    def __init__(self, folder: Path):
        number = _free_subnet()
        self.folder, self.bridge = folder, f"lv{number}"
        self.subnet = ipaddress.ip_network(f"10.213.{number}.0/24")
        self.outside = str(self.subnet[OUTSIDE_HOST])
        # Gloo would look for its interface by the host's name.
        self.environment = {"GLOO_SOCKET_IFNAME": "eth0"}
        self._nodes: dict[str, int] = {}
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.outside}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def address_of(self, name: str) -> str:
        """A node's address; its namespace is made when it is first asked for."""
        if name not in self._nodes:
            self._nodes[name] = len(self._nodes) + 1
            self._make(name)
        return str(self.subnet[self._nodes[name]])

    def command(self, name: str, command: list[str]) -> list[str]:
        """A command that runs on a node."""
        self.address_of(name)
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(name)}", "unshare", "--mount", "--uts"]
        # Ray finds what runs on a machine by looking through its processes.
        enter += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        own, seen_as = self.folder / "nodes" / name, self.folder / RAY_FOLDER
        own.mkdir(parents=True, exist_ok=True)
        seen_as.mkdir(exist_ok=True)
        return [*enter, "sh", "-c", ENTER, str(self._hosts(name)), name, str(own), str(seen_as), *command]

    def logs(self) -> list[Path]:
        """Folders with the logs of Ray's nodes."""
        return sorted((self.folder / "nodes").glob("*/session_2*/logs"))

    def cut(self, name: str) -> None:
        """Pull a node's cable."""
        _ip("link", "set", self._cable(name), "down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        _ip("link", "set", self._cable(name), "up")

    def close(self) -> None:
        """Take everything down."""
        for name in self._nodes:
            _ip("netns", "delete", self._namespace(name))
        _ip("link", "delete", self.bridge)

    def _make(self, name: str) -> None:
        space, address = self._namespace(name), str(self.subnet[self._nodes[name]])
        self._hosts(name).write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        _ip("netns", "add", space)
        _ip("link", "add", self._cable(name), "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", self._cable(name), "master", self.bridge, "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "eth0", "up")
        # Ray finds a machine's address by asking which one it would use to reach the outside.
        _ip("-n", space, "route", "add", "default", "via", self.outside)

    def _namespace(self, name: str) -> str:
        return f"{self.bridge}-{self._nodes[name]}"

    def _cable(self, name: str) -> str:
        return f"{self.bridge}v{self._nodes[name]}"

    def _hosts(self, name: str) -> Path:
        return self.folder / f"{name}.hosts"


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0:
        return False
    try:
        return subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _free_subnet() -> int:
    taken = {
        address.address.split(".")[2]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.address.startswith("10.213.")
    }
    return next(number for number in range(1, 255) if str(number) not in taken)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
