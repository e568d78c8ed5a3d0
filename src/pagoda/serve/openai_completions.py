"""POST /v1/completions: raw prompts, with echo and the log-probabilities of the prompt for evaluation."""

from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pagoda.config import ServeConfig
from pagoda.errors import RequestError
from pagoda.offline import Piece, Pipeline, Prepared, Reply
from pagoda.serve.backend import Backend
from pagoda.serve.bodies import MAX_CHOICES, CompletionBody, read_body
from pagoda.serve.documents import documented
from pagoda.serve.generation import Generation, copies, new_answer_id, respond
from pagoda.serve.openai_shapes import Chunks, EventWriter, completion_logprobs, usage
from pagoda.text.grammar import compile_grammar

router = APIRouter()


def prompts_of(pipe: Pipeline, body: CompletionBody) -> list[list[int]]:
    """Token ids of every prompt. Runs in a thread."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise RequestError("prompt is empty: send at least one.", "prompt")
    prompts = []
    for one in given:
        ids = one
        if isinstance(one, str):
            ids = pipe.prompt_ids(one, do_preprocess=False, add_bos=body.add_special_tokens is not False)
        if not ids and pipe.tokenizer.bos_id is not None:
            ids = [pipe.tokenizer.bos_id]
        prompts.append(ids)
    return prompts


def prepare_completion(pipe: Pipeline, config: ServeConfig, body: CompletionBody, tenant: str) -> list[Prepared]:
    """One request a prompt. Runs in a thread."""
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens is 0: it must be 1 or more, or echo true.", "max_tokens")
    prompts = prompts_of(pipe, body)
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise RequestError(f"At most {MAX_CHOICES} choices are made at once: send fewer prompts or a smaller n.", "n")
    limit = body.max_completion_tokens if body.max_tokens is None else max(1, body.max_tokens)
    prompt_logprobs = body.logprobs if body.echo else None
    gen = body.generation(tenant, max_new_tokens=limit, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    grammar = compile_grammar(body.format())
    return [pipe.prepare(ids, gen, grammar=grammar, max_wait=config.queue_seconds, continues=True) for ids in prompts]


class CompletionWriter(EventWriter):
    """Writes the chunks, or the whole, of a text completion."""

    def __init__(
        self, answer_id: str, model: str, body: CompletionBody, prepared: list[Prepared], generation: Generation,
        pipe: Pipeline,
    ):  # fmt: skip
        self.chunks = Chunks(f"cmpl-{answer_id}", "text_completion", model, body.stream_options)
        self._answers, self._tokenizer, self._body = generation.answers, pipe.tokenizer, body
        self._n, self._prompts = body.n or 1, [p.request.prompt_ids for p in prepared]
        self._offsets: dict[int, int] = {}

    def _echo(self, index: int) -> str:
        ids = self._prompts[index // self._n]
        return self._tokenizer.decode(ids, skip_special=False) if self._body.echo else ""

    def _logprobs(self, index: int, tokens: list[int], logprobs: Any, reply: Reply, start: bool) -> Any:
        if self._body.logprobs is None:
            return None
        entries = list(zip(tokens, logprobs or []))
        if start and self._body.echo:
            ids = self._prompts[index // self._n]
            entries = list(zip(ids, reply.prompt_logprobs or [None] * len(ids))) + entries
        shape = completion_logprobs(self._tokenizer, entries, self._offsets.get(index, 0))
        if shape["tokens"]:
            self._offsets[index] = shape["text_offset"][-1] + len(shape["tokens"][-1])
        return shape

    def _counts(self) -> dict[str, Any]:
        counts = usage(self._answers, self._n)
        if self._body.max_tokens == 0:
            counts |= {"completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}
        return counts

    def take(self, index: int, piece: Piece) -> bytes:
        reply = self._answers[index].reply
        begins, piece = index not in self._offsets, self._without_text(piece)
        text = self._echo(index) + piece.text if begins else piece.text
        self._offsets.setdefault(index, 0)
        plain = self._body.logprobs is None and not piece.finish_reason and not self.chunks.continuous
        if plain:
            before, after = b'{"index":%d,"text":' % index, b',"logprobs":null,"finish_reason":null}'
            return self.chunks.text(before, text, after) if text else b""
        logprobs = self._logprobs(index, piece.token_ids, piece.logprobs, reply, begins)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return self.chunks.choice(choice, self._counts() if self.chunks.continuous else None)

    def _without_text(self, piece: Piece) -> Piece:
        return replace(piece, text="", token_ids=[], logprobs=None) if self._body.max_tokens == 0 else piece

    def end(self) -> bytes:
        return self.chunks.end(self._counts())

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, answering in enumerate(self._answers):
            reply = answering.reply
            piece = self._without_text(Piece(reply.text, reply.token_ids, reply.finish_reason, reply.logprobs))
            logprobs = self._logprobs(index, piece.token_ids, piece.logprobs, reply, True)
            text = self._echo(index) + piece.text
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason})
        return {**self.chunks.head, "choices": choices, "usage": self._counts()}


@router.post("/v1/completions", **documented(CompletionBody, "Continue texts", stream="text/event-stream"))
async def completions(request: Request) -> Response:
    body = await read_body(request, CompletionBody)
    backend: Backend = request.app.state.backend
    backend.check_model(body.model)
    pipe, tenant, answer_id, n = backend.pipe, request.state.tenant, new_answer_id(), body.n or 1
    prepared = await backend.prepare(prepare_completion, pipe, backend.config, body, tenant)
    backend.log_prompt(request, prepared[0])
    choices = [c for i, one in enumerate(prepared) for c in copies(one, tenant, answer_id, i * n, n)]
    generation = Generation(pipe, choices, backend.config.request_seconds)
    writer = CompletionWriter(answer_id, backend.name, body, prepared, generation, pipe)
    return await respond(request, generation, writer, body.stream)
