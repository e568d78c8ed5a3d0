"""Jinja's immutable sandbox, with bounds on the time of a template and on the size of the values that it makes.

Bounded: every call, every turn of a loop and every piece of output ends when the time is over; `*`, `**`, `+`, `~`,
`%`, the methods and filters of `PLACES` and `join` make no value of more than `MAX_CHARS` characters or items. Not
bounded: how many such values a template keeps while its time lasts, and what one filter does with one value (printing
lists that hold each other, formatting fields of its arguments). So whoever serves a checkpoint still trusts its
template with the process's memory.
"""

import functools
import math
import re
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pagoda.errors import TemplateError

MAX_CHARS = 16 << 20
MAX_SECONDS = 5.0
MAX_EXPONENT = 1024
UNTIL = "the end"  # no template can spell this name, nor set it
CHECK, CONCAT = "check the time", "concatenate"  # nor these filters' names
PLACES: dict[str, Callable[[str, Any], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "batch", "slice"), lambda text, first: 1),
    "expandtabs": lambda text, first: text.count("\t"),
    "indent": lambda text, first: text.count("\n") + 1,
    "wordwrap": lambda text, first: len(text),
    "replace": lambda text, first: text.count(str(first)),
    "format": lambda text, first: text.count("{") + text.count("%"),
    "format_map": lambda text, first: text.count("{"),
    "round": lambda text, first: MAX_CHARS // MAX_EXPONENT,
    "tojson": lambda text, first: MAX_CHARS // 64,
}
"""At how many places a method or filter of this name can put the longest or largest of its arguments into a text."""


def check_time(until: float) -> None:
    if time.monotonic() > until:
        raise TemplateError(f"The chat template took longer than {MAX_SECONDS:g} s.")


def _check_size(size: float) -> None:
    if size > MAX_CHARS:
        raise TemplateError("The chat template makes numbers, lists or texts that are too large.")


def _extent(value: Any) -> float:
    return len(value) if hasattr(value, "__len__") else abs(value) if isinstance(value, int | float) else 0


def _check_growth(name: str, text: Any, arguments: Iterable[Any]) -> None:
    """`text.name(*arguments)`, or the filter of that name, stays small."""
    given = list(arguments)
    sizes = [0.0, *map(_extent, given)]
    words = text if isinstance(text, str) else ""
    if name.startswith("format"):  # widths stand in the text
        sizes += [float(digits) for digits in re.findall(r"\d+", words)]
    _check_size(len(words) + PLACES[name](words, given[0] if given else "") * max(sizes))


def _bounded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    skipped = int(hasattr(filter, "jinja_pass_arg"))  # a context comes first

    @functools.wraps(filter)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_growth(name, args[skipped], [*args[skipped + 1 :], *kwargs.values()])
        return filter(*args, **kwargs)

    return checked


def _bounded_join(join: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(join)
    def checked(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        items = list(value)
        _check_size(sum(len(i) for i in items if isinstance(i, str)) + len(items) * _extent(d))
        return join(context, items, d, attribute)

    return checked


@pass_context
def _check(context: Any, value: None) -> None:
    check_time(context.get(UNTIL, math.inf))


def _concatenate(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _Checks(NodeTransformer):
    """Every turn of a loop looks at the clock, every concatenation at its length."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        check = nodes.Filter(nodes.Const(None), CHECK, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(check, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, CONCAT, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. A render ends at the time (of `time.monotonic`) that its values hold under `UNTIL`."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def bound_filters(self) -> None:
        """To be called when all filters are there."""
        self.filters |= {name: _bounded(name, self.filters[name]) for name in PLACES if name in self.filters}
        self.filters |= {"join": _bounded_join(self.filters["join"]), CHECK: _check, CONCAT: _concatenate}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Checks().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        check_time(context.get(UNTIL, math.inf))
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        if isinstance(method, types.BuiltinMethodType) and isinstance(method.__self__, str):
            if method.__name__ == "join":
                args = tuple(list(values) for values in args)
                _check_size(sum(_extent(v) + len(method.__self__) for values in args for v in values))
            elif method.__name__ in PLACES:
                _check_growth(method.__name__, method.__self__, [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            values = right.values() if isinstance(right, dict) else right if isinstance(right, tuple) else [right]
            _check_growth("format", left, values)
        elif operator == "**":
            _check_size(max(_extent(left), _extent(right)) * (MAX_CHARS // MAX_EXPONENT))
        elif operator == "*":
            _check_size(_extent(left) * _extent(right))
        elif operator == "+" and hasattr(left, "__len__"):
            _check_size(_extent(left) + _extent(right))
        return super().call_binop(context, operator, left, right)
