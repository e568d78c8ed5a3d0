"""One answer made of all replicas' answers, for what concerns each of them: aborts, sessions, metrics."""

from collections.abc import Mapping, Sequence
from typing import Any


def concerns_all(method: str, path: str) -> bool:
    """Whether every replica must be asked: nobody else knows which of them holds the answer or session."""
    if method == "DELETE":
        return path.startswith("/v1/sessions/")
    return (method, path) in {("POST", "/abort"), ("POST", "/abort_request"), ("GET", "/v1/sessions"),
                              ("GET", "/metrics")}  # fmt: skip


def added_up(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers are added, lists joined; the rest is the first one's."""
    made = dict(answers[0])
    for answer in answers[1:]:
        for name, value in answer.items():
            if isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool)):
                made[name] = made[name] + value
    return made


def one_page(pages: Mapping[str, str]) -> str:
    """Prometheus pages by replica as one: the label `engine` tells them apart; a metric's lines stand together."""
    metrics: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for replica, page in pages.items():
        for line in page.splitlines():
            if line.startswith("# HELP "):
                head = line
            elif line.startswith("# TYPE "):
                kinds[head] = line
            else:
                metrics.setdefault(head, []).append(line.replace('engine="0"', f'engine="{replica}"', 1))
    return "".join("\n".join([head, kinds[head], *lines]) + "\n" for head, lines in metrics.items())
