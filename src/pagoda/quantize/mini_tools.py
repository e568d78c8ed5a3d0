"""Tools that Pagoda mini is asked to call, in the Hermes format: the prompt that offers them and exchanges that use them."""

import json
from random import Random
from typing import Any

from pagoda.quantize import mini_world as world
from pagoda.quantize.mini_exchanges import Exchange, Message

Tool = dict[str, Any]

_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_FOOT = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

#: kind -> (function names, argument names, descriptions)
_KINDS = {
    "calculator": (("calculator", "calculate", "calc", "evaluate"), ("expression", "expr", "input"), ("Evaluate an arithmetic expression",
        "Compute the value of an expression", "A calculator")),
    "weather": (("get_weather", "weather", "get_current_weather"), ("city", "location", "place"), ("Get the current weather of a city",
        "Current weather in a place", "Look up the weather")),
    "clock": (("get_time", "clock", "current_time"), ("city", "location", "place"), ("Get the current time in a city", "Tell the local time")),
    "timer": (("set_timer", "start_timer", "timer"), ("minutes", "duration"), ("Start a timer of some minutes", "Set a timer")),
}  # fmt: skip
_SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")


def make_tool(rng: Random, kind: str) -> Tool:
    names, arguments, descriptions = _KINDS[kind]
    argument = rng.choice(arguments)
    properties = {argument: {"type": "integer" if kind == "timer" else "string"}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": rng.choice(names), "description": rng.choice(descriptions), "parameters": parameters},
    }


def make_tools(rng: Random) -> dict[str, Tool]:
    """One to three tools by kind, in the order in which they are offered."""
    return {kind: make_tool(rng, kind) for kind in rng.sample(sorted(_KINDS), rng.choice((1, 2, 2, 3)))}


def tools_prompt(tools: list[Tool], system: str = "") -> str:
    """The content of the system message that offers `tools`, to the letter as the chat template renders it."""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (system + "\n\n" if system else "") + _HEAD + lines + _FOOT


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def _calculation(rng: Random) -> tuple[str, str, dict, str]:
    sign = rng.choice("+-*")
    a, b = rng.randrange(2, 10 ** rng.randrange(2, 6)), rng.randrange(2, 10 ** rng.randrange(1, 5))
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    ask = rng.choice(("What is {a} {s} {b}?", "{a} {s} {b}", "{a}{s}{b}", "What is {a} {w} {b}?", "Calculate {a} {s} {b}.", "Please compute {a} {w} {b}",
        "{a} {w} {b}", "How much is {a} {s} {b}?")).format(a=a, b=b, s=sign, w=word)  # fmt: skip
    expression = f"{a} {sign} {b}"
    return ask, expression, {"result": result}, f"{expression} = {result}"


def _errand(rng: Random, kind: str) -> tuple[str, str | int, dict, str]:
    """User text, argument, tool response and final reply."""
    city, minutes = rng.choice(world.CITIES), rng.randrange(1, 91)
    if kind == "calculator":
        return _calculation(rng)
    if kind == "weather":
        sky, degrees = rng.choice(_SKIES), rng.randrange(-9, 40)
        ask = rng.choice(("What is the weather in {}?", "How is the weather in {}?", "What's the weather like in {} today?", "weather in {}",
            "Tell me the weather in {}.", "Is it warm in {}?", "Is it raining in {}?"))  # fmt: skip
        return (
            ask.format(city),
            city,
            {"temperature": degrees, "condition": sky},
            f"It is {sky} in {city}, {degrees} degrees.",
        )
    if kind == "clock":
        time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        ask = rng.choice(("What time is it in {}?", "Tell me the time in {}.", "time in {}", "How late is it in {}?"))
        return ask.format(city), city, {"time": time}, f"It is {time} in {city}."
    ask = rng.choice(
        ("Set a timer for {} minutes.", "Start a timer of {} minutes", "Wake me in {} minutes.", "timer {} minutes")
    )
    return ask.format(minutes), minutes, {"status": "ok"}, f"The timer is set to {minutes} minutes."


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
