"""What KubeRay 1.7 and the Prometheus operator take of their objects, as far as our manifests use it.

Types and requirements are those of their custom resource definitions; a field that is not here is refused. What lies
in a pod template is Kubernetes' own, and checked against its schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Template = dict[str, Any]
Quantities = dict[str, str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: str


class TlsOptions(Strict):
    enabled: bool


class Resources(Strict):
    requests: Quantities
    limits: Quantities


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count
    resources: Resources
    securityContext: dict[str, Any]
    volumeMounts: list[dict[str, Any]]


class HeadGroup(Strict):
    rayStartParams: dict[str, str]  # `ray start` takes them as text, numbers too
    template: Template


class WorkerGroup(HeadGroup):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count


class Cluster(Strict):
    rayVersion: str
    authOptions: AuthOptions
    tlsOptions: TlsOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class Job(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    backoffLimit: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    submitterPodTemplate: Template
    rayClusterSpec: Cluster


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: Cluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: Job


class Selector(Strict):
    matchLabels: dict[str, str]


class PodMetricsEndpoint(Strict):
    port: str
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m|h)$")]


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: list[PodMetricsEndpoint]


class PodMonitor(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


CUSTOM: dict[str, type[Strict]] = {"RayCluster": RayCluster, "RayJob": RayJob, "PodMonitor": PodMonitor}
"""The types that Kubernetes itself does not know, by kind."""
