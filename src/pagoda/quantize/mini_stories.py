"""Short stories from a grammar, in English and Chinese: the same seed tells the same story."""

from random import Random

from pagoda.quantize.mini_world import NAMES
from pagoda.toml_data import read_table

_DATA = read_table("quantize", "mini_stories")
_PHRASES, _SENTENCES = _DATA["phrases"], _DATA["sentences"]
TOPICS: list[str] = _PHRASES["animal"]
STORY_ASKS: list[str] = _DATA["asks"]
STORY_ASKS_ZH: list[str] = _DATA["asks_zh"]
TOPIC_ASKS: list[str] = _DATA["asks_about"]


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(rng: Random, topic: str | None = None) -> str:
    """An English story of seven to nine sentences; `topic`, one of `TOPICS`, becomes its animal."""
    animal = topic or rng.choice(TOPICS)
    thing, name, hero = rng.choice(_PHRASES["thing"]), rng.choice(NAMES), rng.choice(_PHRASES["hero"])
    trouble, wonder = rng.choice(_PHRASES["plight"])
    a_animal = with_article(animal)
    words = {
        "animal": animal, "a_animal": a_animal, "a_animal_cap": a_animal.capitalize(), "name": name, "hero": hero,
        "thing": thing, "it": "the " + thing.split(" ", 1)[1], "trouble": trouble, "wonder": wonder,
    }  # fmt: skip
    for kind in ("place", "mood", "find", "advice", "road", "work", "time"):
        words[kind] = rng.choice(_PHRASES[kind])
    middle = [rng.choice(_SENTENCES["need"]), rng.choice(_SENTENCES["turn"])]
    rng.shuffle(middle)
    ending = [rng.choice(_SENTENCES[part]) for part in ("open", "meet", "go", "do", "end")]
    plan = [ending[0], *middle, *ending[1:]]
    sentences = [part.format_map(words) for part in plan]
    cut = rng.choice((3, 4))
    return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])


def story_zh(rng: Random) -> str:
    words = {kind: rng.choice(choices) for kind, choices in _DATA["zh"]["phrases"].items()}
    words["end"] = words["end"].format_map(words)
    return _DATA["zh"]["story"].format_map(words)
