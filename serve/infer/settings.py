"""Settings of a job of inference, of which the options of ``prompttune infer`` are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prompttune.errors import UsageError
from prompttune.export.options import RuntimeOptions
from prompttune.serve.limits import TOP_K
from prompttune.settings import part, setting, settle

if TYPE_CHECKING:
    from prompttune.serve.infer.sources.labels import Labels

BATCH_SIZE = 32
STDIN_FORMS = ("list", "jsonl")
DECODERS = ("threads", "processes")
Drop = Literal["oldest", "none"]
"""What happens to a full queue: its oldest item leaves, or the reader waits."""
STANDARD_OUTPUTS: Mapping[str, Literal["jsonl", "csv"]] = {"-": "jsonl", "jsonl:-": "jsonl", "csv:-": "csv"}
"""Form of each standard output, by name."""
TASKS, INPUTS, FRAMES = "Tasks", "Inputs", "Video and streams"
OUTPUTS, SPEED, CLUSTER = "Outputs", "Speed", "Cluster"
"""Sections of the help."""


def row_log_path(outputs: Sequence[str]) -> Path | None:
    """Path of a run's row log, beside its first output that is a file or a folder; None without such an output."""
    for output in outputs:
        if output not in STANDARD_OUTPUTS:
            path = Path(output)
            return path.with_name(f"{path.name}.rowlog")
    return None


@dataclass(frozen=True)
class Shard:
    """One of several jobs that share the inputs: chunk k belongs to shard k modulo ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | Shard) -> Shard:
        """Read ``i/n``, with i from 0 to n - 1.

        Raises:
            UsageError: the text has another form.
        """
        if isinstance(text, Shard):
            return text
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise UsageError(f"shards are written i/n, such as 0/4, not {text!r}")
        index, count = int(found[1]), int(found[2])
        if index >= count:
            raise UsageError(f"the shard {text} does not exist: shards are counted from 0 to {count - 1}")
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class SourceSettings:
    """Settings for reading inputs."""

    input_format: str | None = setting(
        None, "Format of the inputs: images, list, table, shards, video, stream or that of another package.",
        shown="the one that the name tells", section=INPUTS,
    )  # fmt: skip
    image_column: str | None = setting(
        None, "Column of paths, bytes or structs of them.", shown="the one that looks like it", section=INPUTS
    )
    stdin: str = setting("list", "Content of standard input: a path per line, or JSON lines.", STDIN_FORMS,
                         must_match_on_resume=False, section=INPUTS)  # fmt: skip
    watch: bool = setting(False, "Follow a folder and answer new images.", must_match_on_resume=False,
                          section=INPUTS)  # fmt: skip
    limit: int | None = setting(None, "Largest number of inputs.", low=1, section=INPUTS)
    """The plan applies it to bounded sources."""
    task_column: str | None = setting(
        None, "Column of a table, key of JSON lines or member of a shard that names each image's task.", section=TASKS
    )
    labels: str | None = setting(
        None,
        "True labels: folder (the name of an image's folder), a .csv of path,label, or a column, key or member; "
        "prints accuracy and calibration.",
        section=TASKS,
    )
    fps: float | None = setting(None, "Largest number of frames per second.", above=0, section=FRAMES)
    stride: int = setting(1, "Keep every N-th frame.", low=1, metavar="N", section=FRAMES)
    drop: Drop | None = setting(
        None, "Handling of late frames: drop the oldest, or let the sender wait.", ("oldest", "none"),
        shown="oldest for streams and cameras", must_match_on_resume=False, section=FRAMES,
    )  # fmt: skip
    buffer: int = setting(8, "Largest number of waiting frames.", low=1, must_match_on_resume=False,
                          section=FRAMES)  # fmt: skip
    reconnects: int | None = setting(
        10, "Number of attempts in a row to reconnect a stream, 0.5 to 30 seconds apart.", low=0,
        must_match_on_resume=False, section=FRAMES,
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)

    @cached_property
    def truth(self) -> Labels | None:
        """Source of the true labels, from ``labels``."""
        from prompttune.serve.infer.sources.labels import Labels

        return None if self.labels is None else Labels.parse(self.labels)

    @property
    def label_column(self) -> str | None:
        """Column, key or member of the true label in tables, JSON lines and shards."""
        return None if self.truth is None else self.truth.column


@dataclass(frozen=True)
class Decoding:
    """Settings of the decoders."""

    workers: int | None = setting(None, "Number of decoding workers.", low=1, shown="one per core", section=SPEED)
    kind: str = setting(
        "threads", "Kind of decoding workers; processes help many cores to feed a fast device.", DECODERS,
        option="decode", section=SPEED,
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)

    @property
    def count(self) -> int:
        """Number of decoding workers."""
        from prompttune.serve.decode_threads import usable_cores

        return self.workers or usable_cores()


def _read_pool(value: str | tuple[int, int | None]) -> tuple[int, int | None]:
    """Read ``N`` or ``MIN,MAX``."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+)(?:,(\d+))?", value)
    if found is None:
        raise UsageError(f"{value!r} is neither a number nor two such as 1,8")
    return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True)
