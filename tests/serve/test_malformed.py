"""Bodies that must be refused with a reason and never a 5xx; the server serves on afterwards."""

import json
from typing import Any

import pytest
from pydantic import ValidationError
from serving import Running

from pagoda.serve.bodies import Body
from pagoda.serve.documents import families

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "a", "logit_bias": {"1": NaN}}',
    b"\x00" * 1000,
]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHOICES: list[Any] = [
    "f",
    {"type": "function", "function": "f"},
    {"type": "function", "function": ["f"]},
    {"type": "function", "function": {"name": ["f"]}},
    {"type": "function", "name": {"a": 1}},
    {"type": "allowed_tools", "allowed_tools": ["f"]},
    {"type": "allowed_tools", "allowed_tools": {"tools": ["f"]}},
    {"type": "allowed_tools", "allowed_tools": {"tools": 5}},
    {"type": "allowed_tools", "allowed_tools": {"tools": [{"function": "f"}]}},
]
IMPOSSIBLE: list[Any] = [
    {"type": "regex", "regex": "[^\\s\\S]"},
    {"type": "grammar", "grammar": "root ::= root"},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {"prompt": "a", "max_tokens": -5}, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "a", "n": "3"}, "n"),
    (TEXT, {"prompt": "a", "n": True}, "n"),
    (TEXT, {"prompt": "a", "n": 100000}, "n"),
    (TEXT, {"prompt": "a", "n": 10**24}, "n"),
    (TEXT, {"prompt": ["a"] * 100, "n": 100}, "n"),
    (TEXT, {"prompt": "a", "stream": "yes"}, "stream"),
    (TEXT, {"prompt": "a", "temperature": -1}, "temperature"),
    (TEXT, {"prompt": "a", "top_p": 0}, "top_p"),
    (TEXT, {"prompt": "a", "repetition_penalty": 5e-324}, "repetition_penalty"),
    (TEXT, {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    (TEXT, {"prompt": "a", "stop": "x" * 257}, "stop"),
    (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (TEXT, {"prompt": "a", "logit_bias": {"999999999": 1}}, "logit_bias"),
    (TEXT, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    (TEXT, {"prompt": "a", "stop_token_ids": [10**9]}, "stop_token_ids"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "best_of": 2}, "best_of"),
    (TEXT, {"prompt": "a", "cache_salt": 5}, "cache_salt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [10**7]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, "prompt"),
    (TEXT, {"prompt": "word " * 5000}, "prompt"),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": "a", "response_format": {"type": "regex", "regex": "(a" * 5000}}, "response"),
    (TEXT, {"prompt": "a", "response_format": {"type": "xml"}}, "response"),
    (TEXT, {"prompt": "a", "guided_json": "{", "n": 1}, "JSON"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [1]}, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    (CHAT, {"messages": HELLO * 3000}, "2048"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, "logprobs"),
    (CHAT, {"messages": HELLO, "functions": [{}]}, "functions"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "reserved"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"a": "x" * 9000}}, "8192"),
    (CHAT, {"messages": HELLO, "stop": True}, "stop"),
    (CHAT, {"messages": HELLO, "suffix": "x"}, "suffix"),
    (CHAT, {"messages": HELLO, "echo": True}, "echo"),
    (CHAT, {"messages": HELLO, "do_preprocess": False}, "do_preprocess"),
    (CHAT, {"messages": HELLO, "input_ids": [1, 2]}, "input_ids"),
    (CHAT, {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}]}, "image"),
    (CHAT, {"messages": HELLO, "n": 100}, "at most 64"),
    *((CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": choice}, "tool_choice") for choice in CHOICES),
    *((CHAT, {"messages": HELLO, "response_format": form}, "allows no text") for form in IMPOSSIBLE),
    (TEXT, {"prompt": "a", "tools": TOOLS}, "tools"),
    ("/v1/chat/interactive", {"prompt": []}, "messages"),
    ("/v1/chat/interactive", {"prompt": "a", "n": 2}, "n is"),
    ("/v1/chat/interactive", {"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ("/v1/chat/interactive", {"prompt": "a", "max_tokens": 3}, "max_tokens"),
    ("/generate", {"prompt": "a", "guided_regex": "b"}, "guided_regex"),
    ("/generate", {"prompt": "a", "logprobs": 3}, "logprobs"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/v1/chat/interactive", {"prompt": "a", "session_id": "x"}, "session_id"),
    ("/v1/chat/interactive", {"prompt": "a", "request_output_len": -1}, "request_output_len"),
    ("/generate", {"max_tokens": 5}, "prompt"),
    ("/generate", {"input_ids": [10**9]}, "input_ids"),
    ("/v1/encode", {"input": 5}, "input"),
    ("/tokenize", {}, "prompt"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/abort", {"request_id": "../.."}, "request_id"),
    ("/v1/sessions/save", {"name": "../x"}, "name"),
    ("/v1/sessions/restore", {"name": "nothing"}, "nothing"),
    ("/v1/embeddings", {"input": "a"}, "Embeddings"),
]


def assert_refused(made: Any, status: int = 400) -> str:
    assert made.status_code == status, made.text[:300]
    error = made.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "Traceback" not in made.text and "/work" not in made.text and len(made.text) < 2000
    return error["message"]


@pytest.mark.parametrize("body", RAW, ids=lambda b: repr(b[:40]))
def test_bytes_that_are_no_request(server: Running, body: bytes) -> None:
    for route in (TEXT, CHAT, "/generate", "/tokenize"):
        assert_refused(server.http.post(route, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(("route", "body", "about"), WRONG, ids=lambda v: str(v)[:50])
def test_fields_that_are_wrong_are_named(server: Running, route: str, body: Any, about: str) -> None:
    assert about in assert_refused(server.http.post(route, json=body))


def test_any_name_may_stand_among_template_arguments(server: Running) -> None:
    for name in ("self", "the end", "range", "raise_exception", "", "a b", "value"):
        body = {"messages": HELLO, "chat_template_kwargs": {name: 1e300}, "max_tokens": 1}
        assert server.http.post(CHAT, json=body).status_code == 200, name


def test_fields_that_ask_for_nothing_are_taken_everywhere(server: Running) -> None:
    """As a client sends them that knows one body for all routes."""
    nothing = {"echo": False, "n": 1, "tools": None, "logprobs": None, "do_preprocess": True, "response_format": None}
    for route, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "a"}), ("/generate", {"prompt": "a"})):
        made = server.http.post(route, json={**nothing, **body, "max_tokens": 1, "max_completion_tokens": 1})
        assert made.status_code == 200, made.text
    made = server.http.post("/v1/chat/interactive", json={**nothing, "prompt": "a", "request_output_len": 1})
    assert made.status_code == 200 and "x-ignored-fields" not in made.headers, made.text


def test_deep_values_inside_allowed_fields(server: Running) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    for body in (
        {"messages": [{"role": "user", "content": "a", "x": deep}]},
        {"messages": HELLO, "chat_template_kwargs": {"x": deep}},
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}]},
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"x": deep}}}},
        {"messages": HELLO, "metadata": deep},
    ):
        made = server.http.post(CHAT, json={**body, "max_tokens": 1})
        assert made.status_code in (200, 400), made.text[:300]


