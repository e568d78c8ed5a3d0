"""Conversations in a file: msgpack, written whole or not at all, readable by the owner only.

Token ids are int32, little-endian as every machine we run on. Both ways take the conversations one by one: the thread
that does it must not hold Python's lock for long, for streams need it.
"""

import os
from array import array
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

import msgspec
from msgspec import Struct

from pagoda.errors import UsageError

VERSION = 1


class SavedSessions(Struct):
    """The file format."""

    version: int
    model: str
    sessions: dict[str, memoryview]


def write_sessions(path: Path, model: str, histories: dict[str, array]) -> None:
    """Histories by session id. Raises `UsageError` where the file cannot be written."""
    if not path.parent.is_dir():
        raise UsageError(f"Sessions cannot be saved to {path.name}: make the folder {path.parent.name} first.")
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                _write(file, model, histories)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UsageError(f"Sessions cannot be saved to {path.name} ({error.strerror}): choose another place.") from None


def _write(file: IO[bytes], model: str, histories: dict[str, array]) -> None:
    """`SavedSessions` with all sessions, in pieces."""
    encode = msgspec.msgpack.encode
    empty = encode(SavedSessions(VERSION, model, {}))
    file.write(empty[:-1] + b"\xdf" + len(histories).to_bytes(4, "big"))  # the empty map becomes one of that length
    for session_id, tokens in histories.items():
        file.write(encode(session_id))
        file.write(encode(memoryview(tokens).cast("B")))


def read_sessions(path: Path, model: str, vocab_size: int, prefix: str = "") -> dict[str, array]:
    """Histories of the sessions whose id begins with `prefix`. Raises `UsageError` for a missing, damaged, newer or
    foreign file."""
    import numpy as np  # not needed by clients

    try:
        saved = msgspec.msgpack.decode(path.read_bytes(), type=SavedSessions)
    except OSError as error:
        raise UsageError(f"The sessions file {path.name} cannot be read ({error.strerror}): check its name.") from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path.name} is not a sessions file, or it is damaged: save the sessions again.") from error
    if saved.version > VERSION:
        raise UsageError(f"{path.name} has version {saved.version}, this program reads up to {VERSION}: update Pagoda.")
    if saved.model != model:
        theirs, ours = Path(saved.model).name, Path(model).name
        raise UsageError(
            f"{path.name} was saved with the model {theirs!r}, not {ours!r}: load that model to restore it."
        )
    histories = {}
    for session_id, data in saved.sessions.items():
        if len(data) % 4:
            raise UsageError(f"{path.name} is damaged: save the sessions again.")
        ids = np.frombuffer(data, np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise UsageError(f"{path.name} holds token ids that the model does not have: it is of another model.")
        if session_id.startswith(prefix):
            histories[session_id] = array("i", bytes(data))
    return histories
