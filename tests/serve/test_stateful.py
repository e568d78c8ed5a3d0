"""Sessions, the older routes, tokens, aborts and counters."""

import contextlib
import json
import threading

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Running

from pagoda import GenerationConfig
from pagoda.engine.metrics import EngineStats

TURN = "/v1/chat/interactive"
COLD = {"temperature": 0, "request_output_len": 40}


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_session_remembers_as_the_pipeline_does(server: Running) -> None:
    greedy = GenerationConfig(do_sample=False, max_new_tokens=40)
    with server.pipe.session() as chat:
        expected = [chat("My name is Ada.", greedy), chat("What is my name?", greedy)]
    body = {**COLD, "session_id": 1, "interactive_mode": True}
    first = server.http.post(TURN, json={**body, "prompt": "My name is Ada."}).json()
    said = lines(server.http.post(TURN, json={**body, "prompt": "What is my name?", "stream": True}).text)
    assert [first["text"], "".join(line["text"] for line in said)] == [e.text for e in expected]
    assert first["finish_reason"] == said[-1]["finish_reason"] == "stop"
    assert said[-1]["history_tokens"] == first["tokens"] + first["input_tokens"] > 0
    assert said[-1]["tokens"] == expected[1].generate_token_len


def test_sessions_are_listed_saved_restored_and_deleted(server: Running) -> None:
    body = {**COLD, "session_id": 22, "interactive_mode": True}
    server.http.post(TURN, json={**body, "prompt": "My name is Ada."})
    listed = {s["id"]: s for s in server.http.get("/v1/sessions").json()["data"]}
    assert listed["22"]["tokens"] > 10 and not listed["22"]["busy"]
    assert server.http.post("/v1/sessions/save", json={"name": "one"}).status_code == 200
    before = server.http.post(TURN, json={**body, "prompt": "What is my name?"}).json()["text"]
    assert server.http.delete("/v1/sessions/22").json()["deleted"]
    assert server.http.delete("/v1/sessions/22").status_code == 404
    assert server.http.post("/v1/sessions/restore", json={"name": "one"}).json()["restored"] >= 1
    assert server.http.post(TURN, json={**body, "prompt": "What is my name?"}).json()["text"] == before
    last = server.http.post(TURN, json={**body, "prompt": "Thanks.", "interactive_mode": False}).json()
    assert last["history_tokens"] > 0
    assert "22" not in [s["id"] for s in server.http.get("/v1/sessions").json()["data"]]


def test_an_empty_turn_ends_a_session_and_a_long_one_ends_at_once(server: Running) -> None:
    body = {**COLD, "session_id": 33, "interactive_mode": True}
    server.http.post(TURN, json={**body, "prompt": "hello"})
    long = server.http.post(TURN, json={**body, "prompt": "word " * 3000})
    assert long.status_code == 200 and (long.json()["text"], long.json()["finish_reason"]) == ("", "length")
    server.http.post(TURN, json={"prompt": "", "session_id": 33, "request_output_len": 0})
    assert "33" not in [s["id"] for s in server.http.get("/v1/sessions").json()["data"]]


def test_a_session_that_was_forgotten_is_told_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**COLD, "session_id": 66, "interactive_mode": True}
    server.http.post(TURN, json={**body, "prompt": "My name is Ada."})
    with monkeypatch.context() as patch:
        patch.setattr(server.pipe.engine._transport._loop._scheduler.sessions, "ttl", -1.0)
        server.http.get("/v1/sessions")
        told = server.http.post(TURN, json={**body, "prompt": "What is my name?", "stream": True})
    assert told.status_code == 404 and told.json()["error"]["code"] == "session_expired"
    anew = server.http.post(TURN, json={**body, "prompt": "What is my name?"})
    assert anew.status_code == 200 and anew.json()["history_tokens"] == 0


def test_a_running_turn_is_cancelled_and_keeps_what_was_said(server: Running) -> None:
    body = {**COLD, "session_id": 44, "interactive_mode": True, "ignore_eos": True, "request_output_len": 900}
    with server.http.stream("POST", TURN, json={**body, "prompt": "Tell me a story.", "stream": True}) as turn:
        news = turn.iter_lines()
        next(news)
        busy = server.http.post(TURN, json={**body, "prompt": "And now?"})
        assert busy.status_code == 409 and busy.json()["error"]["type"] == "conflict_error"
        server.http.post(TURN, json={"prompt": "", "session_id": 44, "cancel": True})
        last = json.loads(list(news)[-1])
    assert last["finish_reason"] == "abort" and 0 < last["tokens"] < 900
    listed = {s["id"]: s["tokens"] for s in server.http.get("/v1/sessions").json()["data"]}
    assert listed["44"] == last["tokens"] + last["input_tokens"]


