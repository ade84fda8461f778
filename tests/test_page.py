"""The web page in a real browser, behind the real HTTP application and its content security policy."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect, sync_playwright

from prompttune.images.preprocess import Preprocess
from prompttune.serve.limits import Limits
from prompttune.serve.messages import PANEL, InferRequest, InferResponse, NotFoundError
from prompttune.serve.protocol.security import Guard, Tokens
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.service.images import Decoder
from prompttune.serve.service.tensors import read_rows, write_outputs
from prompttune.task_types import ClassificationConfig
from tests.fake_service import FakeService, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")

MEBI = 2**20
PREPROCESS = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Task:
    """A task that calls an image by its strongest colour."""

    labels = ("red", "green", "<b>blue</b>")
    version = "0123456789ab"
    preprocess = PREPROCESS


class PageService(FakeService):
    """Figures that the page shows, and answers to images. Change ``tasks`` and ``latency`` as a test needs."""

    def __init__(self, tasks: list[dict[str, Any]], seconds: int = 200) -> None:
        super().__init__()
        self.tasks = tasks
        self.latency = [_second(int(time.time()) - back) for back in range(seconds, 0, -1)]
        self.workers = [_worker("cuda:0"), _worker("cuda:1", state="starting", restarts=2, host_bytes=None)]
        self.decoder = Decoder(1, Limits())

    def status(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {
            "server": {
                "name": "prompttune",
                "version": "0.4.0",
                "engine": "engine",
                "backbone": "vit_small_patch14_dinov2",
                "method": "sa2vp",
                "precision": "fp16",
                "image_size": 224,
                "uptime_s": 93_784.2,
                "ready": self.is_ready,
            },
            "load": {"queued_rows": 37, "max_queue": 1024, "running_rows": 32, "rows_per_s": 412.73},
            "workers": self.workers,
            "latency": self.latency,
        }

    def task_status(self) -> list[dict[str, Any]]:
        return self.tasks

    async def infer(self, request: InferRequest) -> InferResponse:
        if request.model not in {PANEL, *(task["name"] for task in self.tasks)}:
            raise NotFoundError(f"no task {request.model!r}")
        ready = [task["name"] for task in self.tasks if task["state"] == "READY"]
        rows = read_rows(request, Limits(), PREPROCESS.image_size, ready)
        logits = [(await self.decoder.prepare(PREPROCESS, one)).mean(axis=(1, 2)) for one in rows.payloads]
        outputs = write_outputs(rows, logits, [Task()] * len(logits), ClassificationConfig())
        stages = {"decode_ms": 1.0, "queue_ms": 0.5, "infer_ms": 60_000.0} if request.model == PANEL else {}
        return InferResponse(request.model, Task.version, request.id, outputs, stages)


def _second(moment: int) -> dict[str, Any]:
    wave = 1 + 0.4 * math.sin(moment / 17) + 0.2 * math.sin(moment / 3.1)
    return {
        "time": moment,
        "requests": round(60 * wave),
        "errors": int(moment % 41 == 0),
        "rows": round(180 * wave),
        "p50_ms": 9.4 * wave,
        "p95_ms": 17.1 * wave,
        "p99_ms": 26.0 * wave + (9 if moment % 23 == 0 else 0),
        "batch_rows": 11.6,
    }


def _worker(device: str, **changes: Any) -> dict[str, Any]:
    return {
        "device": device,
        "state": "ready",
        "runtime": "ONNX Runtime 1.30.0, CUDAExecutionProvider, CUDA graphs",
        "restarts": 0,
        "resident": 61,
        "capacity": 64,
        "hits": 48_113,
        "misses": 2_204,
        "evictions": 2_143,
        "host_tasks": 812,
        "host_bytes": 611 * MEBI,
        "host_limit": 1024 * MEBI,
        "row_bytes": 49 * MEBI,
        "resident_bytes": 2_311 * MEBI,
        **changes,
    }


def task(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": "3",
        "task_version": "0123456789ab",
        "state": "READY",
        "reason": "",
        "resident": True,
        "labels": ["red", "green", "blue"],
        "num_classes": 3,
        "requests": 1200,
        "errors": 0,
        "p50_ms": 8.25,
        "p95_ms": 14.5,
        "last_used": time.time() - 4,
        **changes,
    }


BROKEN = task(
    "flowers",
    state="UNAVAILABLE",
    reason="the state is damaged: its digest does not match",
    resident=False,
    version="",
    p50_ms=None,
    p95_ms=None,
    last_used=None,
    requests=0,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, which is what tests in a container run as.
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield started
        started.close()


@pytest.fixture
def service() -> Iterator[PageService]:
    made = PageService([task("colours"), task("pets", resident=False, errors=7), BROKEN])
    yield made
    made.decoder.close()


@pytest.fixture
def settings() -> TransportSettings:
    return TransportSettings()


@pytest.fixture
def address(service: PageService, settings: TransportSettings) -> Iterator[str]:
    """Where a server listens."""
    with serving(settings, service) as running:
        yield f"http://{running.http}"


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complains of; a test that expects a complaint empties it."""
    return []


