"""The calls of the Open Inference Protocol v2 over gRPC.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

# ruff: noqa: N802, ARG002
# The methods have the protocol's names, and take a message even if it is empty.

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2

from prompttune.serve.messages import UnsupportedError
from prompttune.serve.protocol import grpc_codec
from prompttune.serve.protocol.codec import refuse_overrides
from prompttune.serve.protocol.describe import (
    NO_LOG_CHANGES,
    NO_TRACE_CHANGES,
    config_values,
    index_values,
    metadata_values,
    server_values,
    statistics_values,
)
from prompttune.serve.protocol.service import InferenceService
from prompttune.serve.protocol.shared_memory import Regions
from prompttune.serve.protocol.state import State


class Servicer:
    """One method for each call except inference: takes a message, returns a message or raises a ``ServeError``."""

    def __init__(self, service: InferenceService, state: State) -> None:
        self._service = service
        self._regions = state.regions
        self._cuda_regions = Regions(allowed=False, kind="CUDA")

    async def ServerLive(self, message: Any) -> Any:
        """Whether the process is alive."""
        return service_pb2.ServerLiveResponse(live=self._service.live())

    async def ServerReady(self, message: Any) -> Any:
        """Whether the server is ready to answer."""
        return service_pb2.ServerReadyResponse(ready=self._service.ready())

    async def ModelReady(self, message: Any) -> Any:
        """Whether a model is ready to answer."""
        return service_pb2.ModelReadyResponse(ready=self._service.model_ready(message.name, message.version))

    async def ServerMetadata(self, message: Any) -> Any:
        """Name, version and extensions of the server."""
        values = server_values(self._service.server_metadata(), self._regions)
        return grpc_codec.parse_values(values, service_pb2.ServerMetadataResponse())

    async def ModelMetadata(self, message: Any) -> Any:
        """Inputs and outputs of a model."""
        values = metadata_values(self._service.model_metadata(message.name, message.version))
        return grpc_codec.parse_values(values, service_pb2.ModelMetadataResponse())

    async def ModelConfig(self, message: Any) -> Any:
        """A model's configuration, with its labels among the parameters."""
        values = {"config": config_values(self._service.model_metadata(message.name, message.version))}
        return grpc_codec.parse_values(values, service_pb2.ModelConfigResponse())

    async def ModelStatistics(self, message: Any) -> Any:
        """Statistics of one model or of all models."""
        values = statistics_values(self._service.statistics(message.name, message.version))
        return grpc_codec.parse_values(values, service_pb2.ModelStatisticsResponse())

    async def RepositoryIndex(self, message: Any) -> Any:
        """Every model in the repository."""
        values = {"models": index_values(self._service.index(message.ready))}
        return grpc_codec.parse_values(values, service_pb2.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, message: Any) -> Any:
        """Load a model or its new version."""
        refuse_overrides(message.parameters)
        await self._service.load(message.model_name)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, message: Any) -> Any:
        """Unload a model."""
        refuse_overrides(message.parameters)
        await self._service.unload(message.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(self, message: Any) -> Any:
        """One registered region or all of them."""
        response = service_pb2.SystemSharedMemoryStatusResponse()
        for one in self._regions.status(message.name):
            grpc_codec.parse_values(one, response.regions[one["name"]])
        return response

    async def SystemSharedMemoryRegister(self, message: Any) -> Any:
        """Register a region."""
        self._regions.register(message.name, message.key, message.offset, message.byte_size)
        return service_pb2.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, message: Any) -> Any:
        """Unregister one region or all of them."""
        self._regions.unregister(message.name)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, message: Any) -> Any:
        """Always empty: CUDA regions are not supported."""
        self._cuda_regions.status(message.name)
        return service_pb2.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, message: Any) -> Any:
        """Refuse the region: CUDA regions are not supported."""
        self._cuda_regions.check_allowed()

    async def CudaSharedMemoryUnregister(self, message: Any) -> Any:
        """Do nothing: CUDA regions are never registered."""
        return service_pb2.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, message: Any) -> Any:
        """Report that tracing is off; refuse changes."""
        if message.settings:
            raise UnsupportedError(NO_TRACE_CHANGES)
        if message.model_name:
            self._service.model_metadata(message.model_name)
        return grpc_codec.trace_settings()

    async def LogSettings(self, message: Any) -> Any:
        """Report the log settings; refuse changes."""
        if message.settings:
            raise UnsupportedError(NO_LOG_CHANGES)
        return grpc_codec.log_settings()
