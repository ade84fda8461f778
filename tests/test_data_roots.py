"""Data sets of benchmarks on the hub, and torchvision's fetched into a folder."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from torchvision import datasets

from prompttune.benchmark.missing import available_tasks
from prompttune.benchmark.recipe import load_recipe
from prompttune.data import load_data
from prompttune.data.roots import HubRoot, data_root
from prompttune.errors import DataError, UsageError
from prompttune.hub import endpoint_answers, hub_answers
from tests.fake_hub import Hub, serving
from tests.protocol_data import write_fgvc, write_vtab

REPO = "someone/benchmarks"
PLACE = f"hf://datasets/{REPO}"


@pytest.fixture(autouse=True)
def nothing_asked_yet() -> None:
    """A port of an earlier test may be another one's."""
    endpoint_answers.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Callable[[], None]]]:
    """A hub that holds two data sets below ``deep/vtab``, and a call that cuts the connection."""
    write_vtab(tmp_path / "published" / "deep" / "vtab", "dtd", "svhn")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with contextlib.ExitStack() as open_hub:
        address, hub = open_hub.enter_context(serving(tmp_path / "published", REPO))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

        def cut() -> None:
            open_hub.close()
            endpoint_answers.cache_clear()

        yield hub, cut


def test_only_what_a_run_reads_is_fetched_and_serves_without_a_connection(
    hub: tuple[Hub, Callable[[], None]],
) -> None:
    served, cut = hub
    root = f"{PLACE}/deep/vtab"
    recipe = load_recipe("vtab-1k")
    with pytest.raises(DataError, match=rf"kitti: {root}/kitti/train800\.txt, {root}/kitti/val200\.txt"):
        available_tasks(recipe, ["dtd", "kitti"], root, skip=False)
    assert available_tasks(recipe, ["dtd", "kitti"], root, skip=True) == ["dtd"]
    assert served.fetched == []
    first = load_data("vtab/dtd/train800/test", root=root)
    assert (len(first.train), len(first.val)) == (8, 6)
    assert {name.split("/")[2] for name in served.fetched} == {"dtd"}
    pixels = first.val.load(1)
    served.fetched.clear()
    load_data("vtab/dtd/train800val200/test", root=root)
    assert served.fetched == [], "what the cache holds is not fetched again"
    cut()
    again = load_data("vtab/dtd/train800/test", root=root)
    assert (again.val.load(1)[0].tobytes(), again.val.load(1)[1]) == (pixels[0].tobytes(), pixels[1])
    with pytest.raises(DataError, match=r"no .*kitti/train800\.txt"):
        load_data("vtab/kitti/train800/test", root=root)


def test_a_repository_that_is_not_there_is_named(hub: tuple[Hub, Callable[[], None]]) -> None:
    _, cut = hub
    with pytest.raises(DataError, match=r"hf://datasets/someone/else: no such data set, or log in"):
        load_data("vtab/dtd/train800/test", root="hf://datasets/someone/else")
    cut()
    with pytest.raises(DataError, match="out of reach, and its cache holds nothing"):
        load_data("vtab/dtd/train800/test", root="hf://datasets/someone/else")


def test_what_the_hubs_client_raises_is_one_line_unless_the_cache_serves(
    hub: tuple[Hub, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_data("vtab/dtd/train800/test", root=f"{PLACE}/deep/vtab")
    with pytest.raises(DataError, match=r"cannot look into hf://datasets/a--b/c: .*a--b") as caught:
        load_data("vtab/dtd/train800/test", root="hf://datasets/a--b/c")
    assert "\n" not in str(caught.value)

    def time_out(*_: object, **__: object) -> None:
        raise ValueError("read\ntime-out")  # no OSError, like those of the client's HTTP library

    monkeypatch.setattr(HfApi, "get_paths_info", time_out)
    load_data("vtab/dtd/train800/test", root=f"{PLACE}/deep/vtab")
    with pytest.raises(DataError, match="cannot look into hf://datasets/someone/else: read time-out"):
        load_data("vtab/dtd/train800/test", root="hf://datasets/someone/else")
    monkeypatch.setattr("prompttune.data.roots.snapshot_download", time_out)
    with pytest.raises(DataError, match=f"cannot fetch data of {PLACE}: read time-out"):
        HubRoot.read(PLACE).fetch(["deep"])


def test_a_hub_that_never_answers_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("prompttune.hub.HUB_TIMEOUT_S", 0.1)
        assert not hub_answers()
        asked, _ = silent.accept()
        asked.close()
        for ask in (lambda: data_root(PLACE).fetch(["a"]), lambda: data_root(PLACE).missing(["a"])):
            with pytest.raises(DataError, match="out of reach, and its cache holds nothing"):
                ask()
        silent.settimeout(0.05)
        with pytest.raises(TimeoutError):
            silent.accept()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLACE, HubRoot(REPO, None, "")),
        (f"{PLACE}/", HubRoot(REPO, None, "")),
        (f"{PLACE}@v1.0", HubRoot(REPO, "v1.0", "")),
        (f"{PLACE}@main/a/b/", HubRoot(REPO, "main", "a/b")),
    ],
)
def test_places_on_the_hub_are_read(text: str, expected: HubRoot) -> None:
    assert data_root(text) == expected
    assert str(expected) == text.rstrip("/")


