"""Progress of a build, from the phases that TensorRT reports: they nest, and each has a known number of steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

OnProgress = Callable[[float], None]
"""Called with the finished share, which rises from 0 to 1, at every further percent."""
_BAR = 24
"""Number of characters of a bar."""


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTracker:
    """Turns nested phases into one share. Phases may be reported from several threads."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._percent = -1

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase has started; ``parent`` is the phase that it is a step of, or None."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._report()

    def step(self, name: str, step: int) -> None:
        """A phase has finished the step of this index, counted from 0."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._report()

    def finish(self, name: str) -> None:
        """A phase has ended, perhaps before all of its steps."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = phase.steps
                self._report()
                del self._phases[name]

    def _report(self) -> None:
        outermost = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        share = min(map(self._share, outermost))
        if int(100 * share) > self._percent:  # a phase that begins late takes the whole back, and is not reported
            self._percent = int(100 * share)
            self._on_progress(share)

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        inner = max((self._share(one) for one, other in self._phases.items() if other.parent == name), default=0.0)
        return min((phase.done + inner) / phase.steps, 1.0)


def bar(share: float) -> str:
    """A share as a bar with a percentage, in plain text."""
    filled = int(_BAR * share)
    return f"{'━' * filled}{'─' * (_BAR - filled)} {share:.0%}"
