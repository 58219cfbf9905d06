"""A PostgreSQL server for tests: a new one, on a free port, gone afterwards."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from pipelines.core.cluster import free_port

USER = "re2tal"


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs: that of `initdb` on the path, else Debian's newest."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in debian), default=None)


@contextmanager
def running_postgres(folder: Path | None = None) -> Iterator[str]:
    """Runs a server on this machine's loopback, with a password that has every awkward character.

    Args:
        folder: for its data; empty, and to be reached by the user postgres if this process is
            root's, because the server refuses to run as root. None for a temporary one.

    Yields:
        The URI of an empty database.

    Raises:
        FileNotFoundError: if PostgreSQL's programs are not there.
        subprocess.CalledProcessError: if it does not start.
    """
    programs = binaries()
    if programs is None:
        raise FileNotFoundError("initdb: install PostgreSQL (on Debian, the package postgresql)")
    with tempfile.TemporaryDirectory(prefix="pg-") as temporary:
        home = folder or Path(temporary)
        password = f"@/:%&{secrets.token_urlsafe(12)}"
        _own(home)
        port = free_port()
        _run(programs, "initdb", home, password)
        _run(programs, "start", home, str(port))
        try:
            yield f"postgresql://{USER}:{quote(password, safe='')}@127.0.0.1:{port}/postgres"
        finally:
            _run(programs, "stop", home)


def _run(programs: Path, action: str, home: Path, value: str = "") -> None:
    """Runs one of PostgreSQL's programs, as the user postgres where this process is root's."""
    data, log = home / "data", home / "log"
    control = [str(programs / "pg_ctl"), "--pgdata", str(data), "--wait", "--silent"]
    if action == "initdb":
        secret = home / "password"
        secret.touch(mode=0o600)
        secret.write_text(value)
        _own(secret)
        command = [str(programs / "initdb"), "--pgdata", str(data), "--username", USER]
        command += ["--auth", "scram-sha-256", "--pwfile", str(secret), "--no-sync"]
        command += ["--encoding", "UTF8", "--locale", "C"]
    elif action == "start":
        # nothing of a test outlives a crash, so nothing is forced to the disk
        options = f"-p {value} -h 127.0.0.1 -k {home} -c fsync=off"
        command = [*control, "--log", str(log), "--options", options, "start"]
    else:
        command = [*control, "--mode", "immediate", "stop"]
    user = "postgres" if os.geteuid() == 0 else None
    # a file, because the server would keep a pipe open
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command,
            cwd=home,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        output.seek(0)
        told = output.read()
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, told)


def _own(path: Path) -> None:
    """Gives a file or folder to the user as whom the server runs."""
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(path, user.pw_uid, user.pw_gid)
