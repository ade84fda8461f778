"""State that both transports of one server share while it runs."""

from __future__ import annotations

from prompttune.serve.protocol.calls import Calls
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.shared_memory import Regions


class State:
    """Shared state; create one per server and pass it to both transports."""

    def __init__(self, settings: TransportSettings) -> None:
        self.calls = Calls()
        self.regions = Regions(settings.shared_memory)
