"""A run on several hosts that share no disk: one is lost in the midst of an epoch, another comes.

The hosts are network namespaces where the system lets tests make them. Videos and checkpoints are
in an object store, the run in a team's MLflow server, and the job is submitted to the head.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow.fs as pafs
import pytest
import torch
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from pipelines.core.storage import resolve, sizes_below
from pipelines.core.tracking import Run, recipe_of
from pipelines.data.plan import Plan
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Trainer
from tests.cluster.hosts import INTERFACE, Host, Network, can_isolate, network
from tests.cluster.mlflow_server import Server, running_server
from tests.cluster.postgres import binaries
from tests.pipelines.object_store import BUCKET, object_store
from tests.pipelines.ray_head import RAY, ROOT, Head, ray_head

CPUS = 3  # of a node: one worker and two decoding tasks
RECIPE = (
    "--model.weights", "None",
    "--data.size", "32",
    "--data.window.frames", "64",
    "--data.no-make-toy",
    "--model.localizer.width", "16",
    "--model.localizer.heads", "2",
    "--model.localizer.levels", "3",
    "--model.localizer.head-width", "16",
    "--model.localizer.drop-path", "0",
    # AdamW's first steps are as long whatever the gradient, so of what is only rounding too
    "--optim.backbone-lr", "1e-5",
    "--optim.localizer-lr", "1e-4",
    "--epochs", "4",
    "--batch-size", "1",
    "--scale.workers", "2",
    "--scale.min-workers", "1",
    "--scale.resize-seconds", "2",
    "--scale.cpus-per-worker", "2",
    "--checkpoints.steps", "2",
)  # fmt: skip

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not can_isolate(), reason="this system lets no process make hosts"),
    pytest.mark.skipif(binaries() is None, reason="PostgreSQL's programs are not installed"),
]


@dataclass(frozen=True, slots=True)
class Disturbed:
    """What is left of the run.

    Attributes:
        printed: lines of the job.
        scraped: what Prometheus would have seen.
        decoded: addresses of the hosts that were seen to decode.
        run: in MLflow.
        server: of MLflow.
        output: URI of the run's checkpoints.
    """

    printed: list[str]
    scraped: str
    decoded: set[str]
    run: MlflowRun
    server: Server
    output: str


def _join(net: Network, head: Head) -> Host:
    """Makes a host that joins the head's cluster."""
    host = net.host()
    log = head.folder / f"{host.address}.log"
    host.start(
        RAY, "start", f"--address={head.cluster}", f"--node-ip-address={host.address}",
        f"--num-cpus={CPUS}", "--object-store-memory=200000000", "--disable-usage-stats", "--block",
        env=head.env | {
            # what the head's user has at home is not there: its token comes as other secrets do
            "HOME": str(head.temporary), "RAY_AUTH_TOKEN": head.token,
            # no name service knows these hosts: gloo would take their names for this machine's
            "GLOO_SOCKET_IFNAME": INTERFACE,
        },
        log=log, own=[head.temporary, head.folder.parent],
    )  # fmt: skip
    for _ in range(300):
        if "Ray runtime started" in log.read_text():
            return host
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def _watch(hosts: list[Host], seen: set[str], stop: threading.Event) -> None:
    """Notes which hosts decode, by the names of their processes."""
    while not stop.wait(0.2):
        for host in list(hosts):
            try:
                names = [" ".join(process.cmdline()) for process in host.processes()]
            except (psutil.NoSuchProcess, OSError):
                continue  # it has just died
            if any(name.startswith("ray::") and "decode" in name.lower() for name in names):
                seen.add(host.address)


def _upload(tiny_set: Path, uri: str) -> None:
    filesystem, path = resolve(uri)
    pafs.copy_files(str(tiny_set), path, destination_filesystem=filesystem)


def _disturb(head: Head, net: Network, hosts: list[Host], job: str) -> tuple[list[str], str]:
    """Follows the job; kills a host in the midst of the second epoch, and adds another later."""
    printed, scraped, done = [], "", 0
    with head.log_of(job) as lines:
        for line in lines:
            printed.append(line)
            if done == 0 and re.search(r"epoch 2/4  step +[2-9]/", line):
                hosts.pop().die()
                done = 1
            elif done == 1 and "1 workers instead of 2" in line:
                done = 2
            elif done == 2 and "checkpoint after step" in line:
                hosts.append(_join(net, head))
                done = 3
            elif done == 3 and "epoch 4/4" in line:
                scraped += head.scrape()  # again and again, as Prometheus does
    return printed, scraped


