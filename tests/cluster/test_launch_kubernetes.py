"""The Kubernetes objects: valid to Kubernetes and KubeRay, confined, and open to nobody who needs nothing there."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib.util import find_spec
from typing import Any

import pytest
import yaml

from tests.commands import parse
from tests.conftest import ROOT, need
from tests.kuberay import CUSTOM

Object = dict[str, Any]
OBJECTS: list[Object] = [
    thing
    for name in ("network-policy", "raycluster", "rayjob", "monitoring")
    for thing in yaml.safe_load_all((ROOT / "cluster" / "launch" / f"{name}.yaml").read_text())
]
KUBERNETES = "1.37.0"
NAMESPACE = "tilefleet"


def title(thing: Object) -> str:
    return f"{thing['kind']}/{thing['metadata']['name']}"


def kind(name: str) -> list[Object]:
    return [thing for thing in OBJECTS if thing["kind"] == name]


def clusters() -> list[Object]:
    return [kind("RayCluster")[0]["spec"], kind("RayJob")[0]["spec"]["rayClusterSpec"]]


def templates() -> dict[str, Object]:
    """Every pod template, by what it is for."""
    found = {"exporter": kind("Deployment")[0]["spec"]["template"]}
    for owner, cluster in zip(("RayCluster", "RayJob"), clusters(), strict=True):
        found[f"{owner} head"] = cluster["headGroupSpec"]["template"]
        found |= {f"{owner} {g['groupName']}": g["template"] for g in cluster["workerGroupSpecs"]}
    return found | {"submitter": kind("RayJob")[0]["spec"]["submitterPodTemplate"]}


TEMPLATES = templates()
pods = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def containers(template: Object) -> list[Object]:
    spec = template["spec"]
    return [*spec["containers"], *spec.get("initContainers", [])]


def validated(thing: Object) -> None:
    """Hold ``thing`` against Kubernetes' own schema, which refuses unknown fields too."""
    need(find_spec("kubernetes_validate"), "kubernetes-validate is not installed")
    import kubernetes_validate

    kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@pytest.mark.parametrize("thing", OBJECTS, ids=title)
def test_every_object_fits_its_type(thing: Object) -> None:
    if thing["kind"] in CUSTOM:
        CUSTOM[thing["kind"]].model_validate(thing)
    else:
        validated(thing)
    assert (thing["metadata"]["name"] if thing["kind"] == "Namespace" else thing["metadata"]["namespace"]) == NAMESPACE


@pods
def test_every_pod_fits_its_type(template: Object) -> None:
    validated({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template})


def test_what_a_schema_must_refuse_is_refused() -> None:
    for good, change in ((kind("RayCluster")[0], "tlsOption"), (kind("PodMonitor")[0], "podMetricsEndpoint")):
        with pytest.raises(ValueError, match=change):
            CUSTOM[good["kind"]].model_validate(good | {"spec": good["spec"] | {change: {}}})
    policy = kind("NetworkPolicy")[0]
    with pytest.raises(Exception, match="ingres"):
        validated(policy | {"spec": policy["spec"] | {"ingres": []}})


@pods
def test_no_pod_has_privileges(template: Object) -> None:
    """What the profile `restricted` of Kubernetes asks for, and a root file system that cannot be written."""
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not set(spec) & {"hostNetwork", "hostPID", "hostIPC"}
    assert all(set(volume) - {"name"} <= {"emptyDir", "projected"} for volume in spec["volumes"])
    for container in containers(template):
        assert confined(container["securityContext"])


def confined(context: Object) -> bool:
    return context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_autoscaler_alone_may_speak_to_kubernetes() -> None:
    for cluster in clusters():
        options, head = cluster["autoscalerOptions"], cluster["headGroupSpec"]["template"]
        assert confined(options["securityContext"])
        assert "kubernetes-api" in {mount["name"] for mount in options["volumeMounts"]}
        assert "kubernetes-api" not in {mount["name"] for c in containers(head) for mount in c["volumeMounts"]}


@pods
def test_every_container_has_requests_and_limits_and_a_place_to_write(template: Object) -> None:
    for container in containers(template):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) <= set(limits)
        for amount in [*requests.values(), *limits.values()]:
            assert re.fullmatch(r"[0-9]+(m|Mi|Gi)?", amount), amount
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]


@pods
def test_every_container_that_stays_is_probed(template: Object) -> None:
    for container in containers(template):
        if container["name"] != "ray-job-submitter":
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        if container["name"].startswith("ray-") and "livenessProbe" in container:
            assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_ray_asks_that_probe_for_no_token() -> None:
    agent = pytest.importorskip("ray.dashboard.http_server_agent")
    assert "/api/healthz" in agent.PUBLIC_EXACT_PATHS


def test_both_clusters_are_one() -> None:
    ours, of_the_job = clusters()
    assert ours == of_the_job


