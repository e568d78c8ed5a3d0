"""Exchanges that Pagoda mini can be asked for: each maker turns a random generator into an exchange whose last reply is right or wrong.

Torch-free and deterministic. `mini_tasks` composes exchanges into dialogues (training) and questions (evaluation).
"""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from pagoda.quantize import mini_talk as talk
from pagoda.quantize import mini_world as world

Message = dict[str, Any]


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
        text = rng.choice(("Please tell me: ", "Hey, ", "Hello! ", "So, ", "ok, ", "One question: ")) + text
    return text or "?"


# arithmetic ---------------------------------------------------------------------------------------------------------

_WRAPS = ("{}", "{}", "{}", "{}?", "{} = ?", "{}=", "{} =", "{}=?", "What is {}?", "What's {}?", "what is {}", "How much is {}?", "Calculate {}.",
    "Compute {}", "Can you tell me what {} is?", "{}等于多少？", "{}是多少？", "{}等于几？", "calculate {}", "whats {}", "{} is?", "Hi, what is {}?")  # fmt: skip
_SIGNS = {
    "+": ("{a}+{b}", "{a} + {b}", "{a} + {b}", "{a} plus {b}", "{a}加{b}", "{a}+ {b}", "the sum of {a} and {b}"),
    "-": ("{a}-{b}", "{a} - {b}", "{a} - {b}", "{a} minus {b}", "{a}减{b}", "{a} -{b}", "the difference of {a} and {b}"),
    "*": ("{a}*{b}", "{a} * {b}", "{a} * {b}", "{a} times {b}", "{a}乘以{b}", "{a} x {b}", "{a}x{b}", "{a} × {b}", "the product of {a} and {b}"),
    "/": ("{a}/{b}", "{a} / {b}", "{a} divided by {b}", "{a}除以{b}", "{a} ÷ {b}"),
}  # fmt: skip
_SHOW = ("Show the steps: {}", "{}, step by step", "Show your work: {}", "{}. Show the working.", "Explain how to compute {}.",
    "How do you calculate {}?", "请写出步骤：{}", "Work out {} step by step.", "Show me how to solve {}")  # fmt: skip


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
        ask = rng.choice(_WRAPS).format(rng.choice(_SIGNS[sign]).format(a=a, b=b))
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
    ask = rng.choice(_SHOW).format(rng.choice(_SIGNS[sign][:4]).format(a=a, b=b))
    return exchange("working", ask, " = ".join(steps))


def _compare(rng: Random) -> Exchange:
    a, b = _number(rng), _number(rng)
    while a == b:
        b = _number(rng)
    word = rng.choice(("larger", "smaller"))
    best = max(a, b) if word == "larger" else min(a, b)
    ask = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "What is {w}, {a} or {b}?"))
    return exchange("compare", rough(rng, ask.format(w=word, a=a, b=b)), f"{best} is {word}.")


# words --------------------------------------------------------------------------------------------------------------


def _sort(rng: Random) -> Exchange:
    if rng.random() < 0.5:
        words = rng.sample(world.WORDS, rng.randrange(2, 7))
        ask = rng.choice(("Sort these words: {}", "Sort the words {}", "Put these words in alphabetical order: {}",
            "Alphabetize: {}", "Please sort: {}", "把这些词按字母顺序排列：{}"))  # fmt: skip
        return exchange("sort", ask.format(", ".join(words)), ", ".join(sorted(words)))
    numbers = rng.sample(range(100) if rng.random() < 0.7 else range(1000), rng.randrange(2, 7))
    down = rng.random() < 0.35
    if down:
        asks = (
            "Sort these numbers from largest to smallest: {}",
            "Sort in descending order: {}",
            "把这些数从大到小排列：{}",
        )
    else:
        asks = (
            "Sort these numbers: {}",
            "Sort from smallest to largest: {}",
            "Sort in ascending order: {}",
            "sort {}",
            "把这些数从小到大排列：{}",
        )
    text = ", ".join(map(str, numbers))
    return exchange("sort", rng.choice(asks).format(text), ", ".join(map(str, sorted(numbers, reverse=down))))


