"""What a user tells Pagoda mini about themselves, and asks for later in the same conversation."""

from random import Random

from pagoda.quantize import mini_world as world
from pagoda.quantize.mini_exchanges import Exchange, exchange, rough

#: topic -> (values, ways to say it, answer at once, ways to ask, answer later); "favorite" topics are built below
Topic = tuple[tuple[str, ...], tuple[str, ...], str, tuple[str, ...], str]
FORGOTTEN = {"en": "You have not told me that yet.", "zh": "你还没有告诉我。"}

_EN: dict[str, Topic] = {
    "name": (world.NAMES, ("My name is {}.", "I am {}.", "I'm {}", "Call me {}.", "Hello, my name is {}.", "Hi, I am {}!", "my name is {}",
        "You can call me {}."), "Nice to meet you, {}!", ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
        "Tell me my name.", "whats my name"), "Your name is {}."),
    "city": (world.CITIES, ("I live in {}.", "My home is in {}.", "I am from {}.", "I come from {}."), "{} is a fine place to live.",
        ("Where do I live?", "Which city do I live in?", "Where am I from?", "Do you remember where I live?"), "You live in {}."),
    "job": (world.JOBS, ("I work as a {}.", "My job is {}.", "I am a {} by trade."), "Being a {} sounds interesting.",
        ("What is my job?", "What do I do for work?", "What do I work as?"), "You work as a {}."),
    "age": (tuple(map(str, range(6, 90))), ("I am {} years old.", "My age is {}.", "I'm {} years old"), "Thank you, I will remember that you are {}.",
        ("How old am I?", "What is my age?", "Do you remember my age?"), "You are {} years old."),
}  # fmt: skip
_ZH: dict[str, Topic] = {
    "name": (world.NAMES_ZH, ("我叫{}。", "我的名字是{}。", "我是{}。", "你好，我叫{}。", "你可以叫我{}"), "很高兴认识你，{}！",
        ("我叫什么名字？", "我的名字是什么？", "你记得我的名字吗？", "我是谁？", "我叫什么"), "你叫{}。"),
    "city": (world.CITIES_ZH, ("我住在{}。", "我的家在{}。", "我来自{}。"), "{}是个好地方。", ("我住在哪里？", "我家在哪里？", "我来自哪里？"), "你住在{}。"),
    "age": (tuple(map(str, range(6, 90))), ("我今年{}岁。", "我{}岁了。"), "好的，我记住了，你{}岁。", ("我几岁了？", "我今年多大？"), "你{}岁。"),
}  # fmt: skip
for _topic, (_values, _word, _values_zh) in world.FAVOURITES.items():
    _EN[_topic] = (
        _values,
        (f"My favorite {_topic} is {{}}.", f"my favorite {_topic} is {{}}", f"I like {{}} best as a {_topic}.", f"Remember that my favorite {_topic} is {{}}."),
        f"I will remember that your favorite {_topic} is {{}}.",
        (f"What is my favorite {_topic}?", f"Which {_topic} do I like best?", f"Do you remember my favorite {_topic}?", f"what's my favorite {_topic}?"),
        f"Your favorite {_topic} is {{}}.",
    )  # fmt: skip
    _ZH[_topic] = (
        _values_zh,
        (f"我最喜欢的{_word}是{{}}。", f"请记住，我最喜欢的{_word}是{{}}。"),
        f"好的，我记住了，你最喜欢的{_word}是{{}}。",
        (f"我最喜欢的{_word}是什么？", f"我最喜欢什么{_word}？", f"你记得我最喜欢的{_word}吗？"),
        f"你最喜欢的{_word}是{{}}。",
    )
TOPICS = {"en": _EN, "zh": _ZH}


def tell(rng: Random, memory: dict[str, str], language: str, topic: str | None = None) -> Exchange:
    """The user states something; `memory` (topic -> value) keeps it."""
    topic = topic or rng.choice(sorted(TOPICS[language]))
    values, ways, reply, _, _ = TOPICS[language][topic]
    memory[topic] = rng.choice(values)
    return exchange("tell", rng.choice(ways).format(memory[topic]), reply.format(memory[topic]))


def recall(rng: Random, memory: dict[str, str], language: str) -> Exchange:
    """The user asks for something that was told, or (one time in eight) perhaps was not."""
    told = bool(memory) and rng.random() < 0.875
    topic = rng.choice(sorted(memory if told else TOPICS[language]))
    _, _, _, asks, reply = TOPICS[language][topic]
    answer = reply.format(memory[topic]) if topic in memory else FORGOTTEN[language]
    return exchange("memory", rough(rng, rng.choice(asks)), answer)
