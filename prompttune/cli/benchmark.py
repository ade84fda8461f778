"""``prompttune benchmark``: accuracy of methods by a protocol. ``prompttune bench`` times engines."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from prompttune.benchmark.plan import RunSpec
from prompttune.benchmark.recipe import chosen, load_recipe
from prompttune.benchmark.run import Benchmark, BenchmarkReport, report_finished, run_benchmark
from prompttune.benchmark.search import decided_so_far, pending
from prompttune.benchmark.settings import BenchmarkSettings
from prompttune.cli.benchmark_progress import Board
from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.settings import make

INTERRUPTED = 130


@click.group()
def benchmark() -> None:
    """Train methods by a protocol and tabulate their accuracy (`prompttune bench` times engines).

    Every run has its own folder in the output. The same command resumes after an interruption: finished runs are kept,
    an unfinished run continues.
    """


def _add(protocol: str, text: str, examples: str, without: Collection[str]) -> None:
    """Add the command of a protocol, with the options of all but the settings ``without``."""

    @click.pass_context
    def command(ctx: click.Context, /, as_json: bool, quiet: bool, **_settings: Any) -> None:
        _run(ctx, protocol, make(BenchmarkSettings, given_settings(ctx)), as_json, quiet)

    shared: list[click.Parameter] = [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the table and all runs as JSON."),
        click.Option(["--quiet"], is_flag=True, help="Show no progress."),
    ]
    benchmark.add_command(
        SectionedCommand(
            protocol,
            callback=command,
            help=text,
            examples=examples,
            params=shared,
            settings=lambda: [one for one in options_of(BenchmarkSettings) if one.name not in without],
        )
    )


_add(
    "demo",
    """Compare methods on the built-in tasks: digits, location, orientation, count.

DINOv2 ViT-S at 56 pixels, 1,000 training images, 4 to 12 epochs (20 or 40 on kept image states for methods that only
read the backbone), three seeds; one to three minutes per run on one CPU core in bf16, twice that in fp32.
    """,
    """
prompttune benchmark demo --output runs/demo
prompttune benchmark demo --methods sa2vp,vpt-deep,linear --tasks location --seeds 0 --jobs 2 --output runs/demo
prompttune benchmark demo --dry-run
    """,
    ("variants", "data_root", "skip_missing", "download"),
)
_add(
    "demo-ablation",
    """Compare SA²VP with and without each of its parts on the built-in tasks, as in Table 5 of its paper.
    """,
    """
prompttune benchmark demo-ablation --output runs/demo-ablation
prompttune benchmark demo-ablation --variants "window 1,window 5" --seeds 0 --jobs 2 --output runs/windows
    """,
    ("methods", "data_root", "skip_missing", "download"),
)
_add(
    "vtab-1k",
    """Compare methods on VTAB-1k: 19 tasks of 1,000 images, means of three groups.

Settings are chosen with train800 and val200, then train800val200 trains and test is scored, five seeds. The data
are the usual lists: DATA_ROOT/NAME/train800.txt, val200.txt, train800val200.txt, test.txt of "path label" lines.
    """,
    """
prompttune benchmark vtab-1k --methods sa2vp,vpt-deep --data-root data/vtab-1k --output runs/vtab --dry-run
prompttune benchmark vtab-1k --methods sa2vp --data-root data/vtab-1k --output runs/vtab --skip-missing
prompttune benchmark vtab-1k --data-root hf://datasets/OWNER/NAME --output runs/vtab
    """,
    ("variants", "download"),
)
_add(
    "fgvc",
    """Compare methods on five fine-grained data sets, with VPT's splits.

CUB-200-2011, NABirds, Oxford Flowers, Stanford Dogs and Stanford Cars as DATA_ROOT/CUB_200_2011, nabirds,
OxfordFlower, Stanford-dogs and Stanford-cars, each with train.json, val.json and test.json of image path to class
id.
    """,
    """
prompttune benchmark fgvc --methods sa2vp --data-root data/fgvc --output runs/fgvc
    """,
    ("variants", "download"),
)
_add(
    "hta",
    """Compare methods on the ten data sets of head-tuning adaptation (DAM-VP).

