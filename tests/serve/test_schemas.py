"""Every schema at hand through the server: what it takes gives outputs that validate, what it does not is a 400."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Running

from pagoda.errors import GrammarError
from pagoda.text.grammar import compile_grammar

jsonschema = pytest.importorskip("jsonschema")
ROUTE, ASK = "/v1/chat/completions", [{"role": "user", "content": "Give an example."}]


def schemas(data: Path) -> list[Any]:
    """770 schemas that people wrote, then the official suite's, which are of draft 7 and do not say so."""
    lines = (data / "schemas" / "maskbench_sample.jsonl").read_text(encoding="utf-8").split("\n")
    found = [json.loads(line)["schema"] for line in lines if line]
    for path in sorted((data / "schemas" / "JSON-Schema-Test-Suite").rglob("*.json")):
        cases = [case["schema"] for case in json.loads(path.read_text(encoding="utf-8"))]
        draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
        found += [draft | case if isinstance(case, dict) else case for case in cases]
    return found


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def is_accepted(schema: Any) -> bool:
    try:
        return compile_grammar(form(schema)) is not None
    except GrammarError:
        return False


def faults(schema: Any, text: str) -> list[str]:
    """What is wrong with a finished output, as another library sees it."""
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return [e.message for e in cls(schema, format_checker=cls.FORMAT_CHECKER).iter_errors(json.loads(text))]


async def sweep(url: str, found: list[Any], bias: dict[str, int], max_tokens: int) -> Counter[str]:
    """Each schema at temperatures 0 and 1; 16 at once."""
    gate, ends = asyncio.Semaphore(16), Counter()

    async def ask(http: httpx.AsyncClient, schema: Any, temperature: int) -> None:
        body = {"messages": ASK, "max_tokens": max_tokens, "response_format": form(schema), "seed": 1}
        body |= {"temperature": temperature, "logit_bias": bias}
        async with gate:
            made = await http.post(ROUTE, json=body)
        if not is_accepted(schema):
            error = made.json()["error"]
            assert (made.status_code, error["param"]) == (400, "response_format"), made.text[:500]
            ends["refused"] += 1
            return
        assert made.status_code == 200, (schema, made.text[:500])
        [choice] = made.json()["choices"]
        ends[choice["finish_reason"]] += 1
        if choice["finish_reason"] == "stop":
            text = choice["message"]["content"]
            assert not faults(schema, text), (schema, text, faults(schema, text))

    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await asyncio.gather(*(ask(http, schema, warmth) for schema in found for warmth in (0, 1)))
    return ends


def haste(server: Running) -> dict[str, int]:
    """A liking for what closes and a dislike of space: left alone, the small model seldom comes to an end."""
    ids = {c: server.http.post("/tokenize", json={"prompt": c}).json()["tokens"][-1] for c in '"}],\n\t\r '}
    return {str(i): -9 if c.isspace() else 6 for c, i in ids.items()}


def test_some_schemas(server: Running, shared_data: Path) -> None:
    ends = asyncio.run(sweep(server.url, schemas(shared_data)[::40], haste(server), 64))
    assert set(ends) == {"stop", "length", "refused"} and ends["stop"] >= 8, ends


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_schemas(server: Running, shared_data: Path) -> None:
    found = schemas(shared_data)
    ends = asyncio.run(sweep(server.url, found, haste(server), 128))
    print(ends)
    assert sum(ends.values()) == 2 * len(found) > 2000
    assert set(ends) == {"stop", "length", "refused"} and ends["stop"] > 700, ends
    assert ends["refused"] == 2 * sum(not is_accepted(schema) for schema in found) < 0.3 * sum(ends.values()), ends
