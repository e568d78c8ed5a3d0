"""One script of chats with clients that are not ours: `python foreign_script.py URL`. Prints the names that passed."""

import sys
from typing import Any

URL = sys.argv[1] + "/v1"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {"title": "Person", "description": "a person", "type": "object", "properties": {"age": {"type": "integer"}},
          "required": ["age"], "additionalProperties": False}  # fmt: skip


def langchain_openai() -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=URL, api_key="none", model="mini", temperature=0, max_tokens=60, max_retries=0)
    assert "Pagoda" in chat.invoke("Who are you?").content
    assert "Pagoda" in "".join(chunk.content for chunk in chat.stream("Who are you?"))
    called = chat.bind_tools([TOOL], tool_choice="required").invoke("What is the weather in Paris?")
    assert called.tool_calls[0]["name"] == "get_weather" and "city" in called.tool_calls[0]["args"]
    made = chat.with_structured_output(SCHEMA, method="json_schema", strict=True).invoke("How old is Ada?")
    assert isinstance(made["age"], int)
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("hi")
    assert scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]


def litellm() -> None:
    import litellm

    for provider in ("openai", "hosted_vllm"):
        ask: dict[str, Any] = {"model": f"{provider}/mini", "api_base": URL, "api_key": "none", "temperature": 0}
        hello = [{"role": "user", "content": "Who are you?"}]
        made = litellm.completion(messages=hello, max_tokens=30, **ask)
        assert "Pagoda" in made.choices[0].message.content and made.usage.completion_tokens > 3
        text = "".join(c.choices[0].delta.content or "" for c in litellm.completion(messages=hello, stream=True, **ask))
        assert "Pagoda" in text
        weather = [{"role": "user", "content": "What is the weather in Paris?"}]
        called = litellm.completion(messages=weather, tools=[TOOL], tool_choice="auto", max_tokens=60, **ask)
        assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
        refusal = ""
        try:
            litellm.completion(messages=hello, top_p=5, **ask)
        except litellm.BadRequestError as error:
            refusal = str(error)
        assert "top_p" in refusal


for client in (langchain_openai, litellm):
    try:
        client()
        print("passed", client.__name__, flush=True)
    except ModuleNotFoundError as error:
        print("missing", client.__name__, error.name, flush=True)
