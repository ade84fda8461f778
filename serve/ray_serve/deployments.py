"""From settings to a Ray Serve application."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve

from prompttune.errors import UsageError
from prompttune.export.options import RuntimeOptions
from prompttune.serve.limits import MEBI
from prompttune.serve.protocol.settings import AccessSettings, TransportSettings
from prompttune.serve.ray_serve.ingress import Ingress
from prompttune.serve.ray_serve.replica import Replica
from prompttune.serve.service.settings import EngineSettings, ServiceSettings
from prompttune.settings import Setting, all_settings, coerce_all, make, setting, settings_of, settle

ENGINE, INGRESS = "engine", "ingress"
"""Names of the deployments."""

INGRESS_CPUS = 0.5
INGRESS_REQUESTS = 1024
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 10.0
LEAVING_LOOP_S = 0.5
START_ATTEMPTS = 3
WATCH_S = 2.0


@dataclass(frozen=True)
class Scaling:
    """Number of engine replicas, and the resources that each of them books."""

    min_replicas: int = setting(1, low=1)
    max_replicas: int = setting(1, low=1)
    target_requests: float = setting(16.0, above=0)
    """Average number of requests inside a replica; above it replicas are added, below it they are removed."""
    max_requests: int = setting(64, low=1)
    """Largest number of requests inside a replica; more go to another one, whether it holds their task or not."""
    max_waiting: int = setting(1024, low=1)
    """Largest number of requests that wait in an ingress replica while all engine replicas are full; more get 503."""
    cpus: float = 1.0
    gpus: float = 0.0
    ingress_replicas: int = setting(1, low=1)
    affinity: bool = True
    """Whether to prefer replicas that hold a request's task; useless if every replica holds every task."""
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    drain_s: float = 30.0
    """Seconds for the requests of a replica that is to be removed."""

    def __post_init__(self) -> None:
        settle(self)
        if self.min_replicas > self.max_replicas:
            raise UsageError("min_replicas must be at most max_replicas")
        if self.target_requests > self.max_requests:
            raise UsageError("target_requests must be at most max_requests")


def application(
    engine: EngineSettings,
    service: ServiceSettings | None = None,
    transport: TransportSettings | None = None,
    scaling: Scaling | None = None,
) -> serve.Application:
    """An application for ``serve.run``: replicas of one engine behind an ingress. Its folder must be on every node.

    Raises:
        UsageError: a setting does not apply to a cluster.
    """
    service, transport, scaling = service or ServiceSettings(), transport or TransportSettings(), scaling or Scaling()
    if transport.guard.control:
        raise UsageError("a load or unload would reach only one replica: let them watch the folder of tasks")
    if transport.tls is not None:
        raise UsageError("TLS ends at Ray's proxies: set ssl_certfile and ssl_keyfile in their http_options")
    if transport.shared_memory:
        raise UsageError("a client shares its memory with only one node: leave shared memory off")
    if transport.proxies or transport.root_path:
        raise UsageError("Ray's proxies stand in front: give the application a route_prefix")
    if len(engine.devices) != 1:
        raise UsageError("a replica has one device; Ray places the replicas")
    if engine.devices[0] != "cpu" and not scaling.gpus:
        raise UsageError("Ray hides the GPUs from a replica that books none: give the GPUs per replica (gpus)")
    # Ray books processors for a replica, but a runtime would use all that it sees.
    runtime = replace(engine.runtime, device=engine.devices[0]).or_threads(max(1, math.floor(scaling.cpus)))
    engine = replace(engine, runtime=runtime)
    replicas = _engine_deployment(scaling).bind(engine, service, transport)
    bound: serve.Application = _ingress_deployment(scaling).bind(
        replicas, transport, service.timeout_s, scaling.affinity
    )
    return bound


def _engine_deployment(scaling: Scaling) -> serve.Deployment:
    return serve.deployment(
        Replica,
        name=ENGINE,
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
        },
        ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        max_ongoing_requests=scaling.max_requests,
        max_queued_requests=scaling.max_waiting,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=LEAVING_LOOP_S,
        graceful_shutdown_timeout_s=scaling.drain_s,
        max_constructor_retry_count=START_ATTEMPTS,
    )


def _ingress_deployment(scaling: Scaling) -> serve.Deployment:
    return serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=scaling.ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=INGRESS_REQUESTS,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=LEAVING_LOOP_S,
        graceful_shutdown_timeout_s=scaling.drain_s,
    )


@dataclass(frozen=True)
class Arguments:
    """What ``serve run`` and a configuration file may say beside :data:`SERVED` and the fields of :class:`Scaling`."""

    engine: Path
    device: str = "cpu"
    host_memory_mib: int = setting(1024, low=0)
    watch: bool = False
    """Follow the tasks of the engine's folder."""


SERVED = (
    "threads",
    "runtime",
    "image_cache",
    "max_batch",
    "max_delay_ms",
    "resident_tasks",
    "max_queue",
    "timeout",
    "token_file",
)
"""Options of ``prompttune serve`` that are arguments as well."""


def build(values: dict[str, Any]) -> serve.Application:
    """:func:`application` from the arguments of ``serve run prompttune.serve.ray_serve:build``, see :class:`Arguments`.

    Raises:
        UsageError: an argument is unknown, missing or wrong, or the token file cannot be read.
    """
    options: dict[str, Setting] = {}
    for kind in (RuntimeOptions, EngineSettings, ServiceSettings, AccessSettings):
        options |= all_settings(kind)
    known = {name: options[name] for name in SERVED} | settings_of(Scaling) | settings_of(Arguments)
    if "engine" not in values:
        raise UsageError("the argument engine is missing: give the engine's folder")
    given = coerce_all(values, known, "argument")
    own = make(Arguments, given)
    engine = EngineSettings.of(
        own.engine, given, device=(own.device,), host_memory=own.host_memory_mib * MEBI, watch=()
    )
    service = replace(make(ServiceSettings, given), watch_interval_s=WATCH_S if own.watch else None)
    return application(
        engine, service, TransportSettings(guard=make(AccessSettings, given).guard), make(Scaling, given)
    )