class RaySettings:
    """Address of the cluster, and how much of it the job uses."""

    address: str | None = setting(
        None, "HOST:PORT, or auto.", shown="RAY_ADDRESS, else one started here", option="ray_address", section=CLUSTER
    )
    """None or ``auto`` uses ``RAY_ADDRESS``, else the cluster on this machine, else starts one here for the job."""
    actors: tuple[int, int | None] = setting(
        (1, None), "Number of engines, each in its own process.", shown="as many as fit", kind=str,
        read=_read_pool, metavar="N or MIN,MAX", option="ray_engines", section=CLUSTER,
    )  # fmt: skip
    """Smallest and largest number; None for as many as fit."""
    cpus: float = setting(1.0, "CPUs that each engine books; also its threads.", above=0, option="ray_cpus",
                          section=CLUSTER)  # fmt: skip
    gpus: float | None = setting(None, "GPUs that each engine books.", low=0, shown="1 on cuda", option="ray_gpus",
                                 section=CLUSTER)  # fmt: skip
    decoder_cpus: float = setting(1.0, above=0)
    """CPUs that each decoding task books."""
    parcel: int = setting(128, low=1)
    """Number of inputs that are sent and decoded together, in whole chunks."""
    window: int | None = setting(None, low=1)
    """Largest number of unanswered parcels; None picks enough to keep the cluster busy."""

    def __post_init__(self) -> None:
        settle(self)
        least, most = self.actors
        if least < 1 or (most is not None and most < least):
            raise UsageError("the smallest number of engines must be at least 1 and not exceed the largest")


@dataclass(frozen=True)
class InferSettings:
    """Settings of a job of inference."""

    engine: Path
    """The engine folder."""
    inputs: tuple[str, ...]
    """See :func:`~prompttune.serve.infer.sources.opening.open_source`."""
    outputs: tuple[str, ...] = setting(
        ("-",), "Output of the rows; may be repeated.", option="output", short="-o", repeat=True, section=OUTPUTS
    )
    """See :func:`~prompttune.serve.infer.sinks.opening.open_sinks`."""
    tasks: tuple[str, ...] = setting(
        (), "Task to answer for, or all; may be repeated. An image is decoded once; its tasks share the frozen work.",
        shown="the only one", option="task", repeat=True, section=TASKS,
    )  # fmt: skip
    """Tasks of every input; empty uses the engine's only task, or the task that each input names."""
    source: SourceSettings = part(SourceSettings)
    options: RuntimeOptions = part(partial(RuntimeOptions, spin=False), must_match_on_resume=False)
    """Options of the runtime; threads that do not spin leave the cores to the decoders."""
    decoding: Decoding = part(Decoding, must_match_on_resume=False)
    ray: RaySettings | None = None
    """Settings of a Ray cluster; None runs on this machine."""
    top_k: int = setting(TOP_K, "Largest number of classes in a row.", low=1, section=TASKS)
    batch_size: int = setting(BATCH_SIZE, "Number of rows in one call.", low=1, section=SPEED)
    shard: Shard = setting(
        Shard(), "Part I of N parts of the inputs, I from 0, for one machine or array job.", kind=str,
        read=Shard.parse, option="shards", metavar="I/N", shown="", section=INPUTS,
    )  # fmt: skip
    smooth: float | None = setting(
        None, "Half-life in seconds for averaging probabilities over time.", above=0,
        metavar="SECONDS", section=FRAMES,
    )  # fmt: skip
    max_errors: int | None = setting(
        None, "Number of inputs with errors to tolerate; more end the run with exit code 1.", low=0, shown="any number",
        must_match_on_resume=False, section=OUTPUTS,
    )  # fmt: skip
    overwrite: bool = setting(False, "Replace outputs of an earlier run.", must_match_on_resume=False, section=OUTPUTS)
    resume: bool = setting(
        False,
        "Resume an interrupted run, or answer inputs added at the end of a finished one; outputs are written again "
        "from the row log. Refused if an answered input has changed.",
        must_match_on_resume=False,
        section=OUTPUTS,
    )
    csv_bom: bool = setting(
        False, "Start CSV with a byte order mark, which tells Excel that it is UTF-8.", section=OUTPUTS
    )

    def __post_init__(self) -> None:
        settle(self)
        for output in self.outputs:
            if output not in STANDARD_OUTPUTS and Path(output).name in ("", ".."):
                raise UsageError(f"the output {output!r} has no name of its own: name a file or a new folder")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other: give one")
        if self.resume and row_log_path(self.outputs) is None:
            raise UsageError("--resume needs an output that is a file: standard output keeps no record")
        if self.csv_bom and not any(output.lower().endswith((".csv", "csv:-")) for output in self.outputs):
            raise UsageError("--csv-bom is for CSV: none of the outputs is a .csv file or csv:-")
        if self.ray is not None and self.smooth is not None:
            raise UsageError("--smooth needs frame after frame in one place: leave out --executor ray")
