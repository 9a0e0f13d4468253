"""The manifests: valid, whole, restricted, and an environment from which the settings load."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from deploy.files import (
    DEPLOY,
    MANIFESTS,
    SECRETS_DIR,
    Document,
    documents,
    kustomization,
    manifests,
    strings,
)
from shardgate.settings import GatewaySettings

if TYPE_CHECKING:
    from pathlib import Path

OBJECTS = manifests()
# The oldest and the newest that the manifests are checked against.
VERSIONS = ("1.29", "1.35")
# What Kubernetes adds for a Service named "shardgate" where service links are not switched off.
SERVICE_LINKS = {
    "SHARDGATE_SERVICE_HOST": "10.0.0.7",
    "SHARDGATE_SERVICE_PORT": "80",
    "SHARDGATE_SERVICE_PORT_HTTP": "80",
    "SHARDGATE_PORT": "tcp://10.0.0.7:80",
    "SHARDGATE_PORT_80_TCP": "tcp://10.0.0.7:80",
    "SHARDGATE_PORT_80_TCP_PROTO": "tcp",
    "SHARDGATE_PORT_80_TCP_PORT": "80",
    "SHARDGATE_PORT_80_TCP_ADDR": "10.0.0.7",
}


def named(kind: str, name: str) -> Document:
    (found,) = [
        each for each in OBJECTS if each["kind"] == kind and each["metadata"]["name"] == name
    ]
    return found


WORKLOADS = [named("Deployment", "shardgate-app"), named("Job", "shardgate-create-tables")]
each_workload = pytest.mark.parametrize(
    "workload", WORKLOADS, ids=[workload["kind"] for workload in WORKLOADS]
)


def pod(workload: Document) -> Document:
    spec: Document = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Document) -> Document:
    (only,) = pod(workload)["containers"]
    found: Document = only
    return found


def environment(workload: Document) -> dict[str, str]:
    """The variables of a container, references resolved."""
    variables: dict[str, str] = {}
    for source in container(workload).get("envFrom", ()):
        variables |= named("ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container(workload).get("env", ()):
        reference = entry["valueFrom"]["secretKeyRef"]
        variables[entry["name"]] = named("Secret", reference["name"])["stringData"][
            reference["key"]
        ]
    return variables


def mount_secret(secret: Document, directory: Path) -> None:
    """Write a Secret as the kubelet does: a dated folder, and links to it that can be swapped."""
    dated = directory / "..2026_01_01_00_00_00.1"
    dated.mkdir(parents=True)
    (directory / "..data").symlink_to(dated.name)
    for key, value in secret["stringData"].items():
        (dated / key).write_text(value)
        (directory / key).symlink_to(f"..data/{key}")


@pytest.mark.parametrize("kubernetes", VERSIONS)
@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: each["kind"])
def test_follows_the_schema(manifest: Document, kubernetes: str) -> None:
    kubernetes_validate.validate(manifest, kubernetes, strict=True)


def test_every_file_is_applied() -> None:
    files = {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(kustomization()["resources"])


def test_kustomize_puts_everything_into_one_namespace_and_names_the_image() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(MANIFESTS)], capture_output=True, text=True, check=True
    )
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(OBJECTS)
    for each in built:
        if each["kind"] == "Namespace":
            assert each["metadata"]["name"] == "shardgate"
        else:
            assert each["metadata"]["namespace"] == "shardgate"
    (image,) = kustomization()["images"]
    images = {container(each)["image"] for each in built if each["kind"] in ("Deployment", "Job")}
    assert images == {f"{image['newName']}:{image['newTag']}"}


def test_the_namespace_is_made_and_every_image_is_renamed() -> None:
    assert named("Namespace", kustomization()["namespace"])
    renamed = {image["name"] for image in kustomization()["images"]}
    assert {container(workload)["image"] for workload in WORKLOADS} == renamed


def test_selectors_find_the_application_and_nothing_else() -> None:
    deployment = WORKLOADS[0]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        named("Service", "shardgate")["spec"]["selector"],
        named("PodDisruptionBudget", "shardgate-app")["spec"]["selector"]["matchLabels"],
        *(
            spread["labelSelector"]["matchLabels"]
            for spread in pod(deployment)["topologySpreadConstraints"]
        ),
    ]
    of_the_job = WORKLOADS[1]["spec"]["template"]["metadata"]["labels"]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= of_the_job.items()


def test_a_disruption_leaves_a_replica_and_can_happen() -> None:
    budget = named("PodDisruptionBudget", "shardgate-app")["spec"]["minAvailable"]
    assert 1 <= budget < WORKLOADS[0]["spec"]["replicas"]


def test_ports_are_names_that_the_container_has() -> None:
    app = container(WORKLOADS[0])
    ports = {port["name"] for port in app["ports"]}
    probes = [app[f"{probe}Probe"] for probe in ("liveness", "readiness", "startup")]
    assert {probe["httpGet"]["port"] for probe in probes} <= ports
    assert {port["targetPort"] for port in named("Service", "shardgate")["spec"]["ports"]} <= ports
    assert f"EXPOSE {app['ports'][0]['containerPort']}" in (DEPLOY / "Dockerfile").read_text()


def test_probes_ask_routes_and_a_dead_shard_restarts_nothing(main: Any) -> None:
    app = container(WORKLOADS[0])
    paths = {
        probe: app[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("liveness", "readiness", "startup")
    }
    assert paths == {"liveness": "/livez", "startup": "/livez", "readiness": "/healthz"}
    assert set(paths.values()) <= {route.path for route in main.app.routes}


def test_a_probe_of_the_shards_may_take_as_long_as_an_operation() -> None:
    deadline = float(environment(WORKLOADS[0])["SHARDGATE_OPERATION_DEADLINE"])
    assert container(WORKLOADS[0])["readinessProbe"]["timeoutSeconds"] > deadline


def test_a_pod_has_time_to_end_its_runs() -> None:
    app = container(WORKLOADS[0])
    before = int(app["lifecycle"]["preStop"]["exec"]["command"][1])
    match = re.search(r"--timeout-graceful-shutdown=(\d+)", (DEPLOY / "Dockerfile").read_text())
    assert match
    assert pod(WORKLOADS[0])["terminationGracePeriodSeconds"] > before + int(match[1])


@each_workload
def test_mounts_are_volumes_of_secrets_that_exist(workload: Document) -> None:
    volumes = {volume["name"]: volume for volume in pod(workload)["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(workload)["volumeMounts"]}
    assert set(mounts) == set(volumes)
    for volume in volumes.values():
        assert "emptyDir" in volume or named("Secret", volume["secret"]["secretName"])
    assert mounts["urls"] == environment(workload)[SECRETS_DIR]


@each_workload
@pytest.mark.parametrize("links", [{}, SERVICE_LINKS], ids=["plain", "with service links"])
def test_the_settings_load(
    workload: Document,
    links: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "urls"
    mount_secret(named("Secret", "shardgate-urls"), directory)
    for name, value in (environment(workload) | links | {SECRETS_DIR: str(directory)}).items():
        monkeypatch.setenv(name, value)

    settings = GatewaySettings()

    assert set(settings.shards_of("main")) == {"pg_1", "pg_2"}
    assert set(settings.shards_of("eu")) == {"mysql_1"}
    assert settings.keyspace_of("acme-eu") == "eu"
    assert settings.keyspace_of("anybody") == "main"
    assert settings.engine_options("pg_1")["pool_size"] == 3
    assert settings.create_tables is False
    assert settings.shards["mysql_1"].parsed_url.password == "CHANGE-ME"  # noqa: S105  # it is none


@each_workload
def test_no_variable_of_a_service_gets_in_the_way(workload: Document) -> None:
    assert pod(workload)["enableServiceLinks"] is False


@each_workload
def test_a_pod_is_admitted_where_pods_are_restricted(workload: Document) -> None:
    labels = named("Namespace", "shardgate")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    whole, own = pod(workload)["securityContext"], container(workload)["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert f"USER {whole['runAsUser']}:{whole['runAsGroup']}" in (DEPLOY / "Dockerfile").read_text()
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(workload))


@each_workload
def test_the_secret_files_can_be_read_by_the_pod_alone(workload: Document) -> None:
    (urls,) = [volume for volume in pod(workload)["volumes"] if volume["name"] == "urls"]
    assert urls["secret"]["defaultMode"] == 0o440
    assert pod(workload)["securityContext"]["fsGroup"] > 0
    assert pod(workload)["automountServiceAccountToken"] is False


@each_workload
def test_resources_are_asked_for_and_memory_is_bounded(workload: Document) -> None:
    resources = container(workload)["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert "memory" in resources["limits"]


def test_passwords_are_placeholders_in_secrets_and_nowhere_else() -> None:
    for path in MANIFESTS.glob("*.yaml"):
        for document in documents(path):
            for at, text in strings(document):
                match = re.search(r"://[^/@\s]*:([^/@\s]*)@", text)
                if match:
                    assert (document["kind"], match[1]) == ("Secret", "CHANGE-ME"), at
    assert named("Secret", "shardgate-model")["stringData"] == {"OPENAI_API_KEY": ""}
