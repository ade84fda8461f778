"""KServe's own description of its resources, read from the distribution ``kserve`` as data: it is never imported.

Its generated classes name each field's key and type; what is Kubernetes' own in them is left to Kubernetes' schemas.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
KUBERNETES = re.compile(r"V1[A-Z]|V2[A-Z]|K8sIo|ResourceQuantity|IntOrString|object")


@functools.cache
def _folder() -> Path:
    return Path(str(metadata.distribution("kserve").locate_file("kserve/models")))


@functools.cache
def fields(model: str) -> dict[str, str]:
    """Key in the YAML → type, of a class such as ``V1beta1PredictorSpec``."""
    for path in _folder().glob("*.py"):
        if path.stem.replace("_", "") == model.lower():
            break
    else:
        raise LookupError(f"kserve describes no {model}")
    (kind,) = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in kind.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    return {key: tables["openapi_types"][name] for name, key in tables["attribute_map"].items()}


def problems(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """What KServe's classes do not know, or have another type for, in a document; empty if it is well formed."""
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, item in enumerate(value):
            yield from problems(item, found[1], f"{where}[{number}]")
    elif kind in SCALARS:
        if not isinstance(value, SCALARS[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{where} is no {kind}"
    elif kind.startswith("dict(") or KUBERNETES.match(kind):
        return
    elif not isinstance(value, dict):
        yield f"{where} is no {kind}"
    else:
        known = fields(kind)
        for key, item in value.items():
            if key not in known:
                yield f"{where}.{key} is unknown to {kind}"
            else:
                yield from problems(item, known[key], f"{where}.{key}")


def inline_pod(predictor: dict[str, Any]) -> dict[str, Any]:
    """The part of a predictor that is a Kubernetes pod's specification."""
    known = fields("V1beta1PredictorSpec")
    own = {key for key, kind in known.items() if "V1beta1" in kind}
    extension = set(fields("V1beta1ComponentExtensionSpec"))
    return {key: value for key, value in predictor.items() if key not in own | extension}
