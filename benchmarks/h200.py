"""Fifteen minutes on a rented GPU machine without network: every check that needs a GPU, most valuable first.

Each check is a process of its own with a limit for each of its cases. It appends whole lines to CSV files at once, so
nothing is lost when the time ends or the machine goes away; a second call with the same ``--results`` leaves out what
has passed. Rehearsed on a CPU, never run on a GPU yet.

python -m benchmarks.h200 --part torch --deadline 480 --results out
PYTHONPATH=/tmp/ort python -m benchmarks.h200 --part ort --deadline 240 --results out            # see h200_wheel.py
python -m benchmarks.h200 --part ort --deadline 300 --results out --device cpu --tiny            # rehearsal
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import fcntl
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

CHECKS = "benchmarks.h200_checks"
RESERVE = 4.0
"""Seconds that are kept for the last table."""
STARTING = 90.0
"""Seconds until a process begins a case."""
RESTARTS = 2
"""How often a check whose process died or timed out goes on behind that case."""
RUNNING, PASSED, SKIPPED, TIMED_OUT, FAILED = "running", "passed", "skipped", "timed out", "failed"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Check:
    """A process; ``benchmarks.h200_checks`` has a function of this name that yields rows for each case."""

    name: str
    table: str
    limit: float
    """Seconds of one case."""
    timed: bool = True
    """Measures speed: waits until the builds in the background have ended."""
    only: str = ""
    """The one case of a build, which runs in the background."""


PARTS = {
    "torch": (
        Check("machine", "machine", 60, timed=False),
        Check("forward", "forward", 45, timed=False),
        Check("training", "training", 90, timed=False),
        Check("engines", "speed", 90),
        Check("fan_out", "speed", 60),
        Check("tasks", "speed", 60),
        Check("eager", "speed", 40),
        Check("step", "speed", 150),
    ),
    "ort": (
        Check("machine", "machine", 60, timed=False),
        Check("graphs", "graphs", 60),
        Check("loads", "loads", 60),
        Check("engines", "speed", 60),
        Check("fan_out", "speed", 60),
        Check("tasks", "speed", 60),
    ),
}
BUILT = ("graphs", "loads", "engines", "fan_out", "tasks")
"""Checks of engines; ``BUILDS`` names the engines."""
BUILDS = {
    "torch": ("plain", "sa2vp", "reader", "lspt", "vpt-deep"),
    "ort": ("plain", "fp16", "fp32", "bf16", "segmentation"),
}
TINY_BUILDS = {"torch": ("plain", "vpt-deep"), "ort": ("plain", "fp32", "bf16", "segmentation")}


class Table:
    """A CSV file that several processes append to; after a kill at any moment it holds whole lines alone."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, self._columns = path, columns

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row of the header's keys, each value on one line, and wait until it is on the disk."""
        values = {key: " ".join(str(value).split()) for key, value in {**row, **self._columns}.items()}
        with self.path.open("ab", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            stream.truncate(len(whole))  # a kill may have cut the last line
            header = next(csv.reader([whole.decode().split("\n", 1)[0]])) if whole else list(values)
            if header != list(values):
                raise ValueError(f"{self.path} has the columns {header}, not {list(values)}")
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows([values.values()] if whole else [header, values.values()])
            stream.write(lines.getvalue().encode())
            os.fsync(stream)

    def rows(self) -> list[dict[str, str]]:
        """The whole lines."""
        text = self.path.read_text() if self.path.exists() else ""
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    part: str
    device: str
    tiny: bool
    results: Path
    work: Path
    limits: Mapping[str, float]
    columns: Mapping[str, str]
    """Hardware, versions and command, as the other benchmarks name them."""
    before: int
    """Rows that earlier calls wrote to the ledger."""

    def table(self, name: str) -> Table:
        return Table(self.results / f"{self.part}_{name}.csv", self.columns)

    def record(self, check: str, case: str, status: str, seconds: float = 0, reason: str = "") -> None:
        """Write to the ledger how a case ended, or that it runs; show it if it ended."""
        row = {"check": check, "case": case, "status": status, "seconds": f"{seconds:.1f}", "reason": reason}
        self.table("checks").add(row)
        if status != RUNNING:
            print(line_of(row), flush=True)

    def ledger(self, whole: bool = False) -> dict[tuple[str, str], dict[str, str]]:
        """Check and case → the last row about it of this call, or of all calls."""
        rows = self.table("checks").rows()[0 if whole else self.before :]
        return {(row["check"], row["case"]): row for row in rows}

    def passed(self) -> set[tuple[str, str]]:
        return {key for key, row in self.ledger(whole=True).items() if row["status"] == PASSED}


def line_of(row: Mapping[str, str]) -> str:
    """A row of the ledger for people."""
    return f"{row['status']:9s}  {row['check']:9s} {row['case']:14s} {row['seconds']:>6s} s  {row['reason']}".rstrip()


def version(package: str) -> str:
    """Version of an installed package, empty where there is none."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def hardware(device: str) -> str:
    """The GPU as the driver names it, or the processor with the number of its threads; CUDA is not touched."""
    if device == "cpu":
        models = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        return f"{models[0] if models else 'CPU'} x{os.cpu_count()}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    return "no nvidia-smi"


def run_check(run: Run, check: Check) -> None:
    """In the check's process: run the cases that have neither passed nor been tried in this call."""
    module = importlib.import_module(CHECKS)
    threads = int(run.columns["threads"])
    setting = module.Setting(run.part, run.device, run.tiny, run.work / run.part, threads)
    cases = [check.only] if check.only else module.cases(setting)[check.name]
    left_out = run.ledger().keys() if check.only else run.ledger().keys() | run.passed()
    for case in (case for case in cases if (check.name, case) not in left_out):
        run.record(check.name, case, RUNNING)
        began, status, reason = time.monotonic(), PASSED, ""
        try:
            for row in getattr(module, check.name)(setting, case):
                run.table(check.table).add({"check": check.name, **row})
        except (ModuleNotFoundError, module.Skipped) as problem:
            status, reason = SKIPPED, f"no module {problem.name}" if hasattr(problem, "name") else str(problem)
        except Exception as problem:  # whatever it is, the other cases must run
            traceback.print_exc()
            status, reason = FAILED, f"{type(problem).__name__}: {(str(problem).strip() or '?').splitlines()[0][:300]}"
        run.record(check.name, case, status, time.monotonic() - began, reason)
        if status == FAILED:
            keep_log(run, Path(f"/proc/self/fd/{sys.stderr.fileno()}").resolve())
            if "CUDA error" in reason:
                os._exit(1)  # the context is gone: a new process goes on
    if not check.only and {(check.name, case) for case in cases} <= run.passed():
        run.record(check.name, "", PASSED, 0, f"all {len(cases)} cases")


def keep_log(run: Run, log: Path) -> None:
    """Put the end of what a process printed beside the results."""
    with (run.results / f"{run.part}_log.txt").open("a") as stream:
        stream.write(f"== {log.stem}\n{log.read_text(errors='replace')[-4000:]}\n")


class Child:
    """The process of a check: a fork, so that nothing is imported twice."""

    def __init__(self, run: Run, check: Check) -> None:
        self.run, self.check = run, check
        self.case, self.status, self.since = "", None, time.monotonic()
        self.died = False
        self.log = run.work / run.part / f"{check.name}-{check.only}-{time.monotonic_ns()}.log"
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            self._go(parent)

    def _go(self, parent: int) -> NoReturn:
        """In the new process: leads a group of its own, dies with its parent, and never returns."""
        code = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if os.getppid() == parent:
                os.nice(10 if self.check.only else 0)
                sys.stdout = os.fdopen(os.dup(1), "w")  # for the ledger's lines; libraries print to the log
                with self.log.open("w") as stream:
                    os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
                if "libcuda.so" in Path("/proc/self/maps").read_text():  # loaded by an import: no CUDA in a fork
                    words = [
                        "--child",
                        self.check.name,
                        self.check.only,
                        str(self.run.before),
                        str(sys.stdout.fileno()),
                    ]
                    os.set_inheritable(sys.stdout.fileno(), True)
                    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.h200", *sys.argv[1:], *words])
                run_check(self.run, self.check)
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def goes_on(self, end: float) -> bool:
        """Look after it: whether it still runs. Beyond its limit, or ``end``, it is killed with its group."""
        ledger = self.run.ledger()
        mine = (case for name, case in reversed(ledger) if name == self.check.name)
        case = self.check.only or next(mine, "")
        state = case, ledger.get((self.check.name, case), {}).get("status")
        if state != (self.case, self.status):
            (self.case, self.status), self.since = state, time.monotonic()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        limit = self.run.limits.get(self.check.name, self.check.limit) if self.status == RUNNING else STARTING
        now = time.monotonic()
        if not pid and now - self.since <= limit and now <= end:
            return True
        if not pid:
            self.kill()
            why = f"the limit is {limit:g} s" if now <= end else "the run's time ended"
            self._settle(TIMED_OUT, why)
        elif status:
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            missing = re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", last)
            how = f"ended with {os.waitstatus_to_exitcode(status)}: {last[:300]}"  # a negative one is a signal
            self._settle(SKIPPED if missing else FAILED, f"no module {missing[1]}" if missing else how)
        return False

    def _settle(self, status: str, reason: str) -> None:
        """Write how it ended, unless it has done so itself."""
        row = self.run.ledger().get((self.check.name, self.case))
        if row is None or row["status"] == RUNNING:
            self.run.record(self.check.name, self.case, status, time.monotonic() - self.since, reason)
            keep_log(self.run, self.log)
        self.died = row is not None  # another process may go on behind the case

    def kill(self) -> None:
        """End the whole group now."""
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def probe(run: Run) -> None:
    """Say which of the package's dependencies are here, before anything is imported."""
    if ("machine", "packages") not in run.passed():
        needed = re.findall(r"^[\w.-]+(?!.*extra ==)", "\n".join(metadata.requires("prompttune") or ()), re.MULTILINE)
        versions = {name: version(name) or "missing" for name in needed}
        for name, found in {"python": sys.version.split()[0], **versions}.items():
            run.table("machine").add({"check": "packages", "item": name, "value": found})
        missing = ", ".join(name for name, found in versions.items() if found == "missing")
        run.record("machine", "packages", PASSED, 0, f"missing: {missing}" if missing else "all are there")


def go(run: Run, checks: Sequence[Check], builds: Sequence[str], end: float) -> None:
    """Run everything that has not passed, as far as the time reaches."""
    passed = run.passed()
    waiting = [check for check in checks if (check.name, "") not in passed]
    building: list[Child] = []
    current, restarts = None, 0
    try:
        for name in builds:
            if ("build", name) not in passed or not (run.work / run.part / name).is_dir():
                building.append(Child(run, Check("build", "builds", 0, only=name)))
        while waiting or building or current:
            building = [child for child in building if child.goes_on(end)]
            if current is not None and not current.goes_on(end):
                restarts += 1
                again = current.died and restarts <= RESTARTS and time.monotonic() < end
                current = Child(run, current.check) if again else None
            ready = next((check for check in waiting if not (check.timed and building)), None)
            if current is None and ready is not None:
                waiting.remove(ready)
                left, needs, restarts = end - time.monotonic(), 5 if run.tiny else 20, 0
                if left >= needs:
                    current = Child(run, ready)
                else:
                    run.record(ready.name, "", SKIPPED, 0, f"needs {needs} s, {max(left, 0):.0f} s are left")
            time.sleep(0.02)
    finally:
        for child in [*building, *([current] if current else [])]:
            child.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds, all in all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="timm's test_vit at 64 pixels, few rounds")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/h200"), help="folder of CSV files")
    parser.add_argument("--work", type=Path, help="folder of engines and logs, which a second call uses again")
    parser.add_argument("--only", action="append", metavar="CHECK", help="run this check alone; may be repeated")
    parser.add_argument("--limit", action="append", default=[], metavar="CHECK=SECONDS", help="of one case")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    end = time.monotonic() + given.deadline - RESERVE
    limits = {"build": given.deadline / 2} | {name: float(value) for name, value in (o.split("=") for o in given.limit)}
    columns = {
        "hardware": hardware(given.device),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
        **{name: version(name) for name in ("torch", "timm")},
        "onnxruntime": version("onnxruntime-gpu") or version("onnxruntime"),
        "command": f"python -m benchmarks.h200 --part {given.part} --device {given.device}" + " --tiny" * given.tiny,
    }
    work = given.work or Path(tempfile.gettempdir()) / f"prompttune-h200-{given.device}{'-tiny' * given.tiny}"
    run = Run(given.part, given.device, given.tiny, given.results, work, limits, columns, 0)
    checks = [check for check in PARTS[run.part] if not given.only or check.name in given.only]
    if given.child:
        name, only, before, shown = given.child
        sys.stdout = os.fdopen(int(shown), "w")
        check = Check("build", "builds", 0, only=only) if only else next(one for one in checks if one.name == name)
        run_check(Run(**{**vars(run), "before": int(before)}), check)
        return 0
    for folder in (run.results, run.work / run.part):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(**{**vars(run), "before": len(run.table("checks").rows())})
    builds = (TINY_BUILDS if run.tiny else BUILDS)[run.part] if any(check.name in BUILT for check in checks) else ()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        probe(run)
        with contextlib.suppress(ModuleNotFoundError):  # each check says what it misses
            importlib.import_module(CHECKS)
        go(run, checks, builds, end)
    finally:
        ends = [row for row in run.ledger().values() if row["case"] or row["status"] != PASSED]
        order = (PASSED, SKIPPED, RUNNING, TIMED_OUT, FAILED)
        print(*(line_of(row) for status in order for row in ends if row["status"] == status), sep="\n")
        counts = {status: sum(row["status"] == status for row in ends) for status in order}
        print(", ".join(f"{count} {status}" for status, count in counts.items() if count), flush=True)
    return int(bool(counts[FAILED] or counts[TIMED_OUT]))


if __name__ == "__main__":
    sys.exit(main())