def test_a_cluster_asks_for_the_token_and_speaks_tls() -> None:
    cluster = clusters()[0]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "tilefleet-token"}
    assert cluster["tlsOptions"] == {"enabled": True}
    exporter = {entry["name"]: entry for entry in TEMPLATES["exporter"]["spec"]["containers"][0]["env"]}
    assert exporter["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "tilefleet-token", "key": "auth_token"}
    assert not kind("Secret")


def test_versions_are_those_of_the_lock_and_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {c["image"] for template in TEMPLATES.values() for c in containers(template)}
    assert images == {f"registry.example.com/tilefleet:{version}"}
    locked = re.findall(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert [cluster["rayVersion"] for cluster in clusters()] == locked * 2


def test_the_head_does_no_work_and_gpus_come_and_go() -> None:
    cluster = clusters()[0]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 8)
    for template in TEMPLATES.values():
        assert ("nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]) == (
            template == group["template"]
        )


def test_shared_memory_is_memory_and_within_the_limit() -> None:
    for name in ("RayCluster head", "RayCluster gpu"):
        spec = TEMPLATES[name]["spec"]
        shm = next(volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        limit = spec["containers"][0]["resources"]["limits"]["memory"]
        assert int(shm["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi")) / 2


def commands() -> list[str]:
    return [kind("RayJob")[0]["spec"]["entrypoint"], shlex.join(TEMPLATES["exporter"]["spec"]["containers"][0]["args"])]


@pytest.mark.parametrize("line", commands())
def test_the_commands_in_the_manifests_parse(line: str) -> None:
    parse(line)


RAY, HEAD = {"ray.io/is-ray-node": "yes"}, {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
WORKER = RAY | {"ray.io/node-type": "worker"}
EXPORTER, SUBMITTER = (TEMPLATES[name]["metadata"]["labels"] for name in ("exporter", "submitter"))
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def selects(selector: Object | None, labels: Object) -> bool:
    return selector is not None and all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


def meets(peer: Object, labels: Object, namespace: str) -> bool:
    """Whether a peer of a rule is this pod; without a selector of namespaces it is one of the policy's own."""
    if "ipBlock" in peer:
        return False
    spaces = peer.get("namespaceSelector")
    at_home = namespace == NAMESPACE if spaces is None else selects(spaces, {"kubernetes.io/metadata.name": namespace})
    return at_home and selects(peer.get("podSelector", {}), labels)


def lets(direction: str, own: Object, other: Object, other_namespace: str, port: str | int) -> bool:
    """Whether policies let a pod with labels ``own`` talk in ``direction`` with another, on ``port`` of the target."""
    side = {"ingress": "from", "egress": "to"}[direction]
    return any(
        any(meets(peer, other, other_namespace) for peer in rule[side])
        and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
        for policy in kind("NetworkPolicy")
        if selects(policy["spec"]["podSelector"], own)
        for rule in policy["spec"].get(direction, [])
    )


def reaches(source: Object, namespace: str, target: Object, port: str | int) -> bool:
    out = namespace != NAMESPACE or lets("egress", source, target, NAMESPACE, port)
    return out and lets("ingress", target, source, namespace, port)


def test_who_reaches_what() -> None:
    for ray in (HEAD, WORKER):
        assert reaches(ray, NAMESPACE, HEAD, "gcs")
        assert reaches(ray, NAMESPACE, WORKER, 31234)
        assert not reaches(ray, NAMESPACE, EXPORTER, "metrics")
        assert reaches({}, "monitoring", ray, "metrics")
        assert not reaches({}, "monitoring", ray, "gcs")
    for client in (EXPORTER, SUBMITTER):
        assert reaches(client, NAMESPACE, HEAD, "dashboard")
        assert not reaches(client, NAMESPACE, HEAD, "gcs")
        assert not reaches(client, NAMESPACE, WORKER, 31234)
    assert reaches(OPERATOR, "kuberay", HEAD, "dashboard")
    assert not reaches({}, "kuberay", HEAD, "dashboard")
    assert not reaches({}, "monitoring", HEAD, "dashboard")
    assert reaches({}, "monitoring", EXPORTER, "metrics")
    for stranger, namespace in (({}, NAMESPACE), ({}, "default"), (RAY, "default"), (SUBMITTER, "default")):
        for target in (HEAD, WORKER, EXPORTER):
            assert not any(reaches(stranger, namespace, target, p) for p in ("gcs", "dashboard", "metrics", 31234))


def test_nothing_is_open_unless_a_rule_says_so() -> None:
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in [p["spec"] for p in kind("NetworkPolicy")]
    ports = {"53", "443", "6443"}
    for policy in kind("NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            if any("ipBlock" in peer for peer in rule["to"]):
                assert {str(entry["port"]) for entry in rule["ports"]} <= ports


def test_ports_that_policies_and_monitors_name_are_there() -> None:
    named = {
        port["name"] for template in TEMPLATES.values() for c in containers(template) for port in c.get("ports", [])
    }
    rules = [r for p in kind("NetworkPolicy") for side in ("ingress", "egress") for r in p["spec"].get(side, [])]
    used = {entry["port"] for rule in rules for entry in rule.get("ports", []) if isinstance(entry["port"], str)}
    used |= {end["port"] for monitor in kind("PodMonitor") for end in monitor["spec"]["podMetricsEndpoints"]}
    assert used <= named
