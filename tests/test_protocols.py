"""Protocols without training: recipes, plans, the table's arithmetic, layouts of data, time left."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from prompttune.backbones import load_backbone
from prompttune.benchmark import plots
from prompttune.benchmark.latency import MethodLatency
from prompttune.benchmark.missing import available_tasks
from prompttune.benchmark.plan import RECORD_FILE, RunSpec, make_plan
from prompttune.benchmark.recipe import BUILT_IN, Recipe, chosen, load_recipe, read_recipe
from prompttune.benchmark.runner import Pace, RunResult
from prompttune.benchmark.search import Decision, decide, make_search, pending
from prompttune.benchmark.summary import Cell, summarise
from prompttune.benchmark.tables import cells, header, markdown
from prompttune.data import Augment, load_data
from prompttune.errors import CheckpointError, DataError, UsageError
from prompttune.methods import METHODS
from prompttune.training import TrainConfig
from tests.protocol_data import TINY, write_fgvc, write_recipe, write_vtab

ROOT = {"data_root": "/data"}


def row(label: str, task: str, seed: int, accuracy: float, trained: int = 30, head: int = 10) -> dict[str, Any]:
    return {
        "label": label,
        "task": task,
        "seed": seed,
        "accuracy": accuracy,
        "trainable_parameters": trained,
        "parameters_beside_head": trained - head,
        "share_of_backbone": (trained - head) / 1000,
    }


def spec(**changes: Any) -> RunSpec:
    settings = {**TINY, "method": "linear", "data": "demo/digits", "lr": 1e-3, **changes}
    return RunSpec("tiny", "one", "a", "linear", 0, settings)


# the built-in recipes


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_run_of_a_built_in_recipe_has_valid_settings(name: str) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, recipe.labels, list(recipe.tasks), [0], ROOT)
    search = make_search(recipe, recipe.labels, list(recipe.tasks)[:1], ROOT)
    assert len(plan) == len(recipe.labels) * len(recipe.tasks)
    assert len({one.name for one in plan}) == len(plan)
    assert len({one.name for one in search}) == len(search)
    tuning = [one for one in plan if name != "demo" or not METHODS[one.settings["method"]].modules[0].only_reads]
    for task, entry in recipe.tasks.items():  # the same effort for all that tune the backbone
        epochs = {one.config(Path()).epochs for one in tuning if one.task == task}
        assert epochs == {entry.settings.get("epochs", recipe.defaults["epochs"])}, task


def test_the_ablation_compares_with_the_demos_own_run() -> None:
    demo, ablation = load_recipe("demo"), load_recipe("demo-ablation")
    own = make_plan(demo, ["sa2vp"], list(demo.tasks), demo.seeds)
    full = make_plan(ablation, ["full (window 3)"], list(ablation.tasks), ablation.seeds)
    assert [(one.task, one.seed, one.digest) for one in full] == [(one.task, one.seed, one.digest) for one in own]


@pytest.mark.parametrize("name", BUILT_IN)
def test_reported_images_choose_nothing(name: str) -> None:
    recipe = load_recipe(name)
    for one in make_plan(recipe, recipe.labels[:1], list(recipe.tasks), [0], ROOT):
        config = one.config(Path())
        assert (config.eval_every > config.epochs, config.patience) == (True, None)  # no epoch is picked by its score
    for task in recipe.tasks.values():
        assert task.search is None or not task.search.endswith("/test")


def test_no_setting_lets_reported_images_choose_an_epoch(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path / "r.yaml"))
    settings = recipe.settings("linear", "a", {"eval_every": 1, "patience": 1})
    assert (settings["eval_every"], settings["patience"]) == (1_000_000, None)


@pytest.mark.parametrize(
    ("protocol", "label", "task", "seed", "digest"),
    [
        ("demo", "vpt-deep", "digits", 0, "b6f2ba851703bdde"),
        ("demo-ablation", "no adapter", "digits", 0, "4983e99dcd2b2cdf"),
        ("vtab-1k", "linear", "dtd", 42, "82c8afbc09d4c203"),
        ("fgvc", "linear", "nabirds", 42, "341156eff914f0ac"),
        ("hta", "linear", "svhn", 42, "051a19e162be52ef"),
    ],
)
def test_digests_stay_those_of_the_results_that_carry_them(
    protocol: str, label: str, task: str, seed: int, digest: str
) -> None:
    (one,) = make_plan(load_recipe(protocol), [label], [task], [seed], ROOT)
    assert one.digest == digest


def test_vtab_has_the_published_tasks_and_settings() -> None:
    recipe = load_recipe("vtab-1k")
    sizes = {group: sum(task.group == group for task in recipe.tasks.values()) for group in ("natural", "specialised")}
    assert (sizes, len(recipe.tasks)) == ({"natural": 7, "specialised": 4}, 19)
    for task, rank, gamma, lr in (("dtd", 8, 0.1, 1e-3), ("eurosat", 16, 1.5, 1e-3), ("clevr_count", 32, 1.5, 5e-4)):
        (one,) = make_plan(recipe, ["sa2vp"], [task], [0], ROOT)
        config = one.config(Path())
        assert (config.method_settings["rank"], config.method_settings["gamma"], config.lr) == (rank, gamma, lr)
        assert (config.epochs, config.warmup_epochs, config.weight_decay) == (100, 10, 1e-4)
        assert not config.augment_config()._is_random
    assert not make_search(recipe, ["sa2vp"], ["dtd"], ROOT)  # its settings are published
    assert len(make_search(recipe, ["vpt-deep"], ["dtd"], ROOT)) == 40  # VPT's ten rates and four decays


def test_hta_has_ten_data_sets_and_ablation_has_the_papers_variants() -> None:
    assert len(load_recipe("hta").tasks) == 10
    recipe = load_recipe("demo-ablation")
    settings = [make_plan(recipe, [label], ["digits"], [0])[0].config(Path()) for label in recipe.labels]
    assert {one.method for one in settings} == {"sa2vp"}
    assert len({str(one.method_settings) for one in settings}) == 7


# recipes


def test_settings_go_from_the_defaults_to_the_overrides(tmp_path: Path) -> None:
    tasks = {"a": {"data": "demo/digits", "settings": {"lr": 3e-3}, "methods": {"lora": {"rank": 2}}}}
    recipe = read_recipe(write_recipe(tmp_path / "r.yaml", tasks=tasks, methods={"lora": {"rank": 8, "lr": 4e-3}}))
    assert recipe.settings("linear", "a", {})["lr"] == 3e-3
    assert recipe.settings("lora", "a", {})["lr"] == 4e-3
    assert recipe.settings("lora", "a", {})["rank"] == 2
    assert recipe.settings("lora", "a", {"rank": 5})["rank"] == 5
    assert "rank" not in recipe.settings("linear", "a", {"rank": 5})  # another method's setting does not reach it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "needs 'tasks'"),
        ({"seeds": [-1]}, "seeds must be at least 0"),
        ({"defaults": {"learning_rate": 1}}, "defaults: unknown setting 'learning_rate'"),
        ({"methods": {"linear": {"rank": 4}}}, "methods.linear: rank is a setting of"),
        ({"tasks": {"a": {"group": "one"}}}, "needs 'data'"),
        ({"grids": {"linear": {"lr": 1e-3}}}, "must be a list"),
        ({"variants": {"x": {"method": "nope"}}}, "unknown method"),
        ({"something": 1}, "unknown part"),
        ({"seeds": [2**63]}, f"below {2**63}"),
        ({"seeds": [True]}, "seeds must be"),
        ({"search_seed": "abc"}, "search_seed must be a whole number"),
        ({"search_seed": 1.7}, "search_seed must be a whole number"),
        ({"tasks": {"a": {"data": "demo/digits", "search": 5}}}, "tasks.a: search must be text, not 5"),
        ({"tasks": {"a": {"data": "demo/digits", "search": "demo/digits"}}}, "on the images that are reported"),
        ({"tasks": {"a": {"data": "vtab/x/train800val200/test", "search": "vtab/x/train800/test"}}}, "are reported"),
        ({"defaults": {"eval-every": 1}}, "defaults: eval_every is not open"),
        ({"methods": {"linear": {"patience": 2}}}, "methods.linear: patience is not open"),
        ({"grids": {"linear": {"eval_every": [1, 2]}}}, "grids.linear: eval_every is not open"),
        ({"defaults": {"task_type": "segmentation"}}, "protocols compare classifications"),
        ({"defaults": {"method": "linear"}}, "the entries of methods and variants name it"),
        ({"methods": {"linear": {"data": "x"}}}, "methods.linear: data is not a setting of a recipe"),
        ({"tasks": {"a": {"data": "demo/digits", "settings": {"seed": 1}}}}, "give seeds and search_seed"),
        ({"defaults": {"output": "x"}}, "give --output"),
        ({"defaults": {"data_root": "x"}}, "give --data-root"),
    ],
)
def test_wrong_recipe_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_recipe(write_recipe(tmp_path / "r.yaml", **changes))
    assert "\n" not in str(caught.value)


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean linear"):
        chosen("method", ["linaer"], list(METHODS))
    with pytest.raises(UsageError, match="named twice"):
        chosen("method", ["linear", "linear"], list(METHODS))
    assert chosen("method", None, ["a", "b"]) == ["a", "b"]


# plans


def test_digest_follows_what_changes_a_result_alone() -> None:
    same = (spec(device="cpu"), spec(momentum=0.9), spec(data_root="/elsewhere"))
    assert {one.digest for one in same} == {spec().digest}  # free, or the default spelled out
    assert spec(lr=2e-3).digest != spec().digest
    assert spec(method="lora").digest != spec(method="lora", rank=2).digest
    assert dataclasses.replace(spec(), seed=1).digest != spec().digest


def test_wrong_setting_names_the_run() -> None:
    with pytest.raises(UsageError, match="linear on a: lr must be above 0"):
        spec(lr=-1).config(Path())


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"settings_digest": "DIGEST"}', CheckpointError, "lacks accuracy and classes"),
        ('{"settings_digest": "DIGEST", "error": "nan"}', CheckpointError, "lacks accuracy"),  # no candidate
        ("{", CheckpointError, "cannot read the record of a run"),
        ('{"settings_digest": "0"}', UsageError, "was trained with other settings"),
    ],
)
def test_a_record_that_is_of_no_use_says_what_to_do(
    tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    folder = spec().folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / RECORD_FILE).write_text(content.replace("DIGEST", spec().digest))
    with pytest.raises(error, match=message) as caught:
        spec().record(tmp_path)
    assert f"remove the folder {folder} to train it again" in str(caught.value)


# choosing


def outcome(lr: float, accuracy: float | None, *, diverged: bool = True, task: str = "a") -> RunResult:
    tried = dataclasses.replace(spec(lr=lr), task=task, candidate={"lr": lr})
    if accuracy is None:
        return RunResult(tried, error="diverged: the loss is nan", diverged=diverged)
    return RunResult(tried, {"accuracy": accuracy})


def test_best_accuracy_is_chosen_and_ties_take_the_smallest_rate() -> None:
    for found in (
        [outcome(0.1, 0.5), outcome(0.2, 0.7), outcome(0.4, None)],
        [outcome(0.3, 0.7), outcome(0.2, 0.7), outcome(0.1, 0.6)],
    ):
        assert decide(found) == Decision({("a", "linear"): {"lr": 0.2}}, [], {})


def test_a_choice_waits_for_what_failed_and_leaves_the_others() -> None:
    decision = decide(
        [
            outcome(0.1, 0.5),
            outcome(0.2, 0.9, task="waits"),
            outcome(0.1, None, task="waits", diverged=False),
            outcome(0.1, None, task="barren"),
            outcome(0.2, None, task="barren"),
        ]
    )
    assert (decision.choices, decision.waiting) == ({("a", "linear"): {"lr": 0.1}}, [("waits", "linear")])
    assert decision.barren == {
        ("barren", "linear"): "no setting of 2 can be chosen, the first diverged: the loss is nan"
    }
    plan = [dataclasses.replace(spec(lr=5.0), task=task) for task in ("a", "waits", "barren")]
    search = [outcome(0.1, 0.5, task=one.task).spec for one in plan]
    shown = {one.task: one.settings["lr"] for one in pending(plan, search, decision)}
    assert shown == {"a": 5.0, "waits": "chosen by the search", "barren": "chosen by the search"}


def test_what_is_said_already_is_not_searched(tmp_path: Path) -> None:
    grids = {"linear": {"lr": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]}, "default": {"lr": [1.0]}}
    recipe = read_recipe(write_recipe(tmp_path / "r.yaml", grids=grids))
    points = [one.candidate for one in make_search(recipe, ["linear"], ["a"], {})]
    assert len(points) == 4
    assert {"lr": 1e-2, "weight_decay": 0.1} in points
    assert len(make_search(recipe, ["linear"], ["a"], {"lr": 5.0})) == 2
    assert len(make_search(recipe, ["lora"], ["a", "b"], {})) == 2  # a point of the default grid on each task
    assert make_search(recipe, ["linear"], ["a"], {})[0].settings["data"] == "vtab/a/train800/val200"


# the table


def test_table_arithmetic_by_hand() -> None:
    tasks = {"a": "one", "b": "one", "c": "two"}
    rows = [
        *(row("m", "a", seed, value) for seed, value in enumerate((0.50, 0.60, 0.70))),
        *(row("m", "b", seed, value) for seed, value in enumerate((0.80, 0.80, 0.80))),
        *(row("m", "c", seed, value, trained=60, head=40) for seed, value in enumerate((0.10, 0.20, 0.30))),
        row("half", "a", 0, 0.4),
    ]
    summary = summarise("t", tasks, ["m", "half", "none"], rows, missing=2)
    line, half = summary.lines
    assert line.tasks["a"] == Cell(pytest.approx(0.6), pytest.approx(0.1), 3)
    assert line.tasks["b"] == Cell(pytest.approx(0.8), pytest.approx(0.0), 3)
    assert line.groups == {"one": pytest.approx(0.7), "two": pytest.approx(0.2)}
    assert line.mean == pytest.approx((0.6 + 0.8 + 0.2) / 3)  # every task counts once
    assert line.mean_of_groups == pytest.approx(0.45)  # every group counts once
    assert line.deviation == pytest.approx(0.2 / 3)  # seeds' means: 1.4/3, 1.6/3, 1.8/3
    assert (line.trainable_parameters, line.parameters_beside_head, line.share_of_backbone) == (
        40,
        20,
        pytest.approx(0.02),
    )
    assert (half.mean, half.mean_of_groups, half.groups["one"]) == (None, None, None)
    assert half.tasks["a"] == Cell(0.4, None, 1)
    assert header(summary)[1:] == ["a", "b", "c", "mean one", "mean two", "mean", "mean of groups", "seeds", "trained",
                                   "beside head", "% of backbone"]  # fmt: skip
    assert cells(summary, line) == ["m", "60.0 ± 10.0", "80.0 ± 0.0", "20.0 ± 10.0", "70.0", "20.0", "53.3 ± 6.7",
                                    "45.0", "3", "40", "20", "2.000"]  # fmt: skip
    assert cells(summary, half)[1:5] == ["40.0", "–", "–", "–"]
    assert cells(summary, half)[8] == "1"
    uneven = summarise("t", tasks, ["m"], rows[:4]).lines[0]
    assert cells(summary, uneven)[8] == "1-3", "a deviation over fewer seeds than the others' is told"
    text = markdown(summary)
    assert "| m | 60.0 ± 10.0 | 80.0 ± 0.0 |" in text
    assert "2 runs have no figure" in text


def test_labels_of_close_points_do_not_cover_each_other_or_a_point() -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [("adapter", 100.0, 0.5, None), ("adaptformer", 101.0, 0.5, None), ("lora", 1.0, 0.9, 0.01)]
    plots._scatter(axes, points)
    figure.draw_without_rendering()
    plots._name(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["adapter", "adaptformer", "lora"]
    dots = axes.transData.transform([(x, (mean or 0) * 100) for _, x, mean, _ in points])
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert not any(box.contains(x, y) for x, y in dots)
    crowd = [(f"method {number}", 5.0, 0.5, None) for number in range(6)]
    plots._name(axes, crowd)
    assert len(axes.texts) == 3 + 6, "too many for one place, but all are written"


def test_plot_has_a_second_panel_only_for_latencies(tmp_path: Path) -> None:
    summary = summarise("t", {"a": "one"}, ["m"], [row("m", "a", 0, 0.5)])
    sides = []
    for latencies in ([], [MethodLatency("m", 1.0, 1.0, 8, 1)]):
        assert plots.plot_summary(tmp_path / "plot.png", summary, latencies)
        with Image.open(tmp_path / "plot.png") as image:
            sides.append(image.width / image.height)
    assert (sides[0] < 1.5, sides[1] > 2) == (True, True)


def test_time_left_counts_what_waits_and_what_runs() -> None:
    first, second, third = spec(), spec(), spec()
    pace = Pace(total=4, jobs=2, kept=1, waiting=[third], running={first: (0.0, 0.5), second: (0.0, 0.0)})
    pace.seconds["linear"] = [10.0]
    assert pace.seconds_left(now=5.0) == pytest.approx((10 + 5 + 10) / 2)
    assert pace.share() == pytest.approx(1.5 / 4)
    assert Pace(total=1, jobs=1, waiting=[first]).seconds_left(now=1.0) is None


# data


def test_vtab_lists_are_read(tmp_path: Path) -> None:
    root = write_vtab(tmp_path, "a")
    (root / "a" / "val200.txt").write_text("images/val200/000.png 0\nimages/val200/001.png 3\n")
    data = load_data("vtab/a/train800/test", root=str(root))
    assert (len(data.train), len(data.val)) == (8, 6)
    assert data.classes == ["0", "1", "2", "3"]  # a list that is not used tells of the classes too
    assert [data.val.load(index)[1] for index in range(4)] == [0, 1, 0, 1]
    assert data.train.describe(0) == str(root / "a" / "images/train800/000.png")


@pytest.mark.parametrize("folder", ["", "images", "Images"])
def test_fgvc_splits_are_read(tmp_path: Path, folder: str) -> None:
    data = load_data("fgvc/birds/train/val", root=str(write_fgvc(tmp_path, "birds", folder)))
    assert (len(data.train), len(data.val), data.classes) == (8, 4, ["5", "11"])  # in the order of the numbers
    assert data.train.load(1)[1] == 1


def test_torchvision_folders_are_read_and_a_fifth_is_held_out(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    for label in (0, 1):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (label * 100, number, 0)).save(folder / f"{number}.ppm")
    final = base / "GTSRB" / "Final_Test" / "Images"
    final.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(final / "t.ppm")
    (base / "GT-final_test.csv").write_text("Filename;ClassId\nt.ppm;1\n")
    search = load_data("tv/gtsrb/train80/val20", root=str(tmp_path))
    assert (len(search.train), len(search.val)) == (16, 4)
    assert sorted(search.val.labels() or []) == [0, 0, 1, 1]
    colours = [{source.load(index)[0].getpixel((0, 0)) for index in range(len(source))} for source in
               (search.train, search.val)]  # fmt: skip
    assert not colours[0] & colours[1]
    again = load_data("tv/gtsrb/train80/test", root=str(tmp_path), seed=5)
    assert (len(again.train), again.val.labels()) == (16, [1])
    assert {again.train.load(index)[0].getpixel((0, 0)) for index in range(16)} == colours[0]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("vtab", "images/x.png\n", "line 1: not 'path label'"),
        ("vtab", "\n", "does not list any images"),
        ("vtab", "a.png cat\n", "line 1: not 'path label'"),
        ("fgvc", "[]", "must be an object"),
        ("fgvc", "{", "cannot read"),
    ],
)
def test_damaged_lists_are_named(tmp_path: Path, kind: str, content: str, message: str) -> None:
    root = write_vtab(tmp_path, "a") if kind == "vtab" else write_fgvc(tmp_path, "a")
    (root / "a" / ("train800.txt" if kind == "vtab" else "train.json")).write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(f"{kind}/a/{'train800' if kind == 'vtab' else 'train'}/test", root=str(root))


def test_specification_and_root_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --data-root"):
        load_data("vtab/a/train800/test")
    with pytest.raises(UsageError, match="NAME/TRAINING SPLIT"):
        load_data("vtab/a", root=str(tmp_path))
    with pytest.raises(UsageError, match="did you mean cifar10"):
        load_data("tv/cifar11/train80/test", root=str(tmp_path))
    with pytest.raises(DataError, match=r"no .*/a/train800\.txt"):
        load_data("vtab/a/train800/test", root=str(tmp_path))


def test_all_missing_data_are_listed_with_their_layout(tmp_path: Path) -> None:
    recipe = Recipe(**{**vars(load_recipe("vtab-1k"))})
    write_vtab(tmp_path, "dtd")
    with pytest.raises(DataError) as caught:
        available_tasks(recipe, ["dtd", "svhn", "kitti"], str(tmp_path), skip=False)
    text = str(caught.value)
    assert "2 of 3 data sets are missing" in text
    assert "path label" in text
    assert "--skip-missing" in text
    for name in ("svhn", "kitti"):
        assert f"  {name}: {tmp_path}/{name}/train800.txt" in text
    assert available_tasks(recipe, ["dtd", "svhn"], str(tmp_path), skip=True) == ["dtd"]
    with pytest.raises(DataError, match="1 of 1"):
        available_tasks(recipe, ["svhn"], str(tmp_path), skip=True)
    with pytest.raises(UsageError, match="give --data-root"):
        available_tasks(recipe, ["svhn"], None, skip=False)


# transforms


def test_normalisation_reaches_the_transform() -> None:
    backbone = load_backbone("test_vit", 32, "random:0")
    settings = {**TINY, "data": "demo/digits", "output": "x"}

    def made(**changes: Any) -> Any:
        return TrainConfig(**settings, **changes).preprocess(backbone)

    assert made().mean == tuple(backbone.mean)
    assert (made(normalisation="inception").mean, made(normalisation="inception").std) == ((0.5,) * 3, (0.5,) * 3)
    assert made(normalisation="imagenet").mean == (0.485, 0.456, 0.406)
    with pytest.raises(UsageError, match="normalisation"):
        made(normalisation="none")


def test_settings_of_an_older_run_count_as_their_defaults() -> None:
    config = TrainConfig(**TINY, data="demo/digits", output="x")
    older = {name: value for name, value in config.to_flat().items() if name != "normalisation"}
    assert config.differences(older) == []
    assert "normalisation is 'imagenet'" in dataclasses.replace(config, normalisation="imagenet").differences(older)[0]


def test_random_crop_moves_over_the_resized_image() -> None:
    backbone = load_backbone("test_vit", 32, "random:0")
    config = TrainConfig(**TINY, data="demo/digits", output="x", crop_mode="center", crop_pct=0.5)
    preprocess = config.preprocess(backbone)
    ramp = Image.linear_gradient("L").convert("RGB")  # 256 x 256, rows of one grey
    transform = Augment(random_crop=True).transform(preprocess)
    torch.manual_seed(0)
    tops = {round(float(transform(ramp)[0, 0, 0]), 3) for _ in range(20)}
    assert transform(ramp).shape == (3, 32, 32)
    assert len(tops) > 5
    whole = Augment(random_crop=True).transform(dataclasses.replace(preprocess, crop_pct=1.0))
    assert torch.allclose(whole(ramp), dataclasses.replace(preprocess, crop_pct=1.0).transform()(ramp), atol=1e-6)
    with pytest.raises(UsageError, match="both crop"):
        Augment(random_crop=True, scale_min=0.5)
    with pytest.raises(UsageError, match="crop_mode"):
        Augment(random_crop=True).transform(dataclasses.replace(preprocess, crop_mode="border"))
