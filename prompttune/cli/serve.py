"""``prompttune serve``."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from pathlib import Path
from typing import Any

import click

from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import MissingExtraError
from prompttune.export.options import RuntimeOptions
from prompttune.serve.protocol.settings import AccessSettings, ServerSettings
from prompttune.serve.service.settings import EngineSettings
from prompttune.settings import make

OWN_TASKS = ""
"""Value of ``--watch`` without a folder."""
_NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "tritonclient": "tritonclient",
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
}
"""Packages of the extra, with their modules."""


WATCH_S = 2.0


def _options() -> list[click.Parameter]:
    runtime = options_of(RuntimeOptions, only=("threads", "runtime", "provider_cache", "image_cache"))
    return [*options_of(ServerSettings, EngineSettings), *runtime, *options_of(AccessSettings)]


@click.command(cls=SectionedCommand, settings=_options)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--no-grpc", is_flag=True, help="Serve only HTTP.")
@click.option(
    "--watch", is_flag=False, flag_value=OWN_TASKS, metavar="[FOLDER]",
    help="Follow added, changed and removed tasks in the engine's folder, and also in FOLDER if given.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True,
    help="Level of the JSON log lines on standard error.",
)  # fmt: skip
@click.pass_context
def serve(
    ctx: click.Context, /, engine: Path, no_grpc: bool, watch: str | None, log_level: str, **_settings: Any
) -> None:
    """Serve the tasks of ENGINE with the Open Inference Protocol v2, over HTTP and gRPC.

    Every task is a model; the model "mixed" takes a task for each image, and "panel" answers several for each. All
    share one backbone, and requests for different tasks share batches. The page at / shows them. SIGTERM drains the
    server.

    \b
    prompttune serve engine
    prompttune serve engine --device cuda --max-batch 64 --resident-tasks 256 --watch
    prompttune serve engine --host 0.0.0.0 --token-file tokens --tls-certificate cert.pem --tls-key key.pem
    """
    missing = [package for package, module in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(missing[0], "serve", "prompttune infer classifies files without a server")
    from prompttune.serve.protocol.logs import configure_logs
    from prompttune.serve.protocol.server import Addresses, Server

    configure_logs(log_level.upper())

    settings = _server_settings(engine, given_settings(ctx), no_grpc, watch)

    def tell(addresses: Addresses) -> None:
        where = f"{addresses.http}, gRPC {addresses.grpc}" if addresses.grpc else addresses.http
        click.echo(f"Listening on {where}; opening {engine}")

    async def run() -> None:
        await Server(settings, tell, lambda: click.echo("Ready")).run()

    asyncio.run(run())


def _server_settings(engine: Path, given: dict[str, Any], no_grpc: bool, watch: str | None) -> ServerSettings:
    access = make(AccessSettings, given)
    values = {"decode_workers": os.cpu_count() or 1, "watch_seconds": WATCH_S, **given}
    if watch is None:
        del values["watch_seconds"]
    if no_grpc:
        values["grpc_port"] = None
    served = EngineSettings.of(engine, values, watch=(Path(watch),) if watch else ())
    return make(ServerSettings, {**values, "engine": served, "guard": access.guard, "tls": access.tls})
