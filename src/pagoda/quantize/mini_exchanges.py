"""Exchanges that Pagoda mini can be asked for: each maker turns a random generator into an exchange whose last reply is
right or wrong. Their words are in `mini_exchanges.toml` and `mini_talk.toml`.

Torch-free and deterministic. `mini_tasks` composes exchanges into dialogues (training) and questions (evaluation).
"""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from pagoda.quantize import mini_world as world
from pagoda.toml_data import read_table

Message = dict[str, Any]
TALK = read_table("quantize", "mini_talk")
_PHRASES = read_table("quantize", "mini_exchanges")


class Exchange(NamedTuple):
    """Messages from a user's turn to the reply that answers it; a tool call and its response may stand between."""

    task: str
    messages: list[Message]


def exchange(task: str, user: str, reply: str) -> Exchange:
    return Exchange(task, [{"role": "user", "content": user}, {"role": "assistant", "content": reply}])


def rough(rng: Random, text: str) -> str:
    """The same question as a hurried person types it: case, final punctuation and a courtesy may change."""
    dice = rng.random()
    if dice < 0.55:
        return text
    if dice < 0.75:
        text = text.lower()
    elif dice < 0.76:
        text = text.upper()
    if dice < 0.9:
        text = text.rstrip("?.!？。！")
    elif dice < 0.93:
        text = text + rng.choice(("!", "?", " ", "!!", "??"))
    elif dice < 0.96 and text.isascii():
        text = rng.choice(_PHRASES["courtesies"]) + text
    return text or "?"


# arithmetic ---------------------------------------------------------------------------------------------------------

_ARITHMETIC = _PHRASES["arithmetic"]


def _number(rng: Random) -> int:
    digits = rng.choice((1, 2, 2, 3, 3, 3))
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _sum_operands(rng: Random) -> tuple[int, int]:
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.15:  # sums beside a power of ten, where a carry runs through every digit
        power = rng.choice((10, 100, 1000))
        b = min(999, max(0, power - a % power + rng.randrange(-2, 3)))
    return a, b


def _operands(rng: Random, sign: str) -> tuple[int, int, int]:
    """Two operands and the result."""
    if sign == "+":
        a, b = _sum_operands(rng)
        return a, b, a + b
    if sign == "-":
        a, b = _sum_operands(rng)
        if rng.random() < 0.3:
            a = min(999, a + b)
        if a < b and rng.random() < 0.8:
            a, b = b, a
        return a, b, a - b
    if sign == "*":
        low = 10 if rng.random() < 0.8 else 0
        a, b = rng.randrange(low, 100), rng.randrange(10 if rng.random() < 0.7 else 0, 100)
        return a, b, a * b
    a, b = rng.randrange(0, 100), rng.randrange(1, 13)
    return a * b, b, a


def _arithmetic(task: str, sign: str) -> Callable[[Random], Exchange]:
    def make(rng: Random) -> Exchange:
        a, b, c = _operands(rng, sign)
        ask = rng.choice(_ARITHMETIC["asks"]).format(rng.choice(_ARITHMETIC["forms"][sign]).format(a=a, b=b))
        return exchange(task, ask, f"{a} {sign} {b} = {c}")

    return make


def _places(n: int) -> list[int]:
    """The decimal parts of a number, largest first: 305 -> [300, 0, 5]."""
    text = str(n)
    return [int(digit) * 10 ** (len(text) - 1 - i) for i, digit in enumerate(text)]


def _working(rng: Random) -> Exchange:
    """Sums are split by decimal places, products by the digits of the second factor."""
    if rng.random() < 0.6:
        a, b = rng.randrange(2, 100), rng.randrange(11, 100)
        tens, ones = b // 10 * 10, b % 10
        steps = [f"{a} * {b}", f"{a} * {tens} + {a} * {ones}", f"{a * tens} + {a * ones}", str(a * b)]
        sign = "*"
    else:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        pairs = list(zip(_places(a), _places(b)))
        split = " + ".join(f"{x} + {y}" for x, y in pairs)
        steps = [f"{a} + {b}", split, " + ".join(str(x + y) for x, y in pairs), str(a + b)]
        sign = "+"
    ask = rng.choice(_ARITHMETIC["show"]).format(rng.choice(_ARITHMETIC["forms"][sign][:4]).format(a=a, b=b))
    return exchange("working", ask, " = ".join(steps))


