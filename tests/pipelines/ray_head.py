"""Ray head with token authentication, and jobs on it, as a user starts them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from pipelines.core.cluster import free_port

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def environment(home: Path) -> dict[str, str]:
    """Return an environment that names no other store or cluster and has a home of its own.

    Args:
        home: home folder of the user.
    """
    dropped = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HOME": str(home), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}


def run_command(*command: str, cwd: Path, env: Mapping[str, str]) -> str:
    """Run a command to its end, and require that it succeeds.

    Args:
        command: program and arguments.
        cwd: folder to run in.
        env: environment.

    Returns:
        What it printed.
    """
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def processes(pid: int, name: str) -> list[psutil.Process]:
    """List the descendants of a process whose names begin with a name, the newest last.

    Args:
        pid: id of the process.
        name: such as the class of an actor that runs in a descendant.
    """
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            if child.name().startswith(name):
                found.append(child)
    return sorted(found, key=lambda process: process.create_time())


@dataclass(frozen=True, slots=True)
class Head:
    """Ray head that is running.

    Attributes:
        process: process of `ray start`.
        address: address to which jobs are submitted.
        cluster: address at which other nodes join.
        folder: folder from which jobs are submitted.
        temporary: Ray's own folder.
        env: environment of the head and of the jobs' submission.
    """

    process: "subprocess.Popen[str]"
    address: str
    cluster: str
    folder: Path
    temporary: Path
    env: dict[str, str]

    @property
    def token(self) -> str:
        """Token that authorises its use."""
        return (self.folder / ".ray" / "auth_token").read_text().strip()

    def job(self, *arguments: str) -> str:
        """Run a subcommand of `ray job`, again while a head that has just started has no agent.

        Args:
            arguments: the subcommand, its options and arguments.

        Returns:
            What it printed.
        """
        command = [RAY, "job", arguments[0], "--address", self.address, *arguments[1:]]
        for _ in range(20):
            done = subprocess.run(
                command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=420
            )
            if "No available agent" not in done.stderr:
                break
            time.sleep(3)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *command: str, wait: bool = True) -> str:
        """Submit a job with the checkout as its working folder.

        Args:
            command: command of the job.
            wait: whether to wait for its end.

        Returns:
            Its output or, without waiting, its id.
        """
        options = ["--working-dir", str(ROOT)] + ([] if wait else ["--no-wait"])
        printed = self.job("submit", *options, "--", *command)
        if wait:
            return printed
        (job,) = set(re.findall(r"raysubmit_\w+", printed))
        return str(job)

    def stop(self, job: str) -> None:
        """Stop a job at once, as `ray job stop` does after its start-up.

        Args:
            job: its id.
        """
        answer = requests.post(
            f"{self.address}/api/jobs/{job}/stop",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=30,
        )
        answer.raise_for_status()

    def scrape(self) -> str:
        """Return the metrics of all nodes, as Prometheus receives them."""
        found = json.loads((self.temporary / "prom_metrics_service_discovery.json").read_text())
        targets = [target for group in found for target in group["targets"]]
        return "".join(requests.get(f"http://{t}/metrics", timeout=30).text for t in targets)

    @contextmanager
    def log_of(self, job: str) -> Iterator[Iterator[str]]:
        """Follow a job's output until it ends.

        Args:
            job: its id.
        """
        command = [RAY, "job", "logs", "--address", self.address, "--follow", job]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True
        ) as log:
            assert log.stdout is not None
            yield iter(log.stdout)


@contextmanager
def ray_head(
    folder: Path, *, cpus: int = 2, ip: str | None = None, more: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """Start a Ray head with token authentication.

    Args:
        folder: home of its user, from which jobs are submitted.
        cpus: logical CPUs.
        ip: address of this machine, at which other nodes reach it.
        more: environment variables.
    """
    env = environment(folder) | {"RAY_AUTH_MODE": "token", **(more or {})}
    run_command(RAY, "get-auth-token", "--generate", cwd=folder, env=env)
    port, dashboard = free_port(), free_port()
    # Jobs go to the cluster that was last started with the same folder: this one has its own. Not
    # in `folder`, because names of sockets must be short.
    temporary = tempfile.mkdtemp(prefix="ray-")
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--temp-dir={temporary}",
         f"--num-cpus={cpus}", f"--port={port}",
         f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={free_port()}",  # another Ray may run in this suite
         "--disable-usage-stats", "--include-dashboard=true",
         *([] if ip is None else [f"--node-ip-address={ip}"])],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        yield Head(
            process, f"http://127.0.0.1:{dashboard}", f"{ip}:{port}", folder, Path(temporary), env
        )
    finally:
        process.terminate()  # ends the daemons too, which are in sessions of their own
        process.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)
