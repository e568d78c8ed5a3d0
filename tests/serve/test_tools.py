"""Tool calls: chosen, required, named, forbidden; streamed as whole; reasoning apart from the answer."""

import json
from typing import Any

import openai
import pytest
from serving import Running

from pagoda import ServeConfig
from pagoda.engine.request import EngineRequest
from pagoda.offline import Answering, Piece, Pipeline, Prepared, Reply
from pagoda.serve.bodies import ChatBody
from pagoda.serve.openai_chat import ChatJob, ChatWriter, choose_tools


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": name, "description": f"{name} of a city", "parameters": parameters},
    }


TOOLS = [tool("get_weather"), tool("get_time")]
ASK = {"model": "mini", "messages": [{"role": "user", "content": "What is the weather in Paris?"}], "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def streamed(client: openai.OpenAI, **ask: Any) -> tuple[str, list[tuple[str, str]], str]:
    text, calls, reason = "", [], ""
    for chunk in client.chat.completions.create(**ASK, stream=True, **ask):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for delta in choice.delta.tool_calls or []:
            if delta.id:
                calls.append([delta.function.name, ""])
                assert delta.index == len(calls) - 1
            calls[delta.index][1] += delta.function.arguments or ""
        reason = choice.finish_reason or reason
    return text, [tuple(c) for c in calls], reason


@pytest.mark.parametrize(
    "choice",
    ["auto", "required", {"type": "function", "function": {"name": "get_time"}}],
    ids=["auto", "must", "named"],
)
def test_calls_are_made_and_streamed_alike(client: openai.OpenAI, choice: Any) -> None:
    ask = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 80}
    made = client.chat.completions.create(**ASK, **ask).choices[0]
    assert made.finish_reason == "tool_calls" and made.message.content is None
    calls = [(c.function.name, c.function.arguments) for c in made.message.tool_calls]
    assert all(isinstance(json.loads(arguments)["city"], str) for _, arguments in calls)
    if isinstance(choice, dict):
        assert {name for name, _ in calls} == {"get_time"}
    assert streamed(client, **ask) == ("", calls, "tool_calls")


def test_no_call_without_leave(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="none", max_tokens=20).choices[0]
    assert made.message.tool_calls is None and made.message.content


def test_a_call_and_its_result_go_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK, tools=TOOLS, max_tokens=60).choices[0].message
    answer = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"weather": "sunny"}'}
    messages = [*ASK["messages"], first.model_dump(exclude_none=True), answer]
    made = client.chat.completions.create(**{**ASK, "messages": messages}, tools=TOOLS, max_tokens=30)
    assert made.choices[0].message.content


@pytest.mark.parametrize(
    "ask",
    [
        {"tools": [{"type": "function"}]},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nothing"}}},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
)
def test_wrong_tools_are_refused(client: openai.OpenAI, ask: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="tool"):
        client.chat.completions.create(**ASK, **ask)


def test_allowed_tools_narrow_the_choice() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    body = ChatBody(messages="x", tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    tools, must = choose_tools(body)
    assert [t["function"]["name"] for t in tools] == ["get_time"] and must


REPLIES = {
    "hermes": 'Let me see.\n<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a\\"b"}}\n</tool_call>',
    "llama3": '{"name": "get_time", "parameters": {"city": "Rome"}}; '
    '{"name": "get_weather", "parameters": {"city": "x"}}',
    "mistral": '[TOOL_CALLS][{"name": "get_time", "arguments": {"city": "Rome"}}, '
    '{"name": "get_weather", "arguments": {}}]',
    "internlm": 'I look.<|action_start|><|plugin|>\n{"name": "get_time", "parameters": {"city": "Rome"}}<|action_end|>',
    None: "no call here",
}


@pytest.mark.parametrize("form", REPLIES)
@pytest.mark.parametrize("parallel", [True, False])
def test_every_form_streams_as_it_answers(mini: Pipeline, form: str | None, parallel: bool) -> None:
    """Cut at every character: the joined deltas are the message."""
    text = "<think>let us see</think>" + REPLIES[form]
    job = ChatJob(
        Prepared(EngineRequest("a", [1]), (), False, False), "think", form, False, ("get_time", "get_weather")
    )

    class Done:
        def __init__(self) -> None:
            answering = Answering(None, None, 0.0)  # type: ignore[arg-type]
            answering.reply = Reply(text, finish_reason="stop")
            self.answers = [answering]

    bodies = [ChatBody(messages="x", stream=s, parallel_tool_calls=parallel) for s in (True, False)]
    stream, whole = (ChatWriter("1", "m", body, job, Done(), mini) for body in bodies)  # type: ignore[arg-type]
    data = b"".join(stream.take(0, Piece(c)) for c in text) + stream.take(0, Piece("", finish_reason="stop"))
    said = {"content": "", "reasoning_content": ""}
    calls: list[list[str]] = []
    reason = None
    for line in data.decode().strip().split("\n\n"):
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        for key in said:
            said[key] += choice["delta"].get(key) or ""
        for delta in choice["delta"].get("tool_calls", []):
            if "id" in delta:
                calls.append([delta["function"]["name"], ""])
            calls[delta["index"]][1] += delta["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    expected = whole.whole()["choices"][0]
    message = expected["message"]
    assert said == {"content": message["content"] or "", "reasoning_content": "let us see"}
    assert calls == [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", [])]
    assert reason == expected["finish_reason"] == ("tool_calls" if form else "stop")
    assert len(calls) == (0 if form is None else 1 if form == "internlm" or not parallel else 2)
    assert ServeConfig().tool_call_parser is None