def _compare(rng: Random) -> Exchange:
    a, b = _number(rng), _number(rng)
    while a == b:
        b = _number(rng)
    word = rng.choice(("larger", "smaller"))
    best = max(a, b) if word == "larger" else min(a, b)
    ask = rng.choice(_PHRASES["compare"]["asks"])
    return exchange("compare", rough(rng, ask.format(w=word, a=a, b=b)), f"{best} is {word}.")


# words --------------------------------------------------------------------------------------------------------------


def _sort(rng: Random) -> Exchange:
    asks = _PHRASES["sort"]
    if rng.random() < 0.5:
        words = rng.sample(world.WORDS, rng.randrange(2, 7))
        return exchange("sort", rng.choice(asks["words"]).format(", ".join(words)), ", ".join(sorted(words)))
    numbers = rng.sample(range(100) if rng.random() < 0.7 else range(1000), rng.randrange(2, 7))
    down = rng.random() < 0.35
    ask = rng.choice(asks["down" if down else "up"]).format(", ".join(map(str, numbers)))
    return exchange("sort", ask, ", ".join(map(str, sorted(numbers, reverse=down))))


def _count(rng: Random) -> Exchange:
    asks = _PHRASES["count"]
    dice, word = rng.random(), rng.choice(world.WORDS)
    if dice < 0.35:
        ask = rough(rng, rng.choice(asks["letters"]).format(word))
        return exchange("count", ask, f"The word {word} has {len(word)} letters.")
    if dice < 0.65:
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeiourstlnm")
        n = word.count(letter)
        reply = f"The letter {letter} appears {n} time{'' if n == 1 else 's'} in {word}."
        return exchange("count", rng.choice(asks["letter"]).format(l=letter, w=word), reply)
    words = rng.choices(world.WORDS, k=rng.randrange(1, 11))
    reply = "There is 1 word." if len(words) == 1 else f"There are {len(words)} words."
    return exchange("count", rng.choice(asks["words"]).format(" ".join(words)), reply)


def _reverse(rng: Random) -> Exchange:
    asks = _PHRASES["reverse"]
    dice, word = rng.random(), rng.choice(world.WORDS)
    if dice < 0.4:
        return exchange("reverse", rough(rng, rng.choice(asks["word"]).format(word)), "-".join(reversed(word)))
    if dice < 0.65:
        return exchange("reverse", rough(rng, rng.choice(asks["spell"]).format(word)), "-".join(word))
    words = rng.sample(world.WORDS, rng.randrange(2, 7))
    return exchange("reverse", rng.choice(asks["words"]).format(", ".join(words)), ", ".join(reversed(words)))


# sentences ----------------------------------------------------------------------------------------------------------


def _stated(rng: Random) -> tuple[str, dict[str, str | int]]:
    """The kind of a sentence, and what it states."""
    words, dice = _PHRASES["extract"], rng.random()
    if dice < 0.45:
        name, age = rng.choice(world.NAMES), rng.randrange(5, 100)
        return "person", {"name": name, "age": age, "city": rng.choice(world.CITIES), "job": rng.choice(world.JOBS)}
    if dice < 0.65:
        item = rng.choice(words["items"])
        return "order", {"item": item, "quantity": rng.randrange(2, 100), "price": rng.randrange(1, 1000)}
    if dice < 0.85:
        event, day = rng.choice(words["events"]), rng.choice(words["days"])
        return "meeting", {"event": event, "day": day, "time": f"{rng.randrange(24)}:{rng.randrange(0, 60, 5):02d}"}
    name = rng.choice(world.NAMES_ZH)
    return "person_zh", {"姓名": name, "年龄": rng.randrange(5, 100), "城市": rng.choice(world.CITIES_ZH)}