CUB-200-2011, NABirds, Oxford Flowers and Stanford Dogs as for `fgvc`; CIFAR-10, CIFAR-100, DTD, Food-101, GTSRB
and SVHN in torchvision's folders below DATA_ROOT, where --download puts them.
    """,
    """
prompttune benchmark hta --methods sa2vp --data-root data --download --output runs/hta
    """,
    ("variants",),
)


def _run(ctx: click.Context, protocol: str, settings: BenchmarkSettings, as_json: bool, quiet: bool) -> None:
    from prompttune.benchmark.missing import available_tasks

    # a shell does not expand the ~ in --output=~/folder
    recipe = load_recipe(protocol, settings.recipe.expanduser() if settings.recipe is not None else None)
    overrides = settings.overrides
    wanted = chosen("task", settings.tasks, list(recipe.tasks))
    kind, labels = ("variant", settings.variants) if recipe.variants else ("method", settings.methods)
    job = Benchmark(
        recipe=recipe,
        labels=chosen(kind, labels, recipe.labels),
        tasks=available_tasks(
            recipe,
            wanted,
            overrides.get("data_root"),
            skip=settings.skip_missing,
            fetch=settings.download,
            dry=settings.dry_run or settings.table_only,
            tell=lambda line: click.echo(f"skipped, its data are missing: {line}", err=True),
        ),
        seeds=settings.seeds or recipe.seeds,
        overrides=overrides,
        output=(settings.output or Path("runs") / f"benchmark-{recipe.protocol}").expanduser(),
    )
    if settings.dry_run:
        _print_plan(job, as_json)
    elif settings.table_only:
        _show(ctx, job, report_finished(job, latency=settings.latency), as_json)
    else:
        _carry_out(ctx, job, settings, as_json, Console(stderr=True, quiet=quiet))


def _carry_out(
    ctx: click.Context, job: Benchmark, settings: BenchmarkSettings, as_json: bool, console: Console
) -> None:
    from prompttune.benchmark.runner import default_jobs

    try:
        with Board(console) as board:
            report = run_benchmark(job, settings.jobs or default_jobs(job.device), board, latency=settings.latency)
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command resumes", err=True)
        ctx.exit(INTERRUPTED)
    _show(ctx, job, report, as_json)


def _show(ctx: click.Context, job: Benchmark, report: BenchmarkReport, as_json: bool) -> None:
    from prompttune.benchmark.tables import rich_table

    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        wide = Console(width=None if Console().is_terminal else 400)
        wide.print(rich_table(report.summary))
        click.echo(f"top-1 in percent, mean ± sample deviation over seeds; runs and files: {job.output}")
    for line in (*report.notes, *(f"{failure.run}: {failure.error}" for failure in report.failures)):
        click.echo(line, err=True)
    if report.failures:
        ctx.exit(1)


def _print_plan(job: Benchmark, as_json: bool) -> None:
    search = job.search()
    decision = decided_so_far(search, job.output)

    def state(spec: RunSpec) -> str:
        if spec.candidate is None and decision.is_open(spec):
            return "left out" if (spec.task, spec.label) in decision.barren else "to do"
        return spec.state(job.output)

    shown = [*search, *pending(job.plan(decision.choices), search, decision)]
    rows: list[dict[str, Any]] = [
        {
            "run": spec.name,
            "stage": "final" if spec.candidate is None else "search",
            "group": spec.group,
            "state": state(spec),
            "settings": dict(spec.settings),
        }
        for spec in shown
    ]
    if as_json:
        click.echo(json.dumps({"protocol": job.recipe.protocol, "output": str(job.output), "runs": rows}, indent=2))
        return
    for row in rows:
        words = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        click.echo(f"{row['state']:8}  {row['stage']:6}  {row['run']}  {words}")
    left = sum(row["state"] in ("to do", "begun") for row in rows)
    searching = f", {len(search)} of them to choose settings" if search else ""
    click.echo(f"{job.recipe.protocol}: {len(rows)} runs{searching}; {left} to train; output: {job.output}")