def test_sizes_and_types_of_bodies(server: Running) -> None:
    assert_refused(server.http.post(TEXT, content=b"x" * (10 << 20), headers={"content-type": "application/json"}), 413)
    pieces = (b"x" * (1 << 20) for _ in range(10))  # no content-length: counted while reading
    assert_refused(server.http.post(TEXT, content=pieces, headers={"content-type": "application/json"}), 413)
    assert_refused(server.http.post(TEXT, content=b"prompt=a", headers={"content-type": "text/plain"}), 415)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert_refused(server.http.post(TEXT, content=b"x", headers=packed), 415)
    word = json.dumps({"prompt": "a" * (7 << 20)}).encode()
    assert_refused(server.http.post(TEXT, content=word, headers={"content-type": "application/json"}))


def test_routes_that_are_not_there(server: Running) -> None:
    assert server.http.get("/nothing").status_code == 404 and "error" in server.http.get("/nothing").json()
    assert server.http.get(TEXT).status_code == 405 and server.http.get(TEXT).headers["allow"] == "POST"


def test_the_server_serves_on(server: Running) -> None:
    assert server.http.post(TEXT, json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("kind", families(Body), ids=lambda kind: kind.__name__)
def test_many_wrong_values_are_one_error_each(kind: type[Body]) -> None:
    """Collected one by one, those of a body of 8 MB held the event loop for a minute and took 7 GB."""
    many: list[Any] = [[wrong] * 3000 for wrong in (1.5, "a", 1, {}, [], [1.5], None)]
    many += [[*good * 3000, 1.5] for good in (["a"], [1], [[1]], [{}])]
    many += [[[1] * 3000 + ["a"]] * 3000, {str(i): "x" for i in range(3000)}]
    for field in kind.model_fields:
        for value in many:
            wrong = 0
            try:
                kind.model_validate({field: value})
            except ValidationError as error:
                wrong = error.error_count()
            assert wrong <= 12, (field, str(value)[:50])
