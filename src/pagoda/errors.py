"""The one error tree. `raise` these for a user's mistake or a failing world; `assert` is for our own mistakes.

Every message is one sentence that says what is wrong and how to mend it. The command line prints it and leaves with
`exit_code`; the API server answers `http_status` with the message in the body of the API family.
"""


class PagodaError(Exception):
    """Root of every error that Pagoda raises on purpose."""

    http_status = 500
    exit_code = 1
    kind = "internal_error"


class UsageError(PagodaError):
    """The caller asked for something that cannot be done as asked."""

    http_status = 400
    exit_code = 2
    kind = "invalid_request_error"


class ConfigError(UsageError):
    """A knob has an unknown name or a value out of range."""


class ModelError(UsageError):
    """The checkpoint's architecture or configuration cannot be run."""


class CheckpointError(UsageError):
    """A checkpoint folder or file is missing, incomplete or damaged."""


class WorkspaceError(UsageError):
    """A converted workspace cannot be used, or must not be overwritten."""


class TokenizerError(UsageError):
    """The tokenizer's files are missing or not understood."""


class TemplateError(UsageError):
    """A chat template is missing, unknown, or refuses the messages."""


class DeviceError(UsageError):
    """The machine lacks the device, the number of devices or the memory that was asked for."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed; the message names the extra."""


class RequestError(UsageError):
    """One request's field is wrong. `param` names the field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt leaves no room for a single new token in the session."""


class BodyTooLargeError(RequestError):
    """The request's body is larger than the server reads."""

    http_status = 413


class MediaTypeError(RequestError):
    """The body is not of a type that the server reads."""

    http_status = 415


class SlowRequestError(RequestError):
    """The client did not finish its request in time."""

    http_status = 408


class GrammarError(RequestError):
    """A schema, expression or grammar was refused by the grammar library."""


class AuthenticationError(UsageError):
    """The key is missing or wrong."""

    http_status = 401
    kind = "authentication_error"


class NotFoundError(UsageError):
    """No such model, session or request."""

    http_status = 404
    kind = "not_found_error"


class SessionExpiredError(NotFoundError):
    """The session was forgotten since its last turn; told once, then the id is free for a new one."""


class SessionBusyError(UsageError):
    """A session answers one turn at a time."""

    http_status = 409
    kind = "conflict_error"


class RateLimitError(UsageError):
    """A key used up its own share."""

    http_status = 429
    kind = "rate_limit_error"


class EngineError(PagodaError):
    """The engine failed while it worked on a request."""


class OverloadedError(EngineError):
    """The queue is full. `retry_after` is in seconds."""

    http_status = 503
    kind = "overloaded_error"

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(EngineError):
    """The engine process is gone, or is shutting down."""

    http_status = 503
    kind = "unavailable_error"


def named_error(name: str, message: str) -> PagodaError:
    """The error of this tree with that class name, or an `EngineError`."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, PagodaError):
        return kind(message)
    return EngineError(message)