def test_generate_tells_its_two_bodies_apart(server: Running) -> None:
    old = server.http.post("/generate", json={"prompt": "Who are you?", "session_id": -1, "temperature": 0}).json()
    assert {"text", "tokens", "finish_reason"} <= set(old) and "Pagoda" in old["text"]
    ids = server.pipe.tokenizer.encode("Once upon")
    new = {"input_ids": ids, "max_tokens": 4, "temperature": 0}
    whole = server.http.post("/generate", json={**new, "return_logprob": True}).json()
    assert len(whole["output_ids"]) == 4 and whole["meta_info"]["finish_reason"] == {"type": "length"}
    assert [t for _, t in whole["meta_info"]["output_token_logprobs"]] == whole["output_ids"]
    events = server.http.post("/generate", json={**new, "stream": True}).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert "".join(json.loads(e[6:])["text"] for e in events[:-1]) == whole["text"]


def test_tokens_go_back_and_forth(server: Running) -> None:
    text = "hello wörld 你好"
    ids = server.http.post("/tokenize", json={"prompt": text}).json()
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 1024
    assert server.http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": text}
    encoded = server.http.post("/v1/encode", json={"input": [text, "a"], "add_bos": False}).json()
    assert encoded["input_ids"][0] == ids["tokens"] and encoded["length"][1] == 1
    chat = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"] == server.pipe.prompt_ids("hi")


def test_texts_that_cannot_fit_are_not_tokenized(server: Running) -> None:
    long = "a" * 200_000
    for route, body in (("/tokenize", {"prompt": long}), ("/v1/encode", {"input": ["a", long]})):
        refused = server.http.post(route, json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    made = server.http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
    assert made["token_strs"] == [server.pipe.tokenizer.token_str(i) for i in made["tokens"]]


def test_an_answer_is_aborted_by_its_id(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 2}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        events = (line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        number = json.loads(next(events))["id"]
        assert server.http.post("/abort", json={"request_id": number}).json() == {"aborted": 2}
        rest = [json.loads(e) for e in events if e != "[DONE]"]
    assert [c["choices"][0]["finish_reason"] for c in rest][-1] == "abort"


def running(server: Running) -> EngineStats:
    return msgspec.convert(server.pipe.engine.call("stats"), EngineStats)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_requests(server: Running, stream: bool) -> None:
    """The engine is told, whether the answer is streamed or not."""
    body = {"prompt": ["a", "b"], "max_tokens": 1000, "ignore_eos": True, "n": 16, "stream": stream}
    before = running(server).counters.finished["abort"]
    with (
        contextlib.suppress(httpx.ReadTimeout),
        server.http.stream("POST", "/v1/completions", json=body, timeout=0.3) as answer,
    ):
        next(answer.iter_lines())
    pause = threading.Event()
    for _ in range(200):
        stats = running(server)
        if stats.num_running == stats.num_waiting == 0:
            break
        pause.wait(0.02)
    assert stats.num_running == stats.num_waiting == 0
    assert stats.counters.finished["abort"] >= before + 16


def test_metrics_are_prometheus(server: Running) -> None:
    page = server.http.get("/metrics")
    families = {f.name: f for f in text_string_to_metric_families(page.text)}
    assert {"pagoda:requests_running", "vllm:num_requests_running", "lmdeploy:num_requests_running"} <= set(families)
    assert "unknown" not in {f.type for f in families.values()}, "the kind is that of the samples"
    stats = running(server)
    made = {s.name: s.value for f in families.values() for s in f.samples if not s.labels.get("le")}
    assert made["vllm:generation_tokens_total"] == stats.counters.generated_tokens > 0
    buckets = [s.value for s in families["pagoda:e2e_request_latency_seconds"].samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == stats.counters.total_time.num
    assert server.http.head("/metrics").status_code == 200


def test_the_page_of_routes_needs_no_network(server: Running) -> None:
    for route in ("/", "/docs"):
        page = server.http.get(route).text
        assert "swagger-ui" in page and "http" not in page.replace("http-equiv", "")
    assert len(server.http.get("/docs-assets/swagger-ui.js").content) > 100_000
    assert ".swagger-ui" in server.http.get("/docs-assets/swagger-ui.css").text
    document = server.http.get("/openapi.json").json()
    assert "ChatBody" in document["components"]["schemas"]
    assert "#/$defs" not in json.dumps(document)
