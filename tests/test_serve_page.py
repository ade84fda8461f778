"""The page on the real server: tasks from an engine, an image through the whole of it."""

import io

import numpy as np
import pytest
from PIL import Image

import prompttune as pt
from benchmarks.serve.serving import launched
from tests.engines import exported
from tests.test_page import CHROMIUM, browser, drop, rows

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
__all__ = ["browser"]  # the fixture


def test_a_dropped_image_gets_the_engines_answer(browser):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    expected = pt.Engine(exported("sa2vp")).predict(picture, "task1")[0]
    with launched(exported("sa2vp")) as server:
        context = browser.new_context()
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda problem: complaints.append(str(problem)))
        page.goto(server.http)
        expect(rows(page)).to_have_count(2)
        page.locator("#trial-task").fill("task1")
        drop(page, stream.getvalue())
        expect(page.locator(".scores .label").first).to_have_text(expected.label)
        expect(page.locator("#trial-answer")).to_contain_text(expected.task_version)
        context.close()
    assert complaints == []