def _extract(rng: Random) -> Exchange:
    kind, values = _stated(rng)
    sentence = rng.choice(_PHRASES["extract"][kind]).format_map(values)
    fields = rng.sample(sorted(values), rng.randrange(1, len(values) + 1))
    if kind == "person_zh":
        asks, named = _PHRASES["extract"]["asks_zh"], "、".join(fields)
    else:
        asks = _PHRASES["extract"]["asks"]
        named = fields[0] if len(fields) == 1 else ", ".join(fields[:-1]) + " and " + fields[-1]
    reply = json.dumps({field: values[field] for field in fields}, ensure_ascii=False)
    return exchange("extract", rng.choice(asks).format(f=named, s=sentence), reply)


# knowledge ----------------------------------------------------------------------------------------------------------


def _fact(language: str) -> Callable[[Random], Exchange]:
    relations = tuple(relation for relation in world.RELATIONS if relation.language == language)
    weights = [len(relation.rows) + 10 for relation in relations]

    def make(rng: Random) -> Exchange:
        relation = rng.choices(relations, weights)[0]
        values = dict(zip(relation.columns, rng.choice(relation.rows)))
        ask = rough(rng, _articles(rng.choice(relation.asks).format_map(values)))
        return exchange(f"facts_{language}", ask, _articles(relation.reply.format_map(values)))

    return make


def _articles(text: str) -> str:
    """Filled-in templates with a capital first and "an" before vowels."""
    text = re.sub(r"\b([Aa]) (?=[aeio]|hour)", r"\1n ", text)
    return text[0].upper() + text[1:]


def _identity(rng: Random) -> Exchange:
    known = rng.choice(TALK["identity"])
    return exchange("identity", rough(rng, rng.choice(known["asks"])), known["reply"])


_KNOWN = frozenset(cell.lower() for relation in world.RELATIONS for row in relation.rows for cell in row)


def _strange(rng: Random) -> str:
    """A name that the world does not know: invented, or real and left out."""
    if rng.random() < 0.2:
        return rng.choice(TALK["unknown"]["en"]["things"])
    parts = [_PHRASES["invented"][part] for part in ("onsets", "vowels", "codas")]
    while True:
        word = "".join(rng.choice(part) for _ in range(rng.choice((1, 2, 2, 3))) for part in parts)
        if len(word) > 3 and word not in _KNOWN:
            break
    dice = rng.random()
    if dice < 0.2:
        return f"{rng.choice(world.NAMES)} {word.capitalize()}"
    return word.capitalize() if dice < 0.65 else word


def _strange_zh(rng: Random) -> str:
    return "".join(rng.choices(_PHRASES["invented"]["glyphs"], k=rng.randrange(2, 5)))


def _unknown(rng: Random) -> Exchange:
    if rng.random() < 0.75:
        talk = TALK["unknown"]["en"]
        whole = rng.random() < 0.12
        ask = rng.choice(talk["whole"]) if whole else rng.choice(talk["asks"]).format(x=_strange(rng))
    else:
        talk, name = TALK["unknown"]["zh"], _strange_zh(rng)
        ask = rng.choice(talk["whole"]) if rng.random() < 0.15 else rng.choice(talk["asks"]).format(x=name)
    return exchange("unknown", rough(rng, ask), talk["reply"])


#: Tasks whose exchanges stand alone: name -> (maker, share in training). Memory and tools need a dialogue around them.
SINGLE: dict[str, tuple[Callable[[Random], Exchange], float]] = {
    "add": (_arithmetic("add", "+"), 9),
    "subtract": (_arithmetic("subtract", "-"), 10),
    "multiply": (_arithmetic("multiply", "*"), 10),
    "divide": (_arithmetic("divide", "/"), 4),
    "working": (_working, 5),
    "compare": (_compare, 2),
    "sort": (_sort, 9),
    "count": (_count, 7),
    "reverse": (_reverse, 7),
    "extract": (_extract, 7),
    "facts_en": (_fact("en"), 14),
    "facts_zh": (_fact("zh"), 9),
    "identity": (_identity, 5),
    "unknown": (_unknown, 7),
}
