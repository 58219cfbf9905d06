"""Hosts on one machine: each with a network, an address, a core and some folders of its own.

They are Linux network namespaces on one bridge; making them needs root. What runs in one reaches
the others and this machine by their addresses alone. Folders that are its own begin empty.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

INTERFACE = "eth0"
"""Of every host."""

_BEGIN = """
hostname "$0" || exit
while [ "$1" != -- ]; do mount -t tmpfs -o size=2g tmpfs "$1" || exit; shift; done
shift
exec "$@"
"""


def can_isolate() -> bool:
    """Whether this system lets this process make hosts."""
    try:
        tried = subprocess.run(
            ["unshare", "--net", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
            capture_output=True,
        )
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True)
    except FileNotFoundError:
        return False
    return tried.returncode == 0 and listed.returncode == 0


class Host:
    """One host, and what was started on it.

    Attributes:
        name: its host name.
        address: its own.
    """

    def __init__(self, name: str, address: str, core: int = 0) -> None:
        self.address = address
        self.name = name
        self._core = core
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, env: Mapping[str, str], log: Path, own: Sequence[Path]) -> None:
        """Starts a program that runs until the host dies.

        Args:
            command: program and arguments.
            env: environment.
            log: file for what it prints.
            own: folders that are empty for it, and whose content is seen by nobody else.
        """
        # with threads on the cores of others all would wait for one another
        inside = ["taskset", "--cpu-list", str(self._core)]
        inside += ["ip", "netns", "exec", self.name, "unshare", "--mount", "--uts"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*inside, "sh", "-c", _BEGIN, self.name, *map(str, own), "--", *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """What runs on it."""
        pids = _ip("netns", "pids", self.name).split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def die(self) -> None:
        """Kills all that runs on it at once, as when a machine is taken away."""
        for pid in _ip("netns", "pids", self.name).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
        if self._process is not None:
            self._process.wait(timeout=60)


class Network:
    """A bridge of this machine, and the hosts on it.

    Attributes:
        address: of this machine, for the hosts.
    """

    def __init__(self) -> None:
        number = os.getpid()  # another process may have hosts too
        self._prefix = f"10.{64 + number % 128}.{number // 128 % 256}"
        self.address = f"{self._prefix}.1"
        self._bridge = f"tb{os.getpid()}"
        self._hosts: list[Host] = []
        self.names: list[str] = []

    def up(self) -> None:
        """Makes the bridge; what a killed process left of another would answer in its place."""
        _remove_leftovers()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def host(self) -> Host:
        """Makes another host."""
        number = len(self._hosts) + 2
        name, outside, inside = (f"{kind}{os.getpid()}-{number}" for kind in "hvw")
        address = f"{self._prefix}.{number}"
        _ip("netns", "add", name)
        self.names.append(name)
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        _ip("link", "set", outside, "master", self._bridge, "up")
        _ip("link", "set", inside, "netns", name)
        for settings in (
            ("link", "set", inside, "name", INTERFACE),
            ("address", "add", f"{address}/24", "dev", INTERFACE),
            ("link", "set", INTERFACE, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-netns", name, *settings)
        cores = sorted(os.sched_getaffinity(0))
        host = Host(name, address, cores[number % len(cores)])
        self._hosts.append(host)
        return host

    def down(self) -> None:
        """Removes all that was made."""
        for host in self._hosts:
            host.die()
        for name in self.names:
            _ip("netns", "delete", name)
        _ip("link", "delete", self._bridge)


def _remove_leftovers() -> None:
    """Removes what processes made that are no more, whose numbers are in its name."""
    for line in _ip("-oneline", "link", "show", "type", "bridge").splitlines():
        found = re.search(r": (tb(\d+)):", line)
        if found and not psutil.pid_exists(int(found[2])):
            _ip("link", "delete", found[1])
    for line in _ip("netns", "list").splitlines():
        found = re.match(r"(h(\d+)-\d+)\b", line)
        if found and not psutil.pid_exists(int(found[2])):
            Host(found[1], "").die()
            _ip("netns", "delete", found[1])


def _ip(*arguments: str) -> str:
    command: Sequence[str] = ["ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def network() -> Iterator[Network]:
    """A network without hosts yet; all of it is gone afterwards."""
    made = Network()
    made.up()
    try:
        yield made
    finally:
        made.down()
