"""What is installed is what the source tree holds, and what the error messages promise can be installed."""

from __future__ import annotations

import ast
import graphlib
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prompttune

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = [path for folder in SETUPTOOLS["package-dir"].values() for path in (ROOT / folder).rglob("*.py")]


UNPINNED = {
    "tensorrt",
    "tensorrt-cu13-libs",
    "torch-tensorrt",
}  # never part of the environments that constraints.txt is for


def requirements() -> list[Requirement]:
    """Every direct dependency, those of the extras included, but not the package itself, which extras name."""
    groups = [PROJECT["project"]["dependencies"], *EXTRAS.values()]
    every = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in every if requirement.name != PROJECT["project"]["name"]]


def pinned() -> list[Requirement]:
    return [requirement for requirement in requirements() if requirement.name not in UNPINNED]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in parsed}


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            found.add(".".join((package, *path.parent.relative_to(ROOT / folder).parts)))
    return found


def test_every_folder_with_modules_is_a_listed_package() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()


def test_every_package_has_an_init_file() -> None:
    missing = {path.parent for path in SOURCES if not (path.parent / "__init__.py").is_file()}
    assert not missing


def test_types_are_shipped() -> None:
    assert "py.typed" in SETUPTOOLS["package-data"]["prompttune"]
    assert (ROOT / "prompttune" / "py.typed").is_file()


def test_version_is_one_a_wheel_accepts() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", prompttune.__version__)


@pytest.mark.parametrize("requirement", pinned(), ids=lambda requirement: requirement.name)
def test_dependency_has_a_pin_within_its_range(requirement: Requirement) -> None:
    (pin,) = pins()[canonicalize_name(requirement.name)].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_dependencies_are_documented() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert not {requirement.name for requirement in requirements()} - set(re.findall(r"`([\w.-]+)`", text))


def test_no_registry_is_named() -> None:
    """An address of an index belongs in a user's own pip settings, never in the project."""
    files = ["Makefile", "Dockerfile", "constraints.txt", "pyproject.toml", ".ci/run", ".github/workflows/ci.yml"]
    for name in files:
        assert "index-url" not in (ROOT / name).read_text(encoding="utf-8"), name


def missing_extra_errors() -> Iterator[tuple[str, str]]:
    """The extra named by each ``MissingExtraError(package, "extra")`` in the sources, and where that stands."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name == "MissingExtraError" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                yield str(node.args[1].value), f"{path.relative_to(ROOT)}:{node.lineno}"


def test_extras_named_in_errors_exist() -> None:
    assert not [(extra, where) for extra, where in missing_extra_errors() if extra not in EXTRAS]


def image_requirements(variant: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "image_requirements.py"), variant]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("variant", "runtime", "other"),
    [("cpu", "onnxruntime", "onnxruntime-gpu"), ("cuda", "onnxruntime-gpu", "onnxruntime")],
)
def test_image_holds_one_build_of_onnxruntime(variant: str, runtime: str, other: str) -> None:
    names = {Requirement(line).name for line in image_requirements(variant).stdout.splitlines()}
    core = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert runtime in names
    assert other not in names
    assert core - {"onnxruntime"} <= names


def test_unknown_image_variant_is_refused() -> None:
    result = image_requirements("rocm")
    assert result.returncode != 0
    assert result.stderr.strip() == "unknown variant 'rocm'; known: cpu, cuda"


@pytest.mark.slow
def test_core_imports_neither_export_nor_serve() -> None:
    script = (
        "import sys, prompttune.backbones, prompttune.checkpoints, prompttune.methods, prompttune.model, "
        "prompttune.training\n"
        "above = [name for name in sys.modules if name.startswith(('prompttune.export', 'prompttune.serve'))]\n"
        "sys.exit(', '.join(above) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def module_name(path: Path) -> str:
    package, folder = max(
        ((name, folder) for name, folder in SETUPTOOLS["package-dir"].items() if path.is_relative_to(ROOT / folder)),
        key=lambda pair: len(pair[1]),
    )
    parts = path.relative_to(ROOT / folder).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


def test_no_module_imports_itself_through_others() -> None:
    """Deferred imports and those for types alone count too, so that a reader can stop at any floor."""
    modules = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                named += [f"{node.module}.{alias.name}" for alias in node.names]
        found = {name if name in modules else name.rpartition(".")[0] for name in named}
        graph[module] = (found & modules.keys()) - {module}
    assert len(graph) > 300
    assert graph["prompttune.model"] >= {"prompttune.backbones", "prompttune.methods"}
    assert "prompttune.export.folder" in graph["prompttune.export.build"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    "imported", ["prompttune.cli.main", "prompttune.serve.bench.settings", "prompttune.serve.workers.main"]
)
def test_starts_without_torch(imported: str) -> None:
    script = f"import sys, {imported}; sys.exit(', '.join({{'torch', 'timm'}} & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_network_is_blocked() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"looked up example\.org"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.socket() as client, pytest.raises(pytest.fail.Exception, match=r"connected to 192\.0\.2\.1"):
        client.connect(("192.0.2.1", 80))


def test_own_addresses_stay_open() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client,
    ):
        client.sendall(b"ping")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4) == b"ping"
