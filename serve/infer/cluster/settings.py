"""What a job takes of the nodes of a Ray cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prompttune.errors import UsageError
from prompttune.serve.infer.settings import RaySettings


@dataclass(frozen=True)
class Booking:
    """Resources of a node that an engine and a decoder book."""

    cpus: float
    gpus: float
    decoder_cpus: float

    @classmethod
    def of(cls, settings: RaySettings, on_gpu: bool) -> Booking:
        """The booking of an engine that runs on a GPU or on CPUs.

        Raises:
            UsageError: a GPU is needed but not booked.
        """
        gpus = float(on_gpu) if settings.gpus is None else settings.gpus
        if on_gpu and not gpus:
            raise UsageError("Ray hides the GPUs from an engine that books none: say how many one takes (gpus)")
        return cls(settings.cpus, gpus, settings.decoder_cpus)

    def room(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """Number of engines that fit on these nodes with room for decoders; other jobs are not considered.

        On CPUs each engine needs a decoder; with GPUs one decoder is enough.
        """
        nodes = list(nodes)
        cpus = sum(node.get("CPU", 0.0) for node in nodes)
        placed = sum(
            math.floor(
                min(node.get("CPU", 0.0) / self.cpus, node.get("GPU", 0.0) / self.gpus if self.gpus else math.inf)
            )
            for node in nodes
        )
        if self.gpus:
            beside_decoders = math.floor((cpus - self.decoder_cpus) / self.cpus)
        else:
            beside_decoders = math.floor(cpus / (self.cpus + self.decoder_cpus))
        return max(0, min(placed, beside_decoders))