@pytest.fixture
def page(browser: Browser, address: str, complaints: list[str]) -> Iterator[Page]:
    """The page, loaded. It may load nothing from elsewhere, and complain of nothing."""
    context = browser.new_context()
    shown = context.new_page()
    shown.set_default_timeout(15_000)

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def thrown(problem: Error) -> None:
        complaints.append(str(problem))

    def elsewhere(url: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            complaints.append(f"loads {url}")

    shown.on("console", heard)
    shown.on("pageerror", thrown)
    shown.on("request", lambda request: elsewhere(request.url))
    shown.goto(address)
    yield shown
    context.close()
    assert complaints == []


def coloured(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def drop(page: Page, content: bytes, name: str = "some.png") -> None:
    """Drop a file onto the field, as a hand would."""
    transfer = page.evaluate_handle(
        """([values, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(values)], name, { type: "image/png" }));
            return transfer;
        }""",
        [list(content), name],
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_the_page_is_served_with_a_strict_policy(address: str, browser: Browser) -> None:
    context = browser.new_context()
    try:
        answer = context.new_page().goto(address)
        assert answer is not None
        policy = answer.headers["content-security-policy"]
    finally:
        context.close()
    assert "unsafe" not in policy
    assert "default-src" in policy


def test_no_file_of_the_page_holds_inline_code() -> None:
    folder = TransportSettings().page
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", index)
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), file
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}, file


def test_the_server_the_load_and_the_workers_are_told(page: Page) -> None:
    expect(page.locator("#ready")).to_have_text("ready")
    expect(page.locator("#facts")).to_contain_text("vit_small_patch14_dinov2")
    expect(page.locator("#facts")).to_contain_text("1 d 2 h")
    load = page.locator("#load")
    for words in ("37of 1,024 answers", "32answers on a device", "412.7answers a second", "122of 128 rows", "95.6 %"):
        expect(load).to_contain_text(words)
    workers = page.locator("#workers tr")
    expect(workers).to_have_count(2)
    expect(workers.nth(0)).to_contain_text("611.0 MiB of 1.0 GiB")
    expect(workers.nth(1)).to_contain_text("starting")
    expect(workers.nth(1)).to_contain_text("– of 1.0 GiB")


def test_a_server_that_is_not_ready_says_so(page: Page, service: PageService) -> None:
    expect(page.locator("#ready")).to_have_text("ready")
    service.is_ready = False
    expect(page.locator("#ready")).to_have_text("not ready")


def test_latencies_are_plotted_with_units(page: Page) -> None:
    plot = page.locator("#latency svg.plot")
    expect(plot.locator("path.series")).to_have_count(3)
    expect(plot.locator("text").filter(has_text=re.compile("^ms$"))).to_have_count(1)
    expect(plot.locator("text").filter(has_text="5 min ago")).to_have_count(1)
    expect(plot).to_have_attribute("aria-label", re.compile(r"p50 .* ms.*p95 .* ms.*p99 .* ms"))
    expect(page.locator("#throughput svg.plot text").filter(has_text="per s")).to_have_count(1)
    box = plot.bounding_box()
    assert box is not None
    latest = page.locator("#latency figcaption").inner_text()
    plot.hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
    expect(plot.locator(".cursor")).to_have_count(1)
    assert page.locator("#latency figcaption").inner_text() != latest


def test_a_server_without_traffic_says_so(page: Page, service: PageService) -> None:
    service.latency, service.tasks = [], []
    page.reload()
    expect(page.locator("#latency .empty")).to_contain_text("No request in the last five minutes")
    expect(page.locator("#no-tasks")).to_have_text("This engine has no tasks yet.")
    expect(page.locator("#latency svg.plot")).to_be_hidden()


def rows(page: Page) -> Any:
    return page.locator("#task-table tbody tr:visible")


def test_tasks_are_listed_searched_and_sorted(page: Page) -> None:
    expect(rows(page)).to_have_count(3)
    expect(page.locator("#found")).to_have_text("3 in all")
    expect(rows(page).nth(1)).to_contain_text("the state is damaged: its digest does not match")
    page.locator("#search").fill("pe")
    expect(rows(page)).to_have_count(1)
    expect(page.locator("#found")).to_have_text("1 of 3")
    page.locator("#search").fill("nothing like it")
    expect(page.locator("#no-tasks")).to_have_text("No task matches.")
    page.locator("#search").fill("")
    page.locator("#filter").select_option("unready")
    expect(rows(page)).to_have_count(1)
    page.locator("#filter").select_option("all")
    page.get_by_role("button", name="Errors").click()
    expect(page.get_by_role("columnheader", name="Errors")).to_have_attribute("aria-sort", "descending")
    expect(rows(page).nth(0)).to_contain_text("pets")
    page.get_by_role("button", name="Errors").click()
    expect(rows(page).nth(2)).to_contain_text("pets")


def test_of_two_thousand_tasks_only_a_page_is_drawn(page: Page, service: PageService) -> None:
    service.tasks = [task(f"task-{number:04d}", requests=number) for number in range(2000)]
    page.reload()
    expect(page.locator("#found")).to_have_text("2,000 in all")
    expect(rows(page)).to_have_count(50)
    page.get_by_role("button", name="Next").click()
    expect(rows(page).nth(0)).to_contain_text("task-0050")
    page.locator("#search").fill("task-19")
    expect(page.locator("#found")).to_have_text("100 of 2,000")
    expect(rows(page)).to_have_count(50)


@pytest.mark.parametrize(("colour", "label"), [("#ff0000", "red"), ("#0000ff", "<b>blue</b>")])
def test_a_dropped_image_is_classified(page: Page, colour: str, label: str) -> None:
    page.get_by_role("button", name="colours").click()
    expect(page.locator("#trial-task")).to_have_value("colours")
    drop(page, coloured(colour))
    scores = page.locator(".scores li")
    expect(scores).to_have_count(3)
    expect(scores.nth(0).locator(".label")).to_have_text(label)  # as text, whatever it holds
    assert float(scores.nth(0).locator(".share").inner_text().removesuffix(" %")) > 50
    expect(page.locator("#trial-answer")).to_contain_text("version 0123456789ab")
    expect(page.locator("#trial-image")).to_be_visible()


def test_all_tasks_answer_for_an_image_at_once_and_the_slowest_part_is_named(page: Page) -> None:
    drop(page, coloured("#0000ff"))
    scores = page.locator(".scores li")
    expect(scores).to_have_count(2)  # the task that is not ready is left out
    for number, name in enumerate(("colours", "pets")):
        expect(scores.nth(number).locator(".task")).to_have_text(name)
        expect(scores.nth(number).locator(".label")).to_contain_text("<b>blue</b>")
        expect(scores.nth(number).locator(".meter")).to_have_count(1)
    expect(page.locator("#trial-answer")).to_contain_text("slowest part: the engine, 60,000 ms")
    page.locator("#trial-task").fill("pets")
    page.locator("#trial-task").press("Tab")
    expect(scores).to_have_count(3)
    page.locator("#trial-task").fill("")
    page.locator("#trial-task").press("Tab")
    expect(scores).to_have_count(2)


def test_an_image_can_be_chosen_with_the_keyboard(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "green.png"
    file.write_bytes(coloured("#00ff00"))
    expect(rows(page)).to_have_count(3)
    # From the start: the browser is told to hand choosers over without an answer to wait for, and may be slow to obey.
    with page.expect_file_chooser() as chooser:
        rows(page).nth(2).get_by_role("button").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#trial-task")).to_have_value("pets")
        expect(page.locator("#trial-file")).to_be_focused()
        page.keyboard.press("Enter")
    chooser.value.set_files(file)
    expect(page.locator(".scores .label").first).to_have_text("green")
    expect(page.locator("#trial-answer")).to_contain_text("pets, version")


def test_the_servers_refusal_is_shown_in_its_words(page: Page, complaints: list[str]) -> None:
    drop(page, np.random.default_rng(0).bytes(100))
    problem = page.locator("#trial-answer .problem")
    expect(problem).to_have_text(
        "image of row 0 cannot be read: not an image, or of another format than JPEG, PNG, WEBP"
    )
    page.locator("#trial-task").fill("../nobody")
    page.locator("#trial-task").press("Tab")
    expect(problem).not_to_contain_text("row 0")
    expect(problem).not_to_be_empty()
    assert all(re.search("status of 40[04]", one) for one in complaints)  # the browser's own lines
    complaints.clear()


def test_a_failing_status_is_told_and_forgotten(page: Page, service: PageService, complaints: list[str]) -> None:
    expect(page.locator("#ready")).to_have_text("ready")
    service.error = NotFoundError("the engine has left")
    expect(page.locator("#problem")).to_have_text("The server says: the engine has left. Trying again.")
    service.error = None
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#ready")).to_have_text("ready")
    complaints.clear()


class TestToken:
    @pytest.fixture
    def settings(self) -> TransportSettings:
        return TransportSettings(guard=Guard(tokens=Tokens(["right"])))

    def test_it_is_asked_for_once_and_kept_for_the_tab(self, page: Page, complaints: list[str]) -> None:
        dialog = page.locator("#token-dialog")
        expect(dialog).to_be_visible()
        for _ in range(3):
            page.keyboard.press("Escape")
        expect(dialog).to_be_visible()
        page.locator("#token").fill("wrong")
        page.locator("#token").press("Enter")
        expect(page.locator("#token-reason")).to_contain_text("The token was refused")
        page.locator("#token").fill("right")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#ready")).to_have_text("ready")
        expect(rows(page)).to_have_count(3)
        expect(dialog).to_be_hidden()
        drop(page, coloured("#ff0000"))
        expect(page.locator(".scores .label").first).to_contain_text("red")
        assert all("status of 401" in one for one in complaints)
        complaints.clear()
        page.reload()
        expect(page.locator("#ready")).to_have_text("ready")
        expect(dialog).to_be_hidden()
        assert page.evaluate("localStorage.length") == 0
        assert "right" not in page.url
