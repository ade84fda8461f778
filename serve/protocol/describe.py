"""Configuration, extensions and fixed settings, the same over both transports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from prompttune.serve.messages import ModelMetadata, ServerMetadata, TensorMetadata
from prompttune.serve.protocol.shared_memory import Regions
from prompttune.serve.service.service import Service

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


def server_metadata(service: Service, regions: Regions) -> ServerMetadata:
    """The server's metadata with the extensions of the transports."""
    found = service.server_metadata()
    more = ["system_shared_memory"] if regions.allowed else []
    return replace(found, extensions=[*found.extensions, *more])


def config_values(metadata: ModelMetadata, max_batch_size: int) -> dict[str, Any]:
    """A model's configuration in Triton's terms; the labels are a JSON list among the parameters."""
    parameters = {"labels": orjson.dumps(list(metadata.labels)).decode(), **metadata.parameters}
    return {
        "name": metadata.name,
        "platform": metadata.platform,
        "backend": "prompttune",
        "max_batch_size": max_batch_size,
        "input": [_config_tensor(one) for one in metadata.inputs],
        "output": [_config_tensor(one) for one in metadata.outputs],
        "dynamic_batching": {},
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
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
