"""What both transports of one server share while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from prompttune.serve.protocol.calls import Calls


@dataclass(frozen=True)
class State:
    """Make one for a server and hand it to both transports."""

    calls: Calls = field(default_factory=Calls)
