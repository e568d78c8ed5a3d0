"""POST /v1/chat/completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pagoda.config import ServeConfig
from pagoda.errors import RequestError
from pagoda.offline import Piece, Pipeline, Prepared
from pagoda.serve.backend import Backend
from pagoda.serve.bodies import ChatBody, read_body
from pagoda.serve.documents import documented
from pagoda.serve.generation import Generation, copies, new_answer_id, respond
from pagoda.serve.openai_shapes import Chunks, EventWriter, chat_logprobs, usage
from pagoda.text.grammar import compile_grammar
from pagoda.text.parser import Event, OutputParser, ReasoningDelta, TextDelta, ToolCallStart, collect
from pagoda.text.reasoning import REASONING_FORMATS, guess_reasoning
from pagoda.text.template import RESERVED
from pagoda.text.tools import TOOL_FORMATS, guess_tools, tool_grammar

router = APIRouter()


@dataclass
class ChatJob:
    """A prepared chat and how its reply is read."""

    prepared: Prepared
    reasoning: str | None = None
    tools: str | None = None
    in_reasoning: bool = False
    tool_names: tuple[str, ...] = ()

    def parser(self) -> OutputParser | None:
        if self.reasoning is None and self.tools is None:
            return None
        return OutputParser(self.reasoning, self.tools, in_reasoning=self.in_reasoning, tool_names=self.tool_names)


def choose_tools(body: ChatBody) -> tuple[list[dict[str, Any]], bool]:
    """The tools that may be called, and whether one must be."""
    tools, choice = body.tools or [], body.tool_choice or "auto"
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError("Every tool must hold a function with a name.", "tools")
    if choice == "none":
        return [], False
    if choice in ("auto", "required"):
        if choice == "required" and not tools:
            raise RequestError("tool_choice is 'required' but there are no tools.", "tool_choice")
        return tools, choice == "required"
    must = True
    if isinstance(choice, dict) and choice.get("type") == "function":
        names = [_name_of(choice)]
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        given = allowed.get("tools") if isinstance(allowed, dict) else None
        names = [_name_of(tool) for tool in given] if isinstance(given, list) else []
        must = isinstance(allowed, dict) and allowed.get("mode") == "required"
    else:
        raise RequestError("tool_choice must be none, auto, required, a function or allowed_tools.", "tool_choice")
    known = {tool["function"]["name"]: tool for tool in tools}
    if not names or not all(isinstance(name, str) and name in known for name in names):
        raise RequestError("tool_choice names a tool that is not among the tools.", "tool_choice")
    return [known[name] for name in names], must


def _name_of(choice: Any) -> Any:
    """What names the function: a text, unless the client is wrong."""
    function = (choice.get("function") or choice) if isinstance(choice, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def pick(given: str | None, guess: str | None, known: Any) -> str | None:
    """A parser's name: the operator's, else the guess; `none` switches it off."""
    name = given or guess
    if name in (None, "none"):
        return None
    if name not in known:
        raise RequestError(f"The server was started with the unknown parser {name!r}: use one of {', '.join(known)}.")
    return name


def prepare_chat(pipe: Pipeline, config: ServeConfig, body: ChatBody, tenant: str) -> ChatJob:
    """Messages become ids. Runs in a thread."""
    more: dict[str, Any] = {"max_new_tokens": body.max_completion_tokens or body.max_tokens}
    if body.logprobs:
        more["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise RequestError("top_logprobs needs logprobs: true.", "top_logprobs")
    rules: dict[str, Any] = {"max_wait": config.queue_seconds}
    form = body.format()
    if isinstance(body.messages, str):
        gen = body.generation(tenant, **more)
        ids = pipe.prompt_ids(body.messages, do_preprocess=False)
        return ChatJob(pipe.prepare(ids, gen, grammar=compile_grammar(form), continues=True, **rules))
    if not body.messages:
        raise RequestError("messages is empty: send at least one.", "messages")
    tools, must = choose_tools(body)
    template = pipe.template
    kwargs = dict(body.chat_template_kwargs or {})
    for name in ("enable_thinking", "reasoning_effort"):
        if getattr(body, name) is not None:
            kwargs.setdefault(name, getattr(body, name))
    if set(kwargs) & set(RESERVED):
        raise RequestError(f"chat_template_kwargs must not hold {', '.join(RESERVED)}: they are reserved.")
    text = template.render(body.messages, tools=tools or None, **kwargs)
    has_token = lambda token: pipe.tokenizer.id_of(token) is not None  # noqa: E731
    reasoning = pick(config.reasoning_parser, guess_reasoning(template.source), REASONING_FORMATS)
    in_reasoning = reasoning is not None and REASONING_FORMATS[reasoning].is_open(text)
    after = REASONING_FORMATS[reasoning].end if reasoning and in_reasoning else None
    form_name, grammar = None, compile_grammar(form, after)
    if tools:
        form_name = pick(config.tool_call_parser, guess_tools(template.source, has_token), TOOL_FORMATS)
        if form_name is None:
            raise RequestError("This model's template knows no tool calls: leave tools out.", "tools")
        more["skip_special_tokens"] = False
    if must and form_name is not None:
        if grammar is not None:
            raise RequestError("A forced tool call and a response format exclude each other.", "response_format")
        grammar = tool_grammar(tools, form_name, after, body.parallel_tool_calls is not False)
    gen = body.generation(tenant, **more)
    prepared = pipe.prepare(pipe.encode_rendered(text), gen, stop_words=template.stop_words, grammar=grammar, **rules)
    names = tuple(tool["function"]["name"] for tool in tools)
    return ChatJob(prepared, reasoning, form_name, in_reasoning, names)


class ChatWriter(EventWriter):
    """Writes the chunks, or the whole, of a chat completion."""

    def __init__(
        self, answer_id: str, model: str, body: ChatBody, job: ChatJob, generation: Generation, pipe: Pipeline
    ):
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self.chunks = Chunks(f"chatcmpl-{answer_id}", kind, model, body.stream_options)
        self._answers, self._pipe, self._job = generation.answers, pipe, job
        self._logprobs, self._parallel = bool(body.logprobs), body.parallel_tool_calls is not False
        self._parsers = [job.parser() if body.stream else None for _ in self._answers]
        self._begun = [False] * len(self._answers)
        self._unsent: list[list[Any]] = [[] for _ in self._answers]
        self._before = [b'{"index":%d,"delta":{"content":' % i for i in range(len(self._answers))]

    def _counts(self) -> dict[str, Any]:
        return usage(self._answers, len(self._answers))

    def _choice(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        logprobs = None
        if self._unsent[index]:
            logprobs, self._unsent[index] = chat_logprobs(self._pipe.tokenizer, self._unsent[index]), []
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.chunks.choice(choice, self._counts() if self.chunks.continuous else None)

    def take(self, index: int, piece: Piece) -> bytes:
        out = []
        if not self._begun[index]:
            self._begun[index] = True
            out.append(self._choice(index, {"role": "assistant", "content": ""}))
        if self._logprobs and piece.logprobs:
            self._unsent[index] += piece.logprobs
        parser, reason = self._parsers[index], piece.finish_reason
        if parser is not None:
            events = parser.push(piece.text) + (parser.flush() if reason else [])
            out += [self._choice(index, delta) for delta in self._deltas(events)]
            if reason == "stop" and parser.num_calls:
                reason = "tool_calls"
        elif piece.text:
            if self._logprobs or self.chunks.continuous:
                out.append(self._choice(index, {"content": piece.text}))
            else:
                after = b'},"logprobs":null,"finish_reason":null}'
                out.append(self.chunks.text(self._before[index], piece.text, after))
        if reason:
            out.append(self._choice(index, {}, reason))
        return b"".join(out)

    def _deltas(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, TextDelta):
                deltas.append({"content": event.text})
            elif isinstance(event, ReasoningDelta):
                deltas.append({"reasoning_content": event.text})
            elif event.index == 0 or self._parallel:
                if isinstance(event, ToolCallStart):
                    call = {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
                else:
                    call = {"function": {"arguments": event.text}}
                deltas.append({"tool_calls": [{"index": event.index, **call}]})
        return deltas

    def end(self) -> bytes:
        return self.chunks.end(self._counts())

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, answering in enumerate(self._answers):
            reply, parser = answering.reply, self._job.parser()
            message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
            reason = reply.finish_reason
            if parser is not None:
                parsed = collect([*parser.push(reply.text), *parser.flush()])
                calls = parsed.calls if self._parallel else parsed.calls[:1]
                message["content"] = parsed.text if parsed.text or not calls else None
                if parsed.reasoning:
                    message["reasoning_content"] = parsed.reasoning
                if calls:
                    reason = "tool_calls" if reason == "stop" else reason
                    message["tool_calls"] = [
                        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                        for c in calls
                    ]
            logprobs = chat_logprobs(self._pipe.tokenizer, reply.logprobs or []) if self._logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return {**self.chunks.head, "choices": choices, "usage": self._counts()}


@router.post("/v1/chat/completions", **documented(ChatBody, "Answer a conversation", stream="text/event-stream"))
async def chat_completions(request: Request) -> Response:
    body = await read_body(request, ChatBody)
    backend: Backend = request.app.state.backend
    backend.check_model(body.model)
    pipe, tenant, answer_id = backend.pipe, request.state.tenant, new_answer_id()
    job = await backend.prepare(prepare_chat, pipe, backend.config, body, tenant)
    backend.log_prompt(request, job.prepared)
    generation = Generation(
        pipe, copies(job.prepared, tenant, answer_id, num=body.n or 1), backend.config.request_seconds
    )
    writer = ChatWriter(answer_id, backend.name, body, job, generation, pipe)
    return await respond(request, generation, writer, body.stream)
