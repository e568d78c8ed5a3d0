"""The official client against the server: chats, streams, log-probabilities, structured output, errors."""

import json
import math
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import Running

from pagoda import GenerationConfig

STORY = [{"role": "user", "content": "Tell me a story."}]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed_and_unknown_ones_refused(client: openai.OpenAI, server: Running) -> None:
    assert [m.id for m in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").object == "model"
    with pytest.raises(openai.NotFoundError, match="this server has 'mini'"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)


def test_a_chat_is_what_the_pipeline_says(client: openai.OpenAI, server: Running) -> None:
    expected = server.pipe(QUESTION, GenerationConfig(do_sample=False, max_new_tokens=24))
    made = client.chat.completions.create(model="mini", messages=QUESTION, temperature=0, max_tokens=24)
    ChatCompletion.model_validate(made.model_dump(), strict=True)
    assert made.choices[0].message.content == expected.text
    assert made.choices[0].finish_reason == expected.finish_reason
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (
        expected.input_token_len,
        expected.generate_token_len,
    )


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_chats_equal_whole_ones(client: openai.OpenAI, n: int) -> None:
    ask = {"model": "mini", "messages": STORY, "seed": 5, "temperature": 1.5, "max_tokens": 24, "n": n}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    texts, tokens, reasons = [""] * n, [[] for _ in range(n)], [None] * n
    chunks = list(
        client.chat.completions.create(
            **ask, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for i in range(n):
        assert texts[i] == whole.choices[i].message.content
        assert [t.token for t in tokens[i]] == [t.token for t in whole.choices[i].logprobs.content]
        assert reasons[i] == whole.choices[i].finish_reason
    if n > 1:
        assert len(set(texts)) > 1


def test_chat_logprobs_spell_the_text(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="mini", messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    content = made.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == made.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0


def test_completions_echo_scores_the_prompt(client: openai.OpenAI, server: Running) -> None:
    """What lm-eval sends; the scores are those of the same tokens forced one at a time."""
    ids = server.pipe.tokenizer.encode("The cat sat on the mat")
    made = client.completions.create(
        model="mini", prompt=[ids, ids[:3]], max_tokens=1, echo=True, logprobs=1, seed=1234, temperature=0
    )
    scored = made.choices[0].logprobs
    assert len(scored.tokens) == len(ids) + 1 and scored.token_logprobs[0] is None
    assert "".join(scored.tokens[:-1]) == "The cat sat on the mat"
    assert [c.index for c in made.choices] == [0, 1]
    alone = server.pipe.prepare(ids[:3], GenerationConfig(do_sample=False, max_new_tokens=1, logprobs=20))
    answering = server.pipe.launch(alone)
    for output in answering.ticket:
        answering.take(output)
    top = dict(answering.reply.logprobs[0].top)
    if ids[3] in top:
        assert math.isclose(top[ids[3]], scored.token_logprobs[3], abs_tol=1e-4)
    best = answering.reply.logprobs[0]
    assert math.isclose(made.choices[1].logprobs.token_logprobs[3], best.logprob, abs_tol=1e-4)


def test_completions_take_every_form_of_prompt(client: openai.OpenAI, server: Running) -> None:
    ids = server.pipe.tokenizer.encode("Once upon a time")
    forms = ["Once upon a time", ["Once upon a time"], ids, [ids]]
    texts = [
        client.completions.create(model="mini", prompt=p, max_tokens=6, temperature=0).choices[0].text for p in forms
    ]
    assert len(set(texts)) == 1
    stream = client.completions.create(model="mini", prompt=ids, max_tokens=6, temperature=0, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in stream) == "Once upon a time" + texts[0]
    echoed = client.completions.create(model="mini", prompt=ids, max_tokens=0, echo=True)
    assert echoed.choices[0].text == "Once upon a time" and echoed.usage.completion_tokens == 0


def test_stops_seeds_and_bias(client: openai.OpenAI, server: Running) -> None:
    ask = {"model": "mini", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    full = client.completions.create(**ask).choices[0].text
    word = full.split()[2]
    cut = client.completions.create(**ask, stop=[word]).choices[0]
    assert cut.text == full[: full.index(word)] and cut.finish_reason == "stop"
    ids = server.pipe.tokenizer.encode(full)
    by_id = client.completions.create(**ask, extra_body={"stop_token_ids": [ids[2]]}).choices[0]
    assert by_id.text == server.pipe.tokenizer.decode(ids[:2])
    banned = client.completions.create(**ask, logit_bias={str(ids[0]): -100}).choices[0].text
    assert banned != full
    warm = {**ask, "temperature": 1.5, "seed": 3}
    assert client.completions.create(**warm).choices[0].text == client.completions.create(**warm).choices[0].text


def test_structured_outputs_obey(client: openai.OpenAI, server: Running) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["age"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    ask = {"model": "mini", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    made = client.chat.completions.create(**ask, response_format=form)
    value = json.loads(made.choices[0].message.content)
    assert set(value) == {"age"} and 0 <= value["age"] <= 99
    regex = client.chat.completions.create(**ask, extra_body={"guided_regex": "[0-9]{3}-[a-f]{2}"})
    assert len(regex.choices[0].message.content) == 6 and regex.choices[0].message.content[3] == "-"
    choice = client.chat.completions.create(**ask, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}
    with pytest.raises(openai.BadRequestError, match="response format was refused"):
        client.chat.completions.create(**ask, response_format=bad)


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "Tell me about the sea and the ships. " * 20}]
    ask = {"model": "mini", "messages": long, "max_tokens": 2, "temperature": 0}
    client.chat.completions.create(**ask)
    again = client.chat.completions.create(**ask)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < again.usage.prompt_tokens and cached % 64 == 0


async def test_the_asynchronous_client_streams(server: Running) -> None:
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model="mini", messages=QUESTION, max_tokens=12) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content


def test_unknown_fields_are_named_in_a_header(server: Running) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, "surprise": 1, "user": "ada", "bad\nname": 2}
    made = server.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert made.headers["x-ignored-fields"] == "surprise" and made.headers["x-request-id"] == "mine-1"


def test_fields_that_other_servers_have_are_honoured(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(route: str, **body: Any) -> Any:
        made = server.http.post(route, json=body)
        assert made.status_code == 200 and "x-ignored-fields" not in made.headers, made.text
        return made.json()

    def text(**more: Any) -> Any:
        return ask("/v1/completions", prompt="Once upon", **more)

    begins, encode = [], server.pipe.tokenizer.encode
    monkeypatch.setattr(
        server.pipe.tokenizer, "encode", lambda text, add_bos: (begins.append(add_bos), encode(text, add_bos))[1]
    )
    for add in (True, False, None):
        text(max_tokens=1, add_special_tokens=add)
        ask("/generate", prompt="Once upon", add_special_tokens=add, max_tokens=1)
    assert begins == [True, True, False, False, True, True]
    assert text(max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    cold = [text(do_sample=False, temperature=1.9, seed=seed)["choices"][0]["text"] for seed in (1, 2)]
    assert cold[0] == cold[1] == text(temperature=0)["choices"][0]["text"]
    free = text(temperature=0, structured_outputs={"json_object": False})["choices"][0]["text"]
    assert free == cold[0]
    made = ask("/generate", prompt="Once upon", max_completion_tokens=2, ignore_eos=True)
    assert made["meta_info"]["completion_tokens"] == 2
