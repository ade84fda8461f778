"""What ``deploy/`` and the Dockerfile ask for, against the schemas of Kubernetes and KServe and our own options."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from prompttune.cli.main import cli
from prompttune.serve.protocol.server import DISMISSING_S
from prompttune.serve.protocol.settings import ServerSettings
from prompttune.serve.service.settings import EngineSettings
from prompttune.serve.workers.worker import CLOSE_S
from prompttune.settings import all_settings
from tests import kserve_models

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = sorted(path.parent for path in DEPLOY.rglob("kustomization.yaml"))
KUBERNETES = ("1.30", "1.37")
"""Releases whose schemas must take what is built."""
SERVED = ("Deployment", "InferenceService")

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which builds kustomizations")


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_schemas = pytest.mark.skipif(
    not (_installed("kubernetes-validate") and _installed("kserve")),
    reason="the distributions kubernetes-validate and kserve, for their schemas",
)
every_kustomization = pytest.mark.parametrize(
    "folder", KUSTOMIZATIONS, ids=[str(folder.relative_to(DEPLOY)) for folder in KUSTOMIZATIONS]
)


@functools.cache
def _built(folder: Path) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return list(yaml.safe_load_all(result.stdout))


def built(folder: Path) -> list[dict[str, Any]]:
    """The resources that a kustomization makes; a test may change them."""
    return copy.deepcopy(_built(folder))


def pod_of(resource: dict[str, Any]) -> dict[str, Any]:
    if resource["kind"] == "InferenceService":
        return kserve_models.inline_pod(resource["spec"]["predictor"])
    pod: dict[str, Any] = resource["spec"]["template"]["spec"]
    return pod


def pods(folder: Path) -> list[dict[str, Any]]:
    return [pod_of(resource) for resource in built(folder) if resource["kind"] in SERVED]


def check(resource: dict[str, Any], release: str) -> None:
    """Raise unless a release of Kubernetes and this one of KServe know every field of ``resource``."""
    import kubernetes_validate

    if resource["kind"] == "InferenceService":
        found = list(kserve_models.problems(resource, "V1beta1InferenceService", "InferenceService"))
        assert not found, found
        resource = {"apiVersion": "v1", "kind": "Pod", "metadata": resource["metadata"], "spec": pod_of(resource)}
    kubernetes_validate.validate(resource, release, strict=True)


def test_there_are_kustomizations() -> None:
    assert len(KUSTOMIZATIONS) == 4


@needs_kubectl
@needs_schemas
@pytest.mark.parametrize("release", KUBERNETES)
@every_kustomization
def test_resources_are_what_the_schemas_say(folder: Path, release: str) -> None:
    resources = built(folder)
    assert any(resource["kind"] in SERVED for resource in resources)
    for resource in resources:
        check(resource, release)


@needs_kubectl
@needs_schemas
@every_kustomization
def test_the_schemas_find_mistakes(folder: Path) -> None:
    """A misspelt field and a wrong type are refused, so the test above says something."""
    import kubernetes_validate

    for resource in built(folder):
        if resource["kind"] not in SERVED:
            continue
        misspelt, wrong = copy.deepcopy(resource), copy.deepcopy(resource)
        pod_of(misspelt)["containers"][0]["readynessProbe"] = {}
        pod_of(wrong)["containers"][0]["args"] = "serve"
        for broken in (misspelt, wrong):
            with pytest.raises(kubernetes_validate.ValidationError):
                check(broken, KUBERNETES[-1])


@needs_schemas
def test_kserve_finds_mistakes() -> None:
    resource = yaml.safe_load((DEPLOY / "kserve/base/inferenceservice.yaml").read_text(encoding="utf-8"))
    resource["spec"]["predictor"] |= {"minReplica": 1, "maxReplicas": "8"}
    assert list(kserve_models.problems(resource, "V1beta1InferenceService", "")) == [
        ".spec.predictor.maxReplicas is no int",
        ".spec.predictor.minReplica is unknown to V1beta1PredictorSpec",
    ]


@needs_kubectl
@needs_schemas
@every_kustomization
def test_arguments_are_those_of_the_command_line(folder: Path) -> None:
    for pod in pods(folder):
        name, *words = pod["containers"][0]["args"]
        assert name == "serve"
        given = serve_options(words)
        ports = {port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports == {given["http_port"], given["grpc_port"]}
        assert given["host"] == "0.0.0.0"
        mounts = [Path(mount["mountPath"]) for mount in pod["containers"][0]["volumeMounts"]]
        assert given["token_file"].parent in mounts
        assert ("cuda" in given["device"]) == (folder.name == "gpu")
        assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (folder.name == "gpu")


@needs_kubectl
@needs_schemas
@every_kustomization
def test_pods_end_after_their_requests_and_hold_few_rights(folder: Path) -> None:
    for pod in pods(folder):
        (container,) = pod["containers"]
        (drain,) = [float(one.split("=")[1]) for one in container["args"] if one.startswith("--drain-seconds=")]
        pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > pause + drain
        assert pod["securityContext"]["runAsNonRoot"]
        rights = container["securityContext"]
        assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
        assert rights["capabilities"] == {"drop": ["ALL"]}
        for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
            assert container[f"{probe}Probe"]["httpGet"]["path"] == f"/v2/health/{path}"


def serve_options(words: list[str]) -> dict[str, Any]:
    """The options of ``prompttune serve`` as it would read them."""
    command = cli.get_command(None, "serve")  # type: ignore[arg-type]  # the lazy group looks at the name alone
    assert command is not None
    given = command.make_context("serve", list(words)).params
    known = all_settings(ServerSettings) | all_settings(EngineSettings)
    defaults = {key: one.default for key, one in known.items()}
    return defaults | {key: value for key, value in given.items() if value is not None}


LEAVING_S = DISMISSING_S + CLOSE_S + 2
"""Behind the drain: the last errors are sent, the worker ends its batch, the process goes."""


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_a_pod_is_not_killed_before_it_has_drained(path: Path) -> None:
    resource = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(resource, dict) or resource.get("kind") not in SERVED:
        return
    pod = resource["spec"]["template"]["spec"] if "template" in resource["spec"] else resource["spec"]["predictor"]
    (container,) = pod["containers"]
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = serve_options(container["args"][1:])["drain_seconds"]
    assert pause + drain + LEAVING_S <= pod["terminationGracePeriodSeconds"]


def test_docker_waits_for_the_drain() -> None:
    drain = serve_options(["engine"])["drain_seconds"]
    text = "".join(path.read_text(encoding="utf-8") for path in (*(ROOT / "docs").glob("*.md"), ROOT / "Dockerfile"))
    times = [int(seconds) for seconds in re.findall(r"(?:docker stop --time|--stop-timeout) (\d+)", text)]
    assert times
    assert min(times) >= drain + LEAVING_S


@needs_kubectl
@every_kustomization
def test_names_within_a_kustomization_meet(folder: Path) -> None:
    """Selectors, targets and volumes name what is there: no schema says that."""
    resources = {resource["kind"]: resource for resource in built(folder)}
    if "Deployment" in resources:
        template = resources["Deployment"]["spec"]["template"]
        labels = template["metadata"]["labels"].items()
        container = template["spec"]["containers"][0]
        assert resources["Service"]["spec"]["selector"].items() <= labels
        assert resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
        ports = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in resources["Service"]["spec"]["ports"]} == ports
        scaled = "HorizontalPodAutoscaler" in resources
        assert scaled != ("replicas" in resources["Deployment"]["spec"])
        if scaled:
            target = resources["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
            assert target["name"] == resources["Deployment"]["metadata"]["name"]


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what follows them."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def test_image_serves_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    last = dict(dockerfile())  # of each instruction the last one, which is the final stage's
    for variable, value in re.findall(r"(PROMPTTUNE_\w+)=(\S+)", last["ENV"]):
        monkeypatch.setenv(variable, value)
    assert last["ENTRYPOINT"] == '["prompttune"]'
    name, *words = yaml.safe_load(last["CMD"])
    assert name == "serve"
    given = serve_options(words)
    assert last["EXPOSE"].split() == [str(given["http_port"]), str(given["grpc_port"])]
    assert (str(given["engine"]), given["host"]) == ("/mnt/models", "0.0.0.0")
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["USER"] == "${UID}"


def test_health_check_asks_a_ready_server() -> None:
    """The image's own check, run against a server that answers 200, then 503, then not at all."""
    import http.server
    import sys
    import threading

    answers = iter((200, 503))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(next(answers))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    _, words = dict(dockerfile())["HEALTHCHECK"].split("CMD ")
    python, *rest = yaml.safe_load(words)
    assert python == "python"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
        command = [sys.executable, *(word.replace(":8000", f":{port}") for word in rest)]

        def run() -> int:
            return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode

        for code in (0, 1):
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            assert run() == code
            thread.join(timeout=60)
    assert run() == 1
    assert asked == ["/v2/health/ready"] * 2
