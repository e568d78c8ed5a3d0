"""`pagoda serve api_client URL`: a conversation with a server in the terminal; the server remembers it."""

import os
import secrets
import sys

from pagoda.cli.terminal import inputs, printable
from pagoda.errors import MissingExtraError, PagodaError


def talk(url: str, api_key: str | None, session_id: int | None) -> int:
    """The loop, until `exit` or the end of input. An empty line ends the input, `end` starts a new conversation,
    Ctrl-C stops one reply."""
    try:
        from pagoda.serve.client import Client
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"The client needs {error.name}: run `pip install 'pagoda-llm[serve]'`.") from None
    key = api_key or os.environ.get("PAGODA_API_KEY")
    client = Client(url, key, on_wait=lambda why: print(why, file=sys.stderr))
    session = secrets.randbelow(2**31) if session_id is None else session_id
    print(f"session {session} with {client.model()['id']} at {client.url}")
    held = 0
    for text in inputs():
        try:
            if text == "end":
                client.end(session)
                session, held = secrets.randbelow(2**31), 0
                print(f"A new conversation: session {session}.")
            else:
                held = say(client, session, text, held)
        except PagodaError as error:
            print(f"{error} `end` starts a new conversation.", file=sys.stderr)
    if session_id is None:
        client.end(session)
    client.close()
    return 0


def say(client, session: int, text: str, held: int) -> int:  # type: ignore[no-untyped-def]
    """One turn: print the reply as it comes. Returns the tokens that the session holds now."""
    pieces, last = client.turn(session, text, request_output_len=None), None
    try:
        for last in pieces:
            if held and not last.history_tokens:
                print("[the server has forgotten this conversation: it starts anew]", file=sys.stderr)
                held = 0
            print(printable(last.text), end="", flush=True)
        end = {"length": "\n[token limit: `end` starts a new conversation]", "abort": "\n[stopped]"}
        print(end.get(last.finish_reason if last else "", ""), flush=True)
    except KeyboardInterrupt:
        print("\n[stopped]", flush=True)
    finally:
        pieces.close()
    return last.history_tokens + last.prompt_tokens + last.tokens if last else held
