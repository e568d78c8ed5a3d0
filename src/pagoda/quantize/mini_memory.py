"""What a user tells Pagoda mini about themselves, and asks for later in the same conversation."""

from dataclasses import dataclass
from random import Random

from pagoda.quantize import mini_world as world
from pagoda.quantize.mini_exchanges import TALK, Exchange, exchange, rough

FORGOTTEN = {language: phrases["forgotten"] for language, phrases in TALK["memory"].items()}
_AGES = [str(age) for age in range(6, 90)]
_VALUES = {
    "en": {"name": world.NAMES, "city": world.CITIES, "job": world.JOBS, "age": _AGES},
    "zh": {"name": world.NAMES_ZH, "city": world.CITIES_ZH, "age": _AGES},
}


@dataclass(frozen=True)
class Topic:
    """What may be told. The phrases are format strings over `topic`, its word, and `value`, one of its values."""

    word: str
    values: list[str]
    tell: list[str]
    reply: str
    asks: list[str]
    answer: str


def _topics(language: str) -> dict[str, Topic]:
    phrases, ending = TALK["memory"][language], "" if language == "en" else "_zh"
    topics = {topic: Topic(topic, values, **phrases[topic]) for topic, values in _VALUES[language].items()}
    for topic, thing in world.FAVORITES.items():
        word = topic if language == "en" else thing["zh"]
        topics[topic] = Topic(word, thing["examples" + ending], **phrases["favorite"])
    return topics


TOPICS = {language: _topics(language) for language in TALK["memory"]}


def tell(rng: Random, memory: dict[str, str], language: str) -> Exchange:
    """The user states something; `memory` (topic -> value) keeps it."""
    name = rng.choice(sorted(TOPICS[language]))
    topic = TOPICS[language][name]
    memory[name] = rng.choice(topic.values)
    words = {"topic": topic.word, "value": memory[name]}
    return exchange("tell", rng.choice(topic.tell).format_map(words), topic.reply.format_map(words))


def recall(rng: Random, memory: dict[str, str], language: str) -> Exchange:
    """The user asks for something that was told, or (one time in eight) perhaps was not."""
    told = bool(memory) and rng.random() < 0.875
    name = rng.choice(sorted(memory if told else TOPICS[language]))
    topic = TOPICS[language][name]
    words = {"topic": topic.word, "value": memory.get(name)}
    answer = topic.answer.format_map(words) if name in memory else FORGOTTEN[language]
    return exchange("memory", rough(rng, rng.choice(topic.asks).format_map(words)), answer)