def _count(rng: Random) -> Exchange:
    dice, word = rng.random(), rng.choice(world.WORDS)
    if dice < 0.35:
        ask = rng.choice(
            (
                "How many letters are in the word {}?",
                "How many letters does {} have?",
                "Count the letters in {}.",
                "{}有几个字母？",
            )
        )
        return exchange("count", rough(rng, ask.format(word)), f"The word {word} has {len(word)} letters.")
    if dice < 0.65:
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeiourstlnm")
        n = word.count(letter)
        ask = rng.choice(
            (
                "How many times does the letter {l} appear in {w}?",
                "How many {l}'s are in {w}?",
                "Count the letter {l} in {w}.",
            )
        )
        reply = f"The letter {letter} appears {n} time{'' if n == 1 else 's'} in {word}."
        return exchange("count", ask.format(l=letter, w=word), reply)
    words = rng.choices(world.WORDS, k=rng.randrange(1, 11))
    ask = rng.choice(("How many words are here: {}", "Count the words: {}", "How many words: {}", "数一数有几个词：{}"))
    reply = "There is 1 word." if len(words) == 1 else f"There are {len(words)} words."
    return exchange("count", ask.format(" ".join(words)), reply)


def _reverse(rng: Random) -> Exchange:
    dice, word = rng.random(), rng.choice(world.WORDS)
    if dice < 0.4:
        ask = rng.choice(
            (
                "Reverse the word {}.",
                "Spell {} backwards.",
                "Write {} backwards",
                "What is {} backwards?",
                "reverse {}",
                "把{}倒过来写。",
            )
        )
        return exchange("reverse", rough(rng, ask.format(word)), "-".join(reversed(word)))
    if dice < 0.65:
        ask = rng.choice(
            ("Spell the word {}.", "How do you spell {}?", "spell {}", "Spell {} letter by letter.", "{}怎么拼写？")
        )
        return exchange("reverse", rough(rng, ask.format(word)), "-".join(word))
    words = rng.sample(world.WORDS, rng.randrange(2, 7))
    ask = rng.choice(
        (
            "Reverse the order of these words: {}",
            "Reverse this list: {}",
            "Write these words in reverse order: {}",
            "把这些词倒序排列：{}",
        )
    )
    return exchange("reverse", ask.format(", ".join(words)), ", ".join(reversed(words)))


# sentences ----------------------------------------------------------------------------------------------------------

_PEOPLE = (
    "{name} is {age} years old and lives in {city}. {name} works as a {job}.", "My friend {name}, a {job}, is {age} and comes from {city}.",
    "{name} ({age}) is a {job} in {city}.", "In {city} I met {name}, a {age} year old {job}.", "The {job} {name} from {city} turned {age} today.",
    "{name} lives in {city}, is {age} years old, and is a {job}.", "A {job} called {name}, aged {age}, moved to {city}.",
)  # fmt: skip
_ORDERS = (
    "I would like to buy {quantity} {item}s for {price} dollars.", "Please send {quantity} {item}s at {price} dollars.", "The order is {quantity} {item}s, price {price} dollars.",
    "She paid {price} dollars for {quantity} {item}s.", "{quantity} {item}s cost {price} dollars.",
)  # fmt: skip
_MEETINGS = (
    "The {event} is on {day} at {time}.", "Come to the {event} on {day}, {time}.", "On {day} at {time} there is a {event}.", "We moved the {event} to {day} at {time}.",
)  # fmt: skip
_PEOPLE_ZH = (
    "{姓名}今年{年龄}岁，住在{城市}。",
    "我的朋友{姓名}住在{城市}，{年龄}岁。",
    "{年龄}岁的{姓名}来自{城市}。",
)
_ITEMS = tuple("apple book lamp chair pencil cup candle hat kite bottle spoon ticket ring drum basket flower".split())
_EVENTS = tuple("meeting concert party lesson dinner market game wedding".split())
_DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())


