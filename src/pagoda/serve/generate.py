"""POST /generate, with both bodies that carried this name; POST /v1/encode."""

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pagoda.config import ServeConfig
from pagoda.errors import RequestError
from pagoda.offline import Piece, Pipeline, Prepared, Reply
from pagoda.serve.backend import Backend
from pagoda.serve.bodies import EncodeBody, GenerateBody, InteractiveBody, check, read_body, read_json
from pagoda.serve.documents import documented
from pagoda.serve.generation import Generation, copies, new_answer_id, respond
from pagoda.serve.interactive import converse
from pagoda.serve.openai_shapes import DONE, EventWriter, finite

router = APIRouter()
OLD_FIELDS = frozenset(("interactive_mode", "request_output_len", "cancel", "session_id", "sequence_start"))
NEW_FIELDS = frozenset(("input_ids", "max_tokens", "return_logprob", "stop_token_ids", "min_p"))


def is_old(given: Any) -> bool:
    """Whether a body is the first one's: it has that one's fields and none of the newer one's."""
    return isinstance(given, dict) and bool(OLD_FIELDS & set(given)) and not NEW_FIELDS & set(given)


def prepare_generate(pipe: Pipeline, config: ServeConfig, body: GenerateBody, tenant: str) -> Prepared:
    """Runs in a thread."""
    if (body.prompt is None) == (body.input_ids is None):
        raise RequestError("Give either prompt or input_ids.", "prompt")
    if body.prompt is not None:
        ids = pipe.prompt_ids(body.prompt, do_preprocess=False, add_bos=body.add_special_tokens is not False)
    else:
        ids, vocab = body.input_ids or [], pipe.engine.info.vocab_size
        if any(not 0 <= token < vocab for token in ids):
            raise RequestError(f"input_ids has a token id outside 0 to {vocab - 1}.", "input_ids")
    gen = body.generation(
        tenant,
        max_new_tokens=body.max_tokens or body.max_completion_tokens,
        logprobs=0 if body.return_logprob else None,
    )
    return pipe.prepare(ids, gen, max_wait=config.queue_seconds, continues=True)


class GenerateWriter(EventWriter):
    def __init__(self, generation: Generation):
        self._answering = generation.answers[0]

    def _shape(self, piece: Piece | Reply) -> dict[str, Any]:
        reply = self._answering.reply
        meta: dict[str, Any] = {
            "finish_reason": {"type": piece.finish_reason} if piece.finish_reason else None,
            "prompt_tokens": reply.input_token_len,
            "completion_tokens": reply.generate_token_len,
            "cached_tokens": reply.cached_token_len,
        }
        if piece.logprobs is not None:
            meta["output_token_logprobs"] = [[finite(lp.logprob), lp.token] for lp in piece.logprobs]
        return {"text": piece.text, "output_ids": piece.token_ids, "meta_info": meta}

    def take(self, index: int, piece: Piece) -> bytes:
        return b"data: " + orjson.dumps(self._shape(piece)) + b"\n\n"

    def end(self) -> bytes:
        return DONE

    def whole(self) -> dict[str, Any]:
        return self._shape(self._answering.reply)


@router.post("/generate", **documented(GenerateBody, "Continue a text, or a turn of a session", "text/event-stream"))
async def generate(request: Request) -> Response:
    given = await read_json(request)
    if is_old(given):
        return await converse(request, check(request, given, InteractiveBody))
    body = check(request, given, GenerateBody)
    backend: Backend = request.app.state.backend
    pipe, tenant = backend.pipe, request.state.tenant
    prepared = await backend.prepare(prepare_generate, pipe, backend.config, body, tenant)
    generation = Generation(pipe, copies(prepared, tenant, new_answer_id()), backend.config.request_seconds)
    return await respond(request, generation, GenerateWriter(generation), body.stream)


@router.post("/v1/encode", **documented(EncodeBody, "Token ids of texts"))
async def encode(request: Request) -> dict[str, Any]:
    body = await read_body(request, EncodeBody)
    backend: Backend = request.app.state.backend
    pipe = backend.pipe

    def ids_of(text: str) -> list[int]:
        if body.do_preprocess:
            return pipe.prompt_ids(text)
        pipe.check_length(text)
        return pipe.tokenizer.encode(text, add_bos=body.add_bos)

    many = isinstance(body.input, list)
    ids = await backend.prepare(lambda: [ids_of(t) for t in (body.input if many else [body.input])])
    lengths = [len(one) for one in ids]
    return {"input_ids": ids if many else ids[0], "length": lengths if many else lengths[0]}