@pytest.mark.parametrize("text", ["hf://", "hf://datasets/one", "hf://models/a/b", "hf://a/b", "hf://datasets/a b/c"])
def test_other_places_on_the_hub_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="hf://datasets/OWNER/NAME"):
        data_root(text)


def test_other_data_are_not_read_from_there(tmp_path: Path) -> None:
    for spec in ("photos", "photos.csv", "torch/cifar10"):
        with pytest.raises(UsageError, match=r"vtab/NAME, fgvc/NAME, tv/NAME are read from there"):
            load_data(spec, root=PLACE)


def test_missing_data_of_torchvision_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own download is in the place of a fake that writes what it would."""
    made: list[tuple[str, bool]] = []

    class DTD:
        def __init__(self, root: str, split: str, download: bool) -> None:
            made.append((split, download))
            if download:
                for part in ("labels", "images"):
                    (Path(root) / "dtd" / "dtd" / part).mkdir(parents=True, exist_ok=True)
            self._labels = [0, 1]

    monkeypatch.setattr(datasets, "DTD", DTD)
    recipe = load_recipe("hta")
    write_fgvc(tmp_path, "nabirds")
    tasks = [task for task, entry in recipe.tasks.items() if "/dtd/" in entry.data or "nabirds" in entry.data]
    assert len(tasks) == 2
    with pytest.raises(DataError, match="1 of 2 data sets are missing"):
        available_tasks(recipe, tasks, str(tmp_path), skip=False)
    assert not made
    assert available_tasks(recipe, tasks, str(tmp_path), skip=False, fetch=True) == tasks
    assert made == [("train", True), ("test", True)]
    assert available_tasks(recipe, tasks, str(tmp_path), skip=False, fetch=True) == tasks
    assert len(made) == 2, "what is there is not fetched again"


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets, "CIFAR10", refuse)
    recipe = load_recipe("hta")
    task = next(task for task, entry in recipe.tasks.items() if "/cifar10/" in entry.data)
    with pytest.raises(
        DataError, match=r"1 of 1 data sets .*\n .*cannot download tv/cifar10, train, into .*: no route"
    ):
        available_tasks(recipe, [task], str(tmp_path), skip=False, fetch=True)
    write_fgvc(tmp_path, "nabirds")
    told: list[str] = []
    both = available_tasks(recipe, [task, "nabirds"], str(tmp_path), skip=True, fetch=True, tell=told.append)
    assert both == ["nabirds"]
    assert told == [f"{task}: cannot download tv/cifar10, train, into {tmp_path}: no route to host"]
    with pytest.raises(UsageError, match="downloaded into a folder"):
        available_tasks(recipe, [task], PLACE, skip=False, fetch=True)


def test_nothing_is_downloaded_before_what_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def note(spec: str, root: str | None) -> None:
        fetched.append(spec)

    monkeypatch.setattr("prompttune.benchmark.missing.download", note)
    recipe = load_recipe("hta")
    with pytest.raises(DataError, match="1 of 2 data sets are missing") as caught:
        available_tasks(recipe, ["cifar10", "nabirds"], str(tmp_path), skip=False, fetch=True)
    assert ("nabirds" in str(caught.value), "cifar10" in str(caught.value), fetched) == (True, False, [])
    planned = available_tasks(recipe, ["cifar10", "nabirds"], str(tmp_path), skip=True, fetch=True, dry=True)
    assert (planned, fetched) == (["cifar10"], [])
    assert available_tasks(recipe, ["cifar10", "nabirds"], str(tmp_path), skip=True, fetch=True) == ["cifar10"]
    assert fetched == ["tv/cifar10/train80/val20"], "one data set is fetched once, whatever its splits"
