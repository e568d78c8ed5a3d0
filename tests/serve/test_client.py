"""The Python client and the terminal's, against a running server."""

import io
import socket
from types import SimpleNamespace

import httpx
import pytest
from serving import Running

from pagoda.cli.main import main
from pagoda.errors import EngineDeadError, OverloadedError, RequestError, UsageError
from pagoda.serve import client as client_module
from pagoda.serve.client import Client
from pagoda.serve.error_map import error_response


def test_turns_and_chats(server: Running) -> None:
    client = Client(server.url + "/v1")
    assert client.model()["id"] == "mini"
    cold = {"temperature": 0, "request_output_len": 40}
    first = list(client.turn(70, "My name is Ada.", **cold))
    second = list(client.turn(70, "What is my name?", **cold))
    assert "Ada" in "".join(p.text for p in second) and second[-1].finish_reason == "stop"
    assert second[0].history_tokens == first[-1].prompt_tokens + first[-1].tokens
    client.end(70)
    client.end(70)
    pieces = list(client.chat([{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=30))
    assert "Pagoda" in "".join(p.text for p in pieces)
    assert pieces[-1].tokens > 3 and pieces[-1].prompt_tokens > 3
    with pytest.raises(RequestError, match="temperature"):
        list(client.chat([], temperature=-1))


def test_a_reply_that_is_left_keeps_what_came(server: Running) -> None:
    client = Client(server.url)
    turn = client.turn(71, "Tell me a story.", temperature=0, ignore_eos=True, request_output_len=800)
    seen = [next(turn) for _ in range(3)]
    turn.close()
    for _ in range(100):
        sessions = {s["id"]: s for s in server.http.get("/v1/sessions").json()["data"]}
        if not sessions["71"]["busy"]:
            break
    assert seen[0].prompt_tokens < sessions["71"]["tokens"] < 800
    client.end(71)


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said: list[str] = []
    client = Client(f"http://127.0.0.1:{port}", patience=0.3, on_wait=said.append)
    with pytest.raises(EngineDeadError, match="pagoda serve"):
        client.model()
    assert len(said) == 1 and "cannot be reached" in said[0]
    with pytest.raises(UsageError, match="http://HOST:PORT"):
        Client("localhost:23333")


def test_a_server_that_is_not_ready_is_waited_for(server: Running) -> None:
    pipe, said = server.pipe, []
    server.backend._pipe, server.backend.state = None, "loading"

    def ready(why: str) -> None:
        said.append(why)
        server.backend.attach(pipe)

    assert Client(server.url, patience=20, on_wait=ready).model()["id"] == "mini"
    [why] = said
    assert "The engine is loading" in why and "20 s" in why


@pytest.mark.parametrize(
    ("error", "after", "calls", "pauses"),
    [
        (OverloadedError("Full.", 3), {}, 1, []),
        (EngineDeadError("Loading."), {"retry-after": "4"}, 4, [4.0, 4.0, 2.0]),
        (EngineDeadError("Loading."), {"retry-after": "soon"}, 51, [0.2] * 50),
    ],
)
def test_a_full_server_is_left_in_peace(error, after, calls, pauses, monkeypatch: pytest.MonkeyPatch) -> None:
    """`after`: what the header says. The clock goes on in the pauses only, and patience lasts 10 s."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(client_module, "time", clock)
    asked: list[httpx.Request] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        made = error_response(error)
        return httpx.Response(made.status_code, headers={**made.headers, **after}, content=made.body)

    client = Client("http://test")
    client._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(refuse))
    with pytest.raises(type(error), match=str(error)):
        client.model()
    assert len(asked) in (calls, calls + 1) and slept[: len(pauses)] == pytest.approx(pauses)


def test_the_terminal_client(server: Running, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = "My name is Ada.\n\nWhat is my name?\n\nend\nWho are you?\n\nexit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["serve", "api_client", server.url]) == 0
    out = capsys.readouterr().out
    assert out.count("session ") == 2 and "Ada" in out.split("What")[0] and "Pagoda" in out
