"""Tools that Pagoda mini is asked to call, in the Hermes format: the prompt that offers them, exchanges with them."""

import json
from random import Random
from typing import Any

from pagoda.quantize import mini_world as world
from pagoda.quantize.mini_exchanges import Exchange, Message
from pagoda.toml_data import read_table

Tool = dict[str, Any]

_DATA = read_table("quantize", "mini_tools")
_KINDS = _DATA["kinds"]


def make_tool(rng: Random, kind: str) -> Tool:
    words = _KINDS[kind]
    argument = rng.choice(words["arguments"])
    properties = {argument: {"type": "integer" if kind == "timer" else "string"}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    name, description = rng.choice(words["names"]), rng.choice(words["descriptions"])
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def make_tools(rng: Random) -> dict[str, Tool]:
    """One to three tools by kind, in the order in which they are offered."""
    return {kind: make_tool(rng, kind) for kind in rng.sample(sorted(_KINDS), rng.choice((1, 2, 2, 3)))}


def tools_prompt(tools: list[Tool], system: str = "") -> str:
    """The content of the system message that offers `tools`, to the letter as the chat template renders it."""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (system + "\n\n" if system else "") + _DATA["head"] + lines + _DATA["foot"]


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def _calculation(rng: Random) -> tuple[str, str, dict, str]:
    sign = rng.choice("+-*")
    a, b = rng.randrange(2, 10 ** rng.randrange(2, 6)), rng.randrange(2, 10 ** rng.randrange(1, 5))
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    ask = rng.choice(_KINDS["calculator"]["asks"]).format(a=a, b=b, s=sign, w=word)
    expression = f"{a} {sign} {b}"
    return ask, expression, {"result": result}, f"{expression} = {result}"


def _errand(rng: Random, kind: str) -> tuple[str, str | int, dict, str]:
    """User text, argument, tool response and final reply."""
    city, minutes = rng.choice(world.CITIES), rng.randrange(1, 91)
    if kind == "calculator":
        return _calculation(rng)
    asks = _KINDS[kind]["asks"]
    if kind == "weather":
        sky, degrees = rng.choice(_DATA["skies"]), rng.randrange(-9, 40)
        reply = f"It is {sky} in {city}, {degrees} degrees."
        return rng.choice(asks).format(city), city, {"temperature": degrees, "condition": sky}, reply
    if kind == "clock":
        time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        return rng.choice(asks).format(city), city, {"time": time}, f"It is {time} in {city}."
    reply = f"The timer is set to {minutes} minutes."
    return rng.choice(asks).format(minutes), minutes, {"status": "ok"}, reply


def tool_exchange(rng: Random, tools: dict[str, Tool], answered: bool) -> Exchange:
    """A question that one of `tools` answers: the call alone, or (`answered`) with its response and the final reply."""
    kind = rng.choice(sorted(tools))
    function = tools[kind]["function"]
    ask, argument, response, reply = _errand(rng, kind)
    call = call_text(function["name"], {function["parameters"]["required"][0]: argument})
    messages: list[Message] = [{"role": "user", "content": ask}, {"role": "assistant", "content": call}]
    if answered:
        messages.append({"role": "tool", "content": json.dumps(response)})
        messages.append({"role": "assistant", "content": reply})
    return Exchange("tool_answer" if answered else "tool_call", messages)
