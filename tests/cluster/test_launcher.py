"""The cluster launcher's files, by Ray's own checks and, for AWS, by what it would do there."""

import json
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.gcp import config as gcp
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.files import CLUSTER, PLACEHOLDER, Document, changed, documents

CLOUDS = ("aws", "gcp")
REGION = "us-west-2"


def config(cloud: str) -> Document:
    """Returns a file with the launcher's defaults for what it leaves out."""
    (document,) = documents(CLUSTER / f"{cloud}.yaml")
    prepared: Document = prepare_config(document)
    return prepared


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_the_file(cloud: str) -> None:
    validate_config(config(cloud))


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("idle_timeout", 5),
        ("docker/images", "re2tal:1"),
        ("available_node_types/gpu/node_config", ...),
        ("available_node_types/gpu_spot/max_workers", "eight"),
        ("auth/ssh_proxy_command", ...),
    ],
)
def test_ray_refuses_a_wrong_file(cloud: str, where: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(changed(config(cloud), where, value))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_have_gpus_and_come_when_asked_for(cloud: str) -> None:
    prepared = config(cloud)
    types = prepared["available_node_types"]
    assert set(types) == {"head", "gpu", "gpu_spot"}
    assert prepared["head_node_type"] == "head"
    for name in ("gpu", "gpu_spot"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
    spot = {name: "SPOT" in json.dumps(types[name]["node_config"]).upper() for name in types}
    assert spot == {"head": False, "gpu": False, "gpu_spot": True}
    assert types["gpu_spot"]["priority"] > types["gpu"].get("priority", 0)
    assert "--gpus all" in prepared["docker"]["worker_run_options"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nothing_is_installed_on_a_node(cloud: str) -> None:
    prepared = config(cloud)
    commands = [name for name in prepared if name.endswith("setup_commands")]
    assert len(commands) == 3
    assert all(prepared[name] == [] for name in commands)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_jobs_need_the_token(cloud: str) -> None:
    prepared = config(cloud)
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_jobs_find_in_the_environment(cloud: str) -> None:
    options = config(cloud)["docker"]["run_options"]
    scheme = {"aws": "s3", "gcp": "gs"}[cloud]
    assert f"--env RE2TAL_STORE={scheme}://<<BUCKET>>" in options
    assert "--env MLFLOW_TRACKING_URI=<<MLFLOW_URI>>" in options
    assert "--env RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=1800" in options


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An imitation of AWS, with what the README asks for; the values of its placeholders."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where the launcher keeps the key it makes
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with mock_aws():
        ec2 = boto3.client("ec2", region_name=REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")
        group = ec2.create_security_group(GroupName="re2tal", Description="re2tal", VpcId=vpc)
        yield {
            "AWS_REGION": REGION,
            "AWS_SUBNET": subnet["Subnet"]["SubnetId"],
            "AWS_SECURITY_GROUP": group["GroupId"],
            "AWS_IMAGE": "ami-12345678",
        }


def filled(cloud: str, values: dict[str, str]) -> Document:
    """Returns the file of a cloud with values in place of placeholders."""
    text = (CLUSTER / f"{cloud}.yaml").read_text()
    text = PLACEHOLDER.sub(lambda found: values.get(found[1], found[1].lower()), text)
    prepared: Document = prepare_config(yaml.safe_load(text))
    return prepared


def _open_to_the_world() -> list[str]:
    groups = boto3.client("ec2", region_name=REGION).describe_security_groups()["SecurityGroups"]
    return [
        group["GroupName"]
        for group in groups
        for rule in group["IpPermissions"]
        if any(part["CidrIp"] == "0.0.0.0/0" for part in rule["IpRanges"])
    ]


@pytest.mark.slow
def test_the_launcher_opens_no_port_on_aws(aws: dict[str, str]) -> None:
    done = bootstrap_aws(filled("aws", aws))
    for node in done["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == [aws["AWS_SECURITY_GROUP"]]
        assert node["node_config"]["SubnetIds"] == [aws["AWS_SUBNET"]]
    assert _open_to_the_world() == []


@pytest.mark.slow
def test_without_a_group_of_its_own_it_would(aws: dict[str, str]) -> None:
    given = filled("aws", aws)
    for node in given["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
    bootstrap_aws(given)
    assert _open_to_the_world()


@pytest.mark.slow
def test_the_launcher_makes_no_role_on_aws(aws: dict[str, str]) -> None:
    bootstrap_aws(filled("aws", aws))
    assert boto3.client("iam", region_name=REGION).list_roles()["Roles"] == []


def test_no_node_gets_a_public_address_on_google_cloud() -> None:
    prepared = filled("gcp", {})
    assert prepared["provider"]["use_internal_ips"]
    done = gcp._configure_subnet(prepared, compute=None)  # it would ask for a network
    for node in done["available_node_types"].values():
        (interface,) = node["node_config"]["networkInterfaces"]
        assert "accessConfigs" not in interface


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ssh_goes_through_the_clouds_own_tunnel(cloud: str) -> None:
    auth = filled(cloud, {})["auth"]
    assert auth["ssh_proxy_use_node_id"]
    assert "%h" in auth["ssh_proxy_command"]
    assert auth["ssh_proxy_command"].startswith({"aws": "aws ssm", "gcp": "gcloud compute"}[cloud])
