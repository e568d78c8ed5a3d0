"""Who may enter, and how many: keys on every route, tenants apart, limits, CORS."""

import json
import logging
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from serving import Running, serve
from starlette.testclient import TestClient

from pagoda import EngineConfig, ServeConfig
from pagoda.engine.client import EngineClient, spawn_engine
from pagoda.errors import ConfigError
from pagoda.offline import Pipeline
from pagoda.serve import backend as backend_module
from pagoda.serve.app import make_app
from pagoda.serve.backend import Backend
from pagoda.serve.middleware import OPEN_PATHS, read_keys

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PREPARING = {
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/v1/encode": {"input": "a"},
    "/v1/sessions/save": {"name": "a"},
    "/v1/sessions/restore": {"name": "a"},
}
"""Routes that use the threads of preparation beside those that generate."""


@pytest.fixture(scope="module")
def locked(mini: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = ServeConfig(
        api_keys=["sk-one", "sk-two"],
        max_concurrent_per_key=2,
        allow_origins=["https://page.test"],
        session_dir=str(tmp_path_factory.mktemp("sessions")),
    )
    yield from serve(mini, config)


def key(word: str) -> dict[str, str]:
    return {"authorization": f"Bearer {word}"}


def test_every_route_asks_for_a_key(locked: Running) -> None:
    app = make_app(Backend("mini", ServeConfig()), ServeConfig())
    routes = [(path, verb.upper()) for path, verbs in app.openapi()["paths"].items() for verb in verbs]
    assert len(routes) > 18
    for path, method in [*routes, ("/abort_request", "POST"), ("/metrics", "HEAD"), ("/nothing", "GET")]:
        for spelled in (path, path + "/", "/" + path, path.replace("/v1", "/%76%31")):
            made = locked.http.request(method, locked.url + spelled.replace("{", "").replace("}", ""))
            if path in OPEN_PATHS and spelled == path:
                assert made.status_code == 200, (method, path)
            else:
                assert made.status_code in (401, 404) and (made.status_code == 401 or method == "HEAD"), spelled
    assert locked.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, key("sk-three"), {"authorization": "Bearer"}, {"authorization": "Basic sk-one"}, {"x-api-key": "x"}]
)
def test_wrong_keys_stay_out(locked: Running, headers: dict[str, str]) -> None:
    made = locked.http.post(CHAT, json=HELLO, headers=headers)
    assert made.status_code == 401 and made.headers["www-authenticate"] == "Bearer"
    assert made.json()["error"]["type"] == "authentication_error"


def test_right_keys_enter_and_are_kept_apart(locked: Running) -> None:
    assert locked.http.post(CHAT, json=HELLO, headers=key("sk-one")).status_code == 200
    assert locked.http.post(CHAT, json=HELLO, headers={"x-api-key": "sk-two"}).status_code == 200
    turn = {"prompt": "My name is Ada.", "session_id": 5, "interactive_mode": True}
    locked.http.post("/v1/chat/interactive", json=turn, headers=key("sk-one"))
    mine, theirs = (locked.http.get("/v1/sessions", headers=key(k)).json()["data"] for k in ("sk-one", "sk-two"))
    assert [s["id"] for s in mine] == ["5"] and theirs == []
    assert locked.http.delete("/v1/sessions/5", headers=key("sk-two")).status_code == 404
    long = {"messages": [{"role": "user", "content": "The sea is wide and blue. " * 30}], "max_tokens": 1}
    cached = []
    for word in ("sk-one", "sk-one", "sk-two"):
        usage = locked.http.post(CHAT, json=long, headers=key(word)).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0 < cached[1]


