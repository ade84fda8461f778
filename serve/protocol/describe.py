"""Configuration, metadata and statistics as JSON values; gRPC messages are parsed from the same values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from prompttune.serve.messages import (
    Duration,
    IndexEntry,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
    TensorMetadata,
)
from prompttune.serve.protocol.shared_memory import Regions

_CONFIG_TYPES = {"BYTES": "STRING"}
NO_LOG_CHANGES = "log settings are fixed when the server starts"
NO_TRACE_CHANGES = "the server records no Triton traces"
TRACE_SETTINGS = {"trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0"}
LOG_SETTINGS: dict[str, bool | int | str] = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def server_values(metadata: ServerMetadata, regions: Regions) -> dict[str, Any]:
    """Values of ``GET /v2``."""
    more = ["system_shared_memory"] if regions.allowed else []
    return {"name": metadata.name, "version": metadata.version, "extensions": [*metadata.extensions, *more]}


def _tensor_values(tensor: TensorMetadata) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def metadata_values(metadata: ModelMetadata) -> dict[str, Any]:
    """A model's metadata, as far as both transports can carry it."""
    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": [_tensor_values(one) for one in metadata.inputs],
        "outputs": [_tensor_values(one) for one in metadata.outputs],
    }


def _config_tensor(tensor: TensorMetadata) -> dict[str, Any]:
    """A tensor without its batch dimension. Triton needs at least one dimension, so [N] is reshaped from [N, 1]."""
    values: dict[str, Any] = {
        "name": tensor.name,
        "data_type": f"TYPE_{_CONFIG_TYPES.get(tensor.datatype, tensor.datatype)}",
        "dims": list(tensor.shape[1:]) or [1],
    }
    if len(tensor.shape) == 1:
        values["reshape"] = {"shape": []}
    return values


def config_values(metadata: ModelMetadata) -> dict[str, Any]:
    """A model's configuration in Triton's terms; the labels are a JSON list among the parameters."""
    parameters = {"labels": orjson.dumps(list(metadata.labels)).decode(), **metadata.parameters}
    return {
        "name": metadata.name,
        "platform": metadata.platform,
        "backend": "prompttune",
        "max_batch_size": metadata.max_batch_size,
        "input": [_config_tensor(one) for one in metadata.inputs],
        "output": [_config_tensor(one) for one in metadata.outputs],
        "dynamic_batching": {},
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _batch_values(size: int, compute: Duration) -> dict[str, Any]:
    nothing = _duration(Duration())
    return {
        "batch_size": size,
        "compute_input": nothing,
        "compute_infer": _duration(compute),
        "compute_output": nothing,
    }


def statistics_values(statistics: Sequence[ModelStatistics]) -> dict[str, Any]:
    """Statistics of models in Triton's form."""
    return {
        "model_stats": [
            {
                "name": one.name,
                "version": one.version,
                "last_inference": one.last_inference_ms,
                "inference_count": one.inference_count,
                "execution_count": one.execution_count,
                "inference_stats": {
                    "success": _duration(one.success),
                    "fail": _duration(one.fail),
                    "queue": _duration(one.queue),
                    "compute_input": _duration(one.compute_input),
                    "compute_infer": _duration(one.compute_infer),
                    "compute_output": _duration(one.compute_output),
                    "cache_hit": _duration(Duration()),
                    "cache_miss": _duration(Duration()),
                },
                "batch_stats": [_batch_values(size, compute) for size, compute in sorted(one.batches.items())],
            }
            for one in statistics
        ]
    }


def index_values(entries: Sequence[IndexEntry]) -> list[dict[str, str]]:
    """The repository index."""
    return [{"name": one.name, "version": one.version, "state": one.state, "reason": one.reason} for one in entries]
