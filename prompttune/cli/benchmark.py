"""``prompttune benchmark``: accuracy of methods by a protocol. ``prompttune bench`` times engines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from prompttune.benchmark.benchmark import Job, Report, report_finished, run_benchmark
from prompttune.benchmark.plan import RunSpec
from prompttune.benchmark.recipe import chosen, load_recipe
from prompttune.benchmark.search import decided_so_far, pending
from prompttune.cli.benchmark_options import common_options, data_options, words
from prompttune.cli.benchmark_progress import Board

INTERRUPTED = 130
_methods = click.option("--methods", metavar="A,B,…", callback=words, help="Methods to compare.  [default: all]")


@click.group()
def benchmark() -> None:
    """Train methods by a protocol and tabulate their accuracy (`prompttune bench` times engines).

    Every run has its own folder in the output. The same command resumes after an interruption: finished runs are kept,
    an unfinished run continues.
    """


@benchmark.command()
@_methods
@common_options
@click.pass_context
def demo(ctx: click.Context, /, methods: tuple[str, ...] | None, **options: Any) -> None:
    """Compare methods on the built-in tasks: digits, location, orientation, count.

    DINOv2 ViT-S at 56 pixels, 1,000 training images, 4 to 12 epochs, three seeds; one to three minutes per run on one
    CPU core in bf16, twice that in fp32.

    \b
    prompttune benchmark demo --output runs/demo
    prompttune benchmark demo --methods sa2vp,vpt-deep,linear --tasks location --seeds 0 --jobs 2 --output runs/demo
    prompttune benchmark demo --dry-run
    """
    _run(ctx, "demo", methods, **options)


@benchmark.command("demo-ablation")
@click.option("--variants", metavar="A,B,…", callback=words, help="Variants to compare.  [default: all]")
@common_options
@click.pass_context
def demo_ablation(ctx: click.Context, /, variants: tuple[str, ...] | None, **options: Any) -> None:
    """Compare SA²VP with and without each of its parts on the built-in tasks, as in Table 5 of its paper.

    \b
    prompttune benchmark demo-ablation --output runs/demo-ablation
    prompttune benchmark demo-ablation --variants "window 1,window 5" --seeds 0 --jobs 2 --output runs/windows
    """
    _run(ctx, "demo-ablation", variants, **options)


@benchmark.command("vtab-1k")
@_methods
@data_options
@common_options
@click.pass_context
def vtab_1k(ctx: click.Context, /, methods: tuple[str, ...] | None, **options: Any) -> None:
    """Compare methods on VTAB-1k: 19 tasks of 1,000 images, means of three groups.

    Settings are chosen with train800 and val200, then train800val200 trains and test is scored, five seeds. The data
    are the usual lists: DATA_ROOT/NAME/train800.txt, val200.txt, train800val200.txt, test.txt of "path label" lines.

    \b
    prompttune benchmark vtab-1k --methods sa2vp,vpt-deep --data-root data/vtab-1k --output runs/vtab --dry-run
    prompttune benchmark vtab-1k --methods sa2vp --data-root data/vtab-1k --output runs/vtab --skip-missing
    prompttune benchmark vtab-1k --data-root hf://datasets/OWNER/NAME --output runs/vtab
    """
    _run(ctx, "vtab-1k", methods, **options)


@benchmark.command()
@_methods
@data_options
@common_options
@click.pass_context
def fgvc(ctx: click.Context, /, methods: tuple[str, ...] | None, **options: Any) -> None:
    """Compare methods on five fine-grained data sets, with VPT's splits.

    CUB-200-2011, NABirds, Oxford Flowers, Stanford Dogs and Stanford Cars as DATA_ROOT/CUB_200_2011, nabirds,
    OxfordFlower, Stanford-dogs and Stanford-cars, each with train.json, val.json and test.json of image path to class
    id.

    \b
    prompttune benchmark fgvc --methods sa2vp --data-root data/fgvc --output runs/fgvc
    """
    _run(ctx, "fgvc", methods, **options)


@benchmark.command()
@_methods
@data_options
@click.option("--download", is_flag=True, help="Download missing torchvision data sets into the folder.")
@common_options
@click.pass_context
def hta(ctx: click.Context, /, methods: tuple[str, ...] | None, **options: Any) -> None:
    """Compare methods on the ten data sets of head-tuning adaptation (DAM-VP).

    CUB-200-2011, NABirds, Oxford Flowers and Stanford Dogs as for `fgvc`; CIFAR-10, CIFAR-100, DTD, Food-101, GTSRB
    and SVHN in torchvision's folders below DATA_ROOT, where --download puts them.

    \b
    prompttune benchmark hta --methods sa2vp --data-root data --download --output runs/hta
    """
    _run(ctx, "hta", methods, **options)


def _run(
    ctx: click.Context,
    protocol: str,
    labels: tuple[str, ...] | None,
    *,
    tasks: tuple[str, ...] | None,
    seeds: tuple[int, ...] | None,
    output: Path | None,
    jobs: int | None,
    changes: Mapping[str, Any],
    recipe_file: Path | None,
    dry_run: bool,
    table_only: bool,
    latency: bool,
    as_json: bool,
    quiet: bool,
    skip_missing: bool = False,
    download: bool = False,
    **place: Any,
) -> None:
    from prompttune.benchmark.missing import available_tasks

    # a shell does not expand the ~ in --output=~/folder
    recipe = load_recipe(protocol, recipe_file.expanduser() if recipe_file is not None else None)
    overrides = {**{name: value for name, value in place.items() if value is not None}, **changes}
    wanted = chosen("task", tasks, list(recipe.tasks))
    job = Job(
        recipe=recipe,
        labels=chosen("variant" if recipe.variants else "method", labels, recipe.labels),
        tasks=available_tasks(
            recipe,
            wanted,
            overrides.get("data_root"),
            skip=skip_missing,
            fetch=download,
            dry=dry_run or table_only,
            tell=lambda line: click.echo(f"skipped, its data are missing: {line}", err=True),
        ),
        seeds=seeds or recipe.seeds,
        overrides=overrides,
        output=(output or Path("runs") / f"benchmark-{recipe.protocol}").expanduser(),
    )
    if dry_run:
        _print_plan(job, as_json)
        return
    if table_only:
        _show(ctx, job, report_finished(job, latency=latency), as_json)
        return
    _carry_out(ctx, job, jobs, latency=latency, as_json=as_json, console=Console(stderr=True, quiet=quiet))


def _carry_out(
    ctx: click.Context, job: Job, jobs: int | None, *, latency: bool, as_json: bool, console: Console
) -> None:
    from prompttune.benchmark.runner import default_jobs

    try:
        with Board(console) as board:
            report = run_benchmark(job, jobs or default_jobs(job.device), board, latency=latency)
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command resumes", err=True)
        ctx.exit(INTERRUPTED)
    _show(ctx, job, report, as_json)


def _show(ctx: click.Context, job: Job, report: Report, as_json: bool) -> None:
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


def _print_plan(job: Job, as_json: bool) -> None:
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