def test_a_key_saves_and_restores_its_own_sessions(locked: Running) -> None:
    turn = {"session_id": 9, "interactive_mode": True, "temperature": 0, "request_output_len": 8}
    tokens = {}
    for word, said in (("sk-one", "My name is Ada."), ("sk-two", "Hello, my name is Bob, who are you?")):
        locked.http.post("/v1/chat/interactive", json={**turn, "prompt": said}, headers=key(word))
        saved = locked.http.post("/v1/sessions/save", json={"name": "same"}, headers=key(word)).json()
        listed = locked.http.get("/v1/sessions", headers=key(word)).json()["data"]
        tokens[word] = {s["id"]: s["tokens"] for s in listed}
        assert saved == {"saved": "same", "sessions": len(listed)}
    locked.http.post("/v1/sessions/save", json={"name": "mine"}, headers=key("sk-one"))
    refused = locked.http.post("/v1/sessions/restore", json={"name": "mine"}, headers=key("sk-two"))
    assert (
        refused.status_code == 400 and "mine.sessions" in refused.text and "/" not in refused.json()["error"]["message"]
    )
    locked.http.post("/v1/chat/interactive", json={**turn, "prompt": "And now?"}, headers=key("sk-two"))
    restored = locked.http.post("/v1/sessions/restore", json={"name": "same"}, headers=key("sk-one")).json()
    assert restored == {"restored": len(tokens["sk-one"])}
    for word, changed in (("sk-one", False), ("sk-two", True)):
        listed = {s["id"]: s["tokens"] for s in locked.http.get("/v1/sessions", headers=key(word)).json()["data"]}
        assert (listed["9"] != tokens[word]["9"]) == changed
    for number in range(40):
        full = locked.http.post("/v1/sessions/save", json={"name": f"n{number}"}, headers=key("sk-one"))
    assert full.status_code == 400 and full.json()["error"]["param"] == "name"
    assert locked.http.post("/v1/sessions/save", json={"name": "same"}, headers=key("sk-one")).status_code == 200


