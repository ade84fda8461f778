"""Listening sockets of both transports: every address that a host name stands for, on one port."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence
from typing import Any

from prompttune.errors import EngineError

BACKLOG = 2048
WILDCARDS = ("0.0.0.0", "::")
"""Host names that stand for every address of both families, as in gRPC."""
_BOTH = dict.fromkeys(WILDCARDS, WILDCARDS) | {"localhost": ("127.0.0.1", "::1")}
"""Host names that stand for one address of each family, whatever the machine's hosts file says."""
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


def listen(host: str, port: int) -> list[socket.socket]:
    """Open a listening socket for each address of ``host``, all on the same port; 0 picks a free port.

    An address that this machine does not have, such as ``::1`` where IPv6 is off, is skipped.

    Raises:
        EngineError: the host name is unknown, an address is in use, or the machine has none of them.
    """
    with contextlib.ExitStack() as stack:
        found: list[socket.socket] = []
        try:
            for family, address in _addresses(host, port):
                chosen = (address[0], found[0].getsockname()[1] if found else address[1], *address[2:])
                try:
                    one = socket.create_server(chosen, family=family, backlog=BACKLOG)
                except OSError as problem:
                    if problem.errno not in _ABSENT:
                        raise
                    continue
                found.append(stack.enter_context(one))
            if not found:
                raise OSError(errno.EADDRNOTAVAIL, "this machine does not have the address")
        except (OSError, UnicodeError) as problem:
            why = getattr(problem, "strerror", None) or problem
            raise EngineError(f"cannot listen on {bracketed(host)}:{port} for HTTP: {why}") from None
        stack.pop_all()
    return found


def _addresses(host: str, port: int) -> Sequence[tuple[int, tuple[Any, ...]]]:
    found = [
        one for name in _BOTH.get(host, (host,)) for one in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    ]
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


def bracketed(host: str) -> str:
    """``host`` as written before a port."""
    return f"[{host}]" if ":" in host else host