@pytest.fixture(scope="module")
def disturbed(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    """A run with one worker on each of two hosts, and what happened to it."""
    folder = tmp_path_factory.mktemp("cluster")
    with (
        network() as net,
        object_store(net.address) as store,
        running_server(folder / "mlflow", net.address) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**store, **server.login("ann")}.items():
            patch.setenv(name, value)
        _upload(tiny_set, f"s3://{BUCKET}/data")
        quick = {
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
            # of workers on a host whose death is not known yet
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
            "RAY_metrics_report_interval_ms": "1000",
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "5",
        }
        more = {**store, **server.login("ann"), **quick}
        with ray_head(folder, cpus=0, ip=net.address, more=more) as head:
            hosts = [_join(net, head) for _ in range(2)]
            seen: set[str] = set()
            stop = threading.Event()
            watch = threading.Thread(target=_watch, args=(hosts, seen, stop))
            watch.start()
            try:
                job = head.submit(
                    sys.executable, "pipelines/train.py", "toy", *RECIPE,
                    "--data.annotations", f"s3://{BUCKET}/data/annotations.json",
                    "--data.videos", f"s3://{BUCKET}/data/videos",
                    "--output", f"s3://{BUCKET}/runs",
                    wait=False,
                )  # fmt: skip
                printed, scraped = _disturb(head, net, hosts, job)
            finally:
                stop.set()
                watch.join()
            assert "succeeded" in head.job("status", job), "".join(printed)
        client = MlflowClient(server.uri)
        (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
        (run,) = client.search_runs([experiment.experiment_id])
        output = f"s3://{BUCKET}/runs/{run.info.run_id}"
        yield Disturbed(printed, scraped, seen, run, server, output)


def test_it_goes_on_with_what_remains_and_grows_again(disturbed: Disturbed) -> None:
    said = "".join(disturbed.printed)
    assert "with 1 workers instead of 2" in said
    assert "with 2 workers instead of 1" in said
    assert "epoch 4/4  validation" in said
    assert disturbed.run.info.status == "FINISHED"


def test_each_step_is_there(disturbed: Disturbed) -> None:
    client = MlflowClient(disturbed.server.uri)
    steps = {m.step for m in client.get_metric_history(disturbed.run.info.run_id, "train/loss")}
    assert steps == set(range(1, max(steps) + 1))


def test_the_dashboard_shows_metrics_that_there_are(disturbed: Disturbed) -> None:
    panels = (ROOT / "cluster" / "observability" / "grafana.json").read_text()
    shown = set(re.findall(r"\bray_[a-z0-9_]+", panels))
    of_gpus = {"ray_node_gram_used", "ray_node_gpus_utilization", "ray_re2tal_cuda_peak_bytes"}
    assert of_gpus < shown
    there = set(re.findall(r"^(ray_[a-z0-9_]+)\{", disturbed.scraped, re.MULTILINE))
    assert shown - of_gpus <= there
    assert f'run="{disturbed.run.info.run_id}"' in disturbed.scraped


def test_the_load_of_nodes_is_logged_by_their_names(disturbed: Disturbed) -> None:
    names = {name for name in disturbed.run.data.metrics if name.startswith("system/")}
    nodes = {name.split("/")[1] for name in names if name.endswith("/cpu_utilization_percentage")}
    assert len(nodes) >= 2


def test_decoding_spreads_over_the_hosts(disturbed: Disturbed) -> None:
    assert len(disturbed.decoded) >= 2


def test_the_weights_are_those_of_an_undisturbed_run(
    disturbed: Disturbed, tiny_plan: Plan, tmp_path: Path
) -> None:
    """One worker that makes the passes of two, in this process, from local files."""
    recipe = recipe_of(Run(uri=disturbed.server.uri, run_id=disturbed.run.info.run_id))
    recipe = replace(recipe, output=str(tmp_path))
    trainer = Trainer(
        DetectionTask(recipe=recipe, plan=tiny_plan),
        LocalRuntime(recipe, tiny_plan, tmp_path),
        weights=None,
        output=str(tmp_path),
    )
    trainer.run()
    names = {name.partition("/")[0] for name in sizes_below(disturbed.output)}
    last = max(name for name in names if name.startswith("checkpoint_epoch_"))
    filesystem, path = resolve(f"{disturbed.output}/{last}")
    pafs.copy_files(path, str(tmp_path / "last"), source_filesystem=filesystem)
    found = torch.load(tmp_path / "last" / "training.pt", weights_only=True)
    assert found["epoch"] == recipe.epochs
    expected = trainer.state.detector.state_dict()
    assert found["detector"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found["detector"][name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert json.loads((tmp_path / "last" / "complete.json").read_text())
