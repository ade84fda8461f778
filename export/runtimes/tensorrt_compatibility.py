"""Installations that may open a plan, by TensorRT's version and the GPU's compute capability."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from prompttune.errors import EngineError
from prompttune.export.runtimes.tensorrt_library import TENSORRT, Library

AMPERE = (8, 0)
_AGAIN = "export the engine again on this machine"
_NEXT_MAJOR = {10: 11}
"""A version compatible plan of the major version on the left also runs on the one on the right. Source: NVIDIA's
support matrix of 11.4, which supports no other step across major versions from 10 on."""


def gpu_record(index: int) -> dict[str, Any]:
    """Facts that tie a plan to a GPU, for JSON: its name, its compute capability and the CUDA version of PyTorch."""
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "gpu": torch.cuda.get_device_name(index),
        "compute_capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
    }


def version_numbers(version: str) -> tuple[int, ...]:
    """The release of a version such as 10.13.3.9.post1, here (10, 13, 3, 9)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def check_version(built: str, running: str, version_compatible: bool, library: Library = TENSORRT) -> None:
    """Refuse a plan of another version of ``library``.

    Raises:
        EngineError: the versions differ, and the plan is not a version compatible one of an earlier version.
    """
    old, new = version_numbers(built), version_numbers(running)
    if old == new:
        return
    if not version_compatible:
        raise EngineError(
            f"the plan was built by {library.title} {built}, here is {running}, and a plan opens in its own version "
            f"alone: install {library.package}=={built}, or {_AGAIN}"
        )
    if new < old or new[0] not in (old[0], _NEXT_MAJOR.get(old[0])):
        raise EngineError(
            f"the plan was built by TensorRT {built}, here is {running}, and a version compatible plan opens in later "
            f"versions alone, across major ones from 10 to 11 at most: {_AGAIN}"
        )


def check_capability(details: Mapping[str, Any], capability: tuple[int, int]) -> None:
    """Refuse a plan that was built for other GPUs.

    Args:
        details: details of the engine's manifest.
        capability: compute capability of this machine's GPU.

    Raises:
        EngineError: it differs, and the plan's hardware compatibility does not cover it.
    """
    built = [version_numbers(one) for one in details["compute_capability"].split(", ")]
    here = f"{capability[0]}.{capability[1]}"
    if details.get("hardware_compatibility") == "ampere_plus":
        if capability < AMPERE:
            raise EngineError(f"the plan runs on compute capability 8.0 and later, this GPU has {here}: {_AGAIN}")
    elif capability not in built:
        raise EngineError(
            f"the engine was built for compute capability {details['compute_capability']} ({details['gpu']}), "
            f"this GPU has {here}: {_AGAIN}"
        )
