"""Messages between clients and an engine: typed msgpack, the same inline and over a socket."""

from typing import Any

import msgspec
from msgspec import Struct

from pagoda.engine.request import EngineRequest, Output


class EngineInfo(Struct):
    """What a client needs to know of a started engine. Lengths in tokens; `report` is for a person."""

    model: str
    family: str
    session_len: int
    max_batch_size: int
    block_len: int
    num_blocks: int
    vocab_size: int
    eos_ids: list[int] = []
    report: list[str] = []
    max_queued: int = 0


class Submit(Struct, tag=True):
    """A new request."""

    request: EngineRequest


class Abort(Struct, tag=True):
    """End a request in whatever state it is. Its session keeps `keep_tokens` generated tokens, or forgets the whole
    turn when None."""

    id: str
    keep_tokens: int | None = None


class Call(Struct, tag=True):
    """Ask the engine to do `verb` (see `EngineLoop.calls`); answered by an `Answer` of the same `seq`."""

    seq: int
    verb: str
    arguments: dict[str, Any] = {}


class Leave(Struct, tag=True):
    """The client goes away: its open requests are aborted."""


class Outputs(Struct, tag=True):
    """All news of one step for one client."""

    outputs: list[Output]


class Answer(Struct, tag=True):
    """Answer to a `Call`: a value, or the class name and sentence of the error that it raised."""

    seq: int
    value: Any = None
    error: tuple[str, str] | None = None


class Ready(Struct, tag=True):
    """The engine can serve."""

    info: EngineInfo


class Dead(Struct, tag=True):
    """The engine is gone; class name and sentence of the error. No message follows."""

    error: tuple[str, str]


ToEngine = Submit | Abort | Call | Leave
FromEngine = Outputs | Answer | Ready | Dead

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
