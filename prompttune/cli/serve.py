"""``prompttune serve``."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prompttune.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from prompttune.serve.protocol.security import Tokens
    from prompttune.serve.server import ServerSettings

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
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


def size(_context: click.Context, _parameter: click.Parameter, value: str) -> int:
    """Number of bytes from a size such as ``512MiB`` or ``4GB``."""
    found = _SIZE.fullmatch(value.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise click.BadParameter(f"{value!r} is not a size such as 512MiB or 4GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, envvar="PROMPTTUNE_HOST", show_envvar=True,
    help="Address or name to listen on, the same for both transports; 0.0.0.0 or :: for all of IPv4 and IPv6.",
)  # fmt: skip
@click.option("--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="HTTP port; 0: free.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="gRPC port; 0: free.")
@click.option("--no-grpc", is_flag=True, help="Serve only HTTP.")
@click.option(
    "--device", "devices", multiple=True, default=("cpu",), show_default=True,
    help="Device: cpu, cuda or cuda:INDEX; may be repeated for more workers.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each worker.  [default: one per core]")
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Most images in a batch.")
@click.option(
    "--max-delay-ms", type=click.FloatRange(0), default=0.0, show_default=True,
    help="Longest wait of an image for others while its device is free.",
)  # fmt: skip
@click.option(
    "--stall-seconds", type=click.FloatRange(0.01), default=120.0, show_default=True,
    help="Longest time of a batch; a worker that exceeds it is restarted.",
)  # fmt: skip
@click.option("--max-queue", type=click.IntRange(1), default=1024, show_default=True, help="Most images inside.")
@click.option("--timeout", type=click.FloatRange(0.001), default=60.0, show_default=True, help="Timeout, in seconds.")
@click.option(
    "--resident-tasks", type=click.IntRange(1), default=64, show_default=True,
    help="Number of tasks that each device keeps loaded; the least recently used are evicted.",
)  # fmt: skip
@click.option(
    "--host-memory", default="1GiB", show_default=True, callback=size, metavar="SIZE",
    help="Memory of each worker for tasks that are not loaded, so that they are not read from disk again.",
)  # fmt: skip
@click.option(
    "--watch", is_flag=False, flag_value=OWN_TASKS, metavar="[FOLDER]",
    help="Follow added, changed and removed tasks in the engine's folder, and also in FOLDER if given.",
)  # fmt: skip
@click.option(
    "--watch-seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Seconds between two scans."
)
@click.option("--decode-workers", type=click.IntRange(1), help="Number of decoding threads.  [default: one per core]")
@click.option(
    "--token-file", type=click.Path(dir_okay=False, path_type=Path),
    help="Bearer tokens for inference, one per line.  [default: inference is open]",
)  # fmt: skip
@click.option(
    "--allow-shared-memory", is_flag=True,
    help="Let clients on this machine pass tensors in system shared memory; read the page on security first.",
)  # fmt: skip
@click.option("--allow-control", is_flag=True, help="Let clients load and unload tasks.")
@click.option(
    "--control-token-file", type=click.Path(dir_okay=False, path_type=Path), help="Bearer tokens for control."
)
@click.option("--tls-certificate", type=click.Path(dir_okay=False, path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(dir_okay=False, path_type=Path), help="Private key of the certificate, PEM.")
@click.option(
    "--tls-client-ca", type=click.Path(dir_okay=False, path_type=Path), help="Authority of client certificates."
)
@click.option("--max-body", default="64MiB", show_default=True, callback=size, metavar="SIZE", help="Largest request.")
@click.option("--max-images", type=click.IntRange(1), default=256, show_default=True, help="Most images of a request.")
@click.option("--max-pixels", type=click.IntRange(1), default=50_000_000, show_default=True, help="Pixel limit.")
@click.option(
    "--keep-alive-seconds", type=click.IntRange(1), default=75, show_default=True,
    help="Seconds that an HTTP connection may stay idle; longer than a proxy in front keeps it.",
)  # fmt: skip
@click.option(
    "--forwarded-allow-ips", default="", metavar="ADDRESSES",
    help="Proxies whose X-Forwarded-For, -Proto, -Host and -Prefix are trusted: addresses and networks, separated by "
    "commas, or * for all.  [default: none]",
)  # fmt: skip
@click.option(
    "--root-path", default="", metavar="PATH",
    help="Path prefix under which a proxy publishes the server, such as /vision.",
)  # fmt: skip
@click.option(
    "--drain-seconds", type=click.FloatRange(0), default=30.0, show_default=True,
    help="Seconds after SIGTERM to answer the requests inside; the remaining ones get 503.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True,
    help="Level of the JSON log lines on standard error.",
)  # fmt: skip
def serve(engine: Path, log_level: str, **options: Any) -> None:
    """Serve the tasks of ENGINE with the Open Inference Protocol v2, over HTTP and gRPC.

    Every task is a model; the model "mixed" takes a task for each image. All share one backbone, and requests for
    different tasks share batches. The page at / shows them. SIGTERM drains the server.

    \b
    prompttune serve engine
    prompttune serve engine --device cuda --max-batch 64 --resident-tasks 256 --watch
    prompttune serve engine --host 0.0.0.0 --token-file tokens --tls-certificate cert.pem --tls-key key.pem
    """
    missing = [package for package, module in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(missing[0], "serve", "prompttune infer classifies files without a server")
    from prompttune.serve.protocol.logs import configure_logs
    from prompttune.serve.server import Addresses, Server

    configure_logs(log_level.upper())

    def tell(addresses: Addresses) -> None:
        where = f"{addresses.http}, gRPC {addresses.grpc}" if addresses.grpc else addresses.http
        click.echo(f"Listening on {where}; opening {engine}")

    async def run() -> None:
        await Server(_settings(engine, options), tell, lambda: click.echo("Ready")).run()

    asyncio.run(run())


def _settings(engine: Path, options: dict[str, Any]) -> ServerSettings:
    from prompttune.export.runtimes import RuntimeOptions
    from prompttune.serve.assembly import EngineSettings
    from prompttune.serve.limits import Limits
    from prompttune.serve.protocol.forwarded import read_prefix, read_proxies
    from prompttune.serve.protocol.security import Guard, Tls, read_tokens
    from prompttune.serve.protocol.settings import TransportSettings
    from prompttune.serve.server import ServerSettings
    from prompttune.serve.service import ServiceSettings

    def tokens(option: str) -> Tokens | None:
        return read_tokens(options[option]) if options[option] else None

    if (options["tls_certificate"] is None) != (options["tls_key"] is None):
        raise UsageError("--tls-certificate and --tls-key go together")
    watch: str | None = options["watch"]
    limits = Limits(body_bytes=options["max_body"], rows=options["max_images"], pixels=options["max_pixels"])
    cores = os.cpu_count() or 1
    return ServerSettings(
        engine=EngineSettings(
            engine=engine,
            devices=options["devices"],
            runtime=RuntimeOptions(threads=options["threads"]),
            max_batch=options["max_batch"],
            max_delay_s=options["max_delay_ms"] / 1000,
            stall_s=options["stall_seconds"],
            resident_tasks=options["resident_tasks"],
            host_bytes=options["host_memory"],
            watch=(Path(watch),) if watch else (),
        ),
        service=ServiceSettings(
            limits=limits,
            max_queue=options["max_queue"],
            timeout_s=options["timeout"],
            decode_workers=options["decode_workers"] or cores,
            watch_interval_s=None if watch is None else options["watch_seconds"],
        ),
        transport=TransportSettings(
            limits=limits,
            guard=Guard(tokens("token_file"), tokens("control_token_file"), options["allow_control"]),
            tls=None
            if options["tls_certificate"] is None
            else Tls(options["tls_certificate"], options["tls_key"], options["tls_client_ca"]),
            idle_seconds=options["keep_alive_seconds"],
            proxies=read_proxies(options["forwarded_allow_ips"]),
            shared_memory=options["allow_shared_memory"],
            root_path=read_prefix(options["root_path"]),
        ),
        host=options["host"],
        http_port=options["http_port"],
        grpc_port=None if options["no_grpc"] else options["grpc_port"],
        drain_s=options["drain_seconds"],
    )