def test_a_key_has_its_share(locked: Running) -> None:
    long = {"prompt": ["a"], "n": 4, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with (
        locked.http.stream("POST", "/v1/completions", json=long, headers=key("sk-one")) as first,
        locked.http.stream("POST", "/v1/completions", json=long, headers=key("sk-one")) as second,
    ):
        assert first.status_code == second.status_code == 200
        third = locked.http.post(CHAT, json=HELLO, headers=key("sk-one"))
        for path, body in PREPARING.items():
            refused = locked.http.post(path, json=body, headers=key("sk-one"))
            assert refused.status_code == 429, f"{path} is open beyond the key's share"
            assert locked.http.post(path, json=body, headers=key("sk-two")).status_code in (200, 400)
    assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
    assert third.json()["error"]["type"] == "rate_limit_error"


def test_a_full_server_says_so_at_once(mini: Pipeline) -> None:
    running = serve(mini, ServeConfig())
    server = next(running)
    type(server.backend).max_open, kept = property(lambda self: 0), type(server.backend).max_open
    try:
        made = server.http.post(CHAT, json=HELLO)
        for path, body in PREPARING.items():
            assert server.http.post(path, json=body).status_code == 503, path
    finally:
        type(server.backend).max_open = kept
        running.close()
    assert made.status_code == 503 and "retry-after" in made.headers
    assert made.json()["error"]["type"] == "overloaded_error"


def test_the_engine_refuses_what_its_queue_cannot_hold(server: Running) -> None:
    """16 run and 64 wait; 60 choices are too many while 60 others are on their way, streamed or not, and 128 ever."""
    body = {"prompt": "a", "n": 60, "max_tokens": 900, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as first:
        pieces = first.iter_bytes()  # which closes the connection when it is forgotten
        assert first.status_code == 200 and next(pieces)
        for stream in (True, False):
            made = server.http.post("/v1/completions", json={**body, "stream": stream})
            assert made.status_code == 503 and made.json()["error"]["code"] == "overloaded"
            made = server.http.post("/v1/completions", json={**body, "n": 128, "stream": stream})
            assert made.status_code == 400 and made.json()["error"]["param"] == "n"
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_browsers_of_named_origins_may_call(locked: Running, server: Running) -> None:
    ask = {"origin": "https://page.test", "access-control-request-method": "POST"}
    assert locked.http.options(CHAT, headers=ask).headers["access-control-allow-origin"] == "https://page.test"
    other = locked.http.options(CHAT, headers={**ask, "origin": "https://evil.test"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in server.http.get("/health", headers=ask).headers


def test_keys_come_from_files_and_the_environment(tmp_path, monkeypatch) -> None:
    file = tmp_path / "keys"
    file.write_text("a\nb\n")
    monkeypatch.setenv("PAGODA_API_KEYS", "c,d")
    assert len(read_keys([f"@{file}", "e", "a"])) == 5
    assert b"a" not in read_keys(["a"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(["@/nowhere/keys"])


def test_logs_hold_no_prompts(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = {"messages": [{"role": "user", "content": "my secret word is xylophone"}], "max_tokens": 1}
    with caplog.at_level(logging.DEBUG, logger="pagoda"):
        server.http.post(CHAT, json=secret, headers={"x-request-id": "log-1"})
        server.http.post(CHAT, json={"messages": "xylophone", "n": "xylophone"}, headers=key("sk-hidden"))
    lines = [json.dumps(getattr(r, "fields", {})) + r.getMessage() for r in caplog.records]
    assert any('"log-1"' in line and '"status": 200' in line for line in lines)
    assert not any("xylophone" in line or "sk-hidden" in line for line in lines)


def test_a_client_that_leaves_amid_its_body_is_no_failure_of_the_server(server: Running, caplog) -> None:
    port, over = httpx.URL(server.url).port, threading.Event()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: gone-1\r\ncontent-length: 100\r\n\r\n"
    emit = caplog.handler.emit
    caplog.handler.emit = lambda r: (emit(r), getattr(r, "fields", {}).get("request_id") == "gone-1" and over.set())
    with caplog.at_level("INFO"), socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(head + b'{"prompt"')
        half.shutdown(socket.SHUT_RDWR)
        assert over.wait(10) and server.http.get("/health").status_code == 200
    [line] = [r.fields for r in caplog.records if getattr(r, "fields", {}).get("request_id") == "gone-1"]
    assert line["status"] == 499 and not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_without_an_engine_everything_is_503() -> None:
    backend = Backend("mini", ServeConfig())
    transport = httpx.ASGITransport(app=make_app(backend, ServeConfig()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for made in (await http.get("/health"), await http.get("/ready"), await http.post(CHAT, json=HELLO)):
            assert made.status_code == 503 and made.json()["error"]["type"] == "unavailable_error"


@pytest.mark.timeout(90)
def test_a_worker_whose_connection_broke_is_not_ready_and_connects_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cpu", session_len=256, max_batch_size=2, num_threads=1)
    engine, backend = spawn_engine("mini", config), Backend("mini", ServeConfig())
    owner, broken, mended = EngineClient(engine), threading.Event(), threading.Event()
    monkeypatch.setattr(backend_module, "time", SimpleNamespace(sleep=lambda seconds: mended.wait(30)))
    app = TestClient(make_app(backend, ServeConfig()))
    attach, pipes = backend.attach, queue.SimpleQueue()
    monkeypatch.setattr(backend, "attach", lambda pipe: (attach(pipe), pipes.put(pipe)))
    backend.follow({"engine": "start", "address": engine.address})
    pipe = pipes.get(timeout=60)
    receive = pipe.engine._transport.receive
    pipe.engine._transport.receive = lambda timeout: json.loads("no message") if broken.is_set() else receive(timeout)
    assert app.get("/ready").status_code == app.get("/health").status_code == 200
    broken.set()
    pipe.engine.wait_dead()
    backend.follow({"engine": "moving"})
    assert app.get("/ready").status_code == app.get("/health").status_code == 503
    mended.set()
    assert pipes.get(timeout=60) is backend.pipe is not pipe
    assert app.get("/ready").status_code == 200 and app.post(CHAT, json=HELLO).status_code == 200
    backend.lose()
    owner.close()


@pytest.mark.timeout(90)
def test_a_worker_that_lacks_a_descriptor_connects_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cpu", session_len=256, max_batch_size=2, num_threads=1)
    engine, backend, attached = spawn_engine("mini", config), Backend("mini", ServeConfig()), threading.Event()
    owner, fails = EngineClient(engine), ["a socket", "the vocabulary"]
    monkeypatch.setattr(backend_module, "time", SimpleNamespace(sleep=lambda seconds: None))

    def failing(real):
        def made(*given, **named):
            if fails:
                raise OSError(24, fails.pop())
            return real(*given, **named)

        return made

    for name in ("SocketTransport", "Pipeline"):
        monkeypatch.setattr(backend_module, name, failing(getattr(backend_module, name)))
    attach = backend.attach
    monkeypatch.setattr(backend, "attach", lambda pipe: (attach(pipe), attached.set()))
    backend.follow({"engine": "start", "address": engine.address})
    assert attached.wait(60) and not fails and backend.state == "ready"
    backend.lose()
    owner.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("who", ["pagoda", "asyncio", "uvicorn.error"])
def test_a_log_that_nobody_reads_stops_nobody_who_writes(who: str) -> None:
    code = (
        "import logging, os; from pagoda.serve.logs import setup_json_logging; setup_json_logging('info')\n"
        f"for _ in range(300): logging.getLogger({who!r}).warning('x' * 1000)\n"
        "os.write(1, b'went on'); os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.read(7) == b"went on"
        finally:
            process.kill()
