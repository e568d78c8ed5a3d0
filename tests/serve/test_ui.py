"""What the page does, and that it asks no other machine; `test_ui_browser.py` drives it in a browser."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from serving import Running

from pagoda.serve.client import Client

gr = pytest.importorskip("gradio")
from pagoda.serve.ui import LANGUAGES, WORDS, Page, launch  # noqa: E402

COLD = (0.0, 0.9, 40, 1.0, 40)


@pytest.fixture(scope="module")
def page(server: Running) -> Page:
    return Page(Client(server.url))


def test_a_question_is_answered_and_told_how_fast(page: Page) -> None:
    box, history = page.ask(" Who are you? ", [])
    assert (box, history) == ("", [{"role": "user", "content": "Who are you?"}])
    store = {"language": "en", "current": "a", "chats": []}
    news = list(page.answer(history, store, "r", "", *COLD))
    said, line = news[-1]
    assert "Pagoda" in said[-1]["content"] and said[-1]["role"] == "assistant"
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s .* \d+% of the prompt", line)
    assert "词元" in list(page.answer(history, {**store, "language": "zh"}, "r", "", *COLD))[-1][1]
    assert page.again(said) == history
    store, listed = page.saved(store, said, "be brief")
    assert listed["choices"] == [("Who are you?", "a")]
    assert page.show(store, "a")[1:3] == (said, "be brief")
    store, listed, empty, _ = page.forget(store)
    assert listed["choices"] == [] and empty == [] and store["current"] != "a"


def test_stop_ends_a_reply_and_keeps_what_came(page: Page) -> None:
    history = [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}]
    store = {"language": "en", "current": "a", "chats": []}
    reply = page.answer(history, store, "mine", "", 1.0, 0.9, 40, 1.0, 900)
    next(reply)
    page.stop("other")
    page.stop("mine")
    (last, _), *more = list(reply)
    assert not more and 0 < len(last[-1]["content"]) < 900


def test_every_word_is_there_in_every_language(page: Page) -> None:
    assert set(WORDS) == set(LANGUAGES) and WORDS["en"].keys() == WORDS["zh"].keys()
    names = {b.elem_id for b in page.build().blocks.values() if getattr(b, "elem_id", None)}
    assert {"new", "chats", "delete", "language", "dark", "chat", "box", "send", "stop", "retry", "reset"} <= names


def test_the_page_asks_no_other_machine(server: Running) -> None:
    _, url, shared = launch(Client(server.url), "127.0.0.1", 0, block=False)
    try:
        assert shared is None
        html = httpx.get(url).text
        loaded = re.findall(r"""(?:src|href)=["'](https?:)?//([^"'/]+)""", html)
        assert not [host for _, host in loaded if not host.startswith("127.0.0.1")]
        assert "googleapis" not in html and "cdnjs" not in html
    finally:
        gr.close_all()


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["url", "model"])
def test_the_literal_command_shows_the_page(server: Running, own: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    what = ["mini", "--session_len", "512"] if own else [server.url, "--restful_api", "True"]
    words = ["serve", "gradio", *what, "--server_name", "127.0.0.1", "--server_port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "pagoda.cli.main", *words], stdout=subprocess.PIPE, text=True)
    pause, made = threading.Event(), None
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            made = httpx.get(f"http://127.0.0.1:{port}/")
            break
        assert process.poll() is None
        pause.wait(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (0, 130)
    assert made is not None and made.status_code == 200 and "gradio" in made.text
