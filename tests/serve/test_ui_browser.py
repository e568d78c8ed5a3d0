"""The page driven in a headless browser, at desktop and phone widths. Screenshots go to PAGODA_SCREENSHOTS, if set."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running

from pagoda.serve.client import Client

pytestmark = pytest.mark.slow
gr = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def address(server: Running) -> Iterator[str]:
    from pagoda.serve.ui import launch

    _, url, _ = launch(Client(server.url), "127.0.0.1", 0, block=False)
    yield url
    gr.close_all()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        if path is None:
            pytest.skip("no Chromium here")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def picture(page: Any, name: str) -> None:
    folder = os.environ.get("PAGODA_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844)])
def test_a_visit(browser: Any, address: str, name: str, width: int, height: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, locale="en-US")
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    expect = playwright.expect
    page.goto(address)
    box, bot = page.locator("#box textarea"), page.locator("#chat .bot")
    expect(page.locator("#send")).to_have_text("Send", timeout=20_000)
    picture(page, f"{name}-1-empty")

    box.fill("Who are you?")
    box.press("Enter")
    expect(bot.last).to_contain_text("Pagoda", timeout=20_000)
    expect(page.locator("#speed")).to_contain_text("tokens/s")
    expect(box).to_have_value("")
    expect(page.locator("#chats")).to_contain_text("Who are you?")
    picture(page, f"{name}-2-answer")

    page.locator("#retry").click()
    expect(bot.last).to_contain_text("Pagoda", timeout=20_000)
    expect(bot).to_have_count(1)

    page.reload()
    expect(bot.last).to_contain_text("Pagoda", timeout=20_000)

    if name == "phone":
        page.locator(".sidebar .toggle-button").click()
    page.locator("#language").get_by_text("中文").click()
    expect(page.locator("#send")).to_have_text("发送")
    expect(page.locator("#chats")).to_contain_text("Who are you?")
    page.locator("#dark").click()
    expect(page.locator("body")).to_have_class("dark")
    page.wait_for_timeout(500)  # of the colours' transition
    picture(page, f"{name}-3-dark")
    page.locator("#dark").click()
    page.locator("#new").click()
    expect(bot).to_have_count(0)
    page.locator("#chats").get_by_text("Who are you?").click()
    expect(bot.last).to_contain_text("Pagoda")
    page.locator("#delete").click()
    expect(page.locator("#chats")).not_to_contain_text("Who are you?")

    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    context.close()


def test_stop_keeps_what_came(browser: Any, address: str, server: Running) -> None:
    page = browser.new_context(locale="en-US").new_page()
    page.goto(address)
    expect = playwright.expect
    expect(page.locator("#send")).to_have_text("Send", timeout=20_000)
    server.pipe.engine.call("ping")
    page.locator("#box textarea").fill("Tell me a story.")
    page.locator("#send").click()
    page.locator("#chat .bot").first.wait_for(timeout=20_000)
    page.keyboard.press("Escape")
    expect(page.locator("#chat .bot")).to_have_count(1)
    page.locator("#reset").click()
    expect(page.locator("#chat .bot")).to_have_count(0)