def _extract(rng: Random) -> Exchange:
    kind, chinese = rng.random(), False
    values: dict[str, str | int]
    if kind < 0.45:
        values = {
            "name": rng.choice(world.NAMES),
            "age": rng.randrange(5, 100),
            "city": rng.choice(world.CITIES),
            "job": rng.choice(world.JOBS),
        }
        sentence = rng.choice(_PEOPLE)
    elif kind < 0.65:
        values = {"item": rng.choice(_ITEMS), "quantity": rng.randrange(2, 100), "price": rng.randrange(1, 1000)}
        sentence = rng.choice(_ORDERS)
    elif kind < 0.85:
        values = {
            "event": rng.choice(_EVENTS),
            "day": rng.choice(_DAYS),
            "time": f"{rng.randrange(24)}:{rng.randrange(0, 60, 5):02d}",
        }
        sentence = rng.choice(_MEETINGS)
    else:
        values = {
            "姓名": rng.choice(world.NAMES_ZH),
            "年龄": rng.randrange(5, 100),
            "城市": rng.choice(world.CITIES_ZH),
        }
        sentence, chinese = rng.choice(_PEOPLE_ZH), True
    fields = rng.sample(sorted(values), rng.randrange(1, len(values) + 1))
    if chinese:
        ask = rng.choice(("提取{f}，输出JSON：{s}", "请把{f}提取为JSON：{s}")).format(
            f="、".join(fields), s=sentence.format_map(values)
        )
    else:
        named = fields[0] if len(fields) == 1 else ", ".join(fields[:-1]) + " and " + fields[-1]
        ask = rng.choice(("Extract the {f} as JSON: {s}", "Give me the {f} as JSON. {s}", "Return JSON with the {f}: {s}",
            "Read the {f} from this sentence and answer in JSON: {s}", "{s}\nExtract {f} as JSON.")).format(f=named, s=sentence.format_map(values))  # fmt: skip
    return exchange("extract", ask, json.dumps({field: values[field] for field in fields}, ensure_ascii=False))


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
    asks, reply = rng.choice(talk.IDENTITY)
    return exchange("identity", rough(rng, rng.choice(asks)), reply)


_ONSETS = tuple("b bl br c d dr f fl g gl gr h j k kl l m n p pl qu r s sk sn st t tr v w z zw".split())
_VOWELS = tuple("a e i o u oo ee ai".split())
_CODAS = ("", "", "n", "r", "l", "x", "rk", "mp", "sh", "nd", "g", "t")
_KNOWN = frozenset(cell.lower() for relation in world.RELATIONS for row in relation.rows for cell in row)
_GLYPHS = "卡多比鲁塔姆尼佐罗克里贝萨丁格莫皮伦"


def _strange(rng: Random) -> str:
    """A name that the world does not know: invented, or real and left out."""
    if rng.random() < 0.2:
        return rng.choice(talk.UNKNOWN_THINGS)
    while True:
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
        )
        if len(word) > 3 and word not in _KNOWN:
            break
    dice = rng.random()
    if dice < 0.2:
        return f"{rng.choice(world.NAMES)} {word.capitalize()}"
    return word.capitalize() if dice < 0.65 else word


def _unknown(rng: Random) -> Exchange:
    if rng.random() < 0.75:
        ask = (
            rng.choice(talk.UNKNOWN_WHOLE)
            if rng.random() < 0.12
            else rng.choice(talk.UNKNOWN_ASKS).format(x=_strange(rng))
        )
        return exchange("unknown", rough(rng, ask), talk.UNKNOWN)
    name = "".join(rng.choices(_GLYPHS, k=rng.randrange(2, 5)))
    ask = rng.choice(talk.UNKNOWN_WHOLE_ZH) if rng.random() < 0.15 else rng.choice(talk.UNKNOWN_ASKS_ZH).format(x=name)
    return exchange("unknown", rough(rng, ask), talk.UNKNOWN_ZH)


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
