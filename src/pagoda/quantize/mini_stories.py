"""Short stories from a grammar, in English and Chinese: the same seed tells the same story."""

from random import Random

from pagoda.quantize.mini_world import NAMES

_HEROES = ("baker", "fisher", "gardener", "lamp lighter", "young painter", "clock maker", "shepherd", "ferry woman", "map maker",
    "bell ringer", "carpenter", "librarian", "tailor", "kite maker", "beekeeper", "potter")  # fmt: skip
_ANIMALS = ("fox", "owl", "cat", "heron", "hedgehog", "old dog", "crow", "turtle", "mouse", "goat", "hare", "wren")
_PLACES = ("a village by the sea", "a town of narrow streets", "a valley where the fog came every evening", "the last house before the forest",
    "a harbor full of blue boats", "a city built on seven hills", "an island with one tree", "a mill beside a slow river",
    "a mountain village under the snow", "a garden behind a high wall")  # fmt: skip
_MOODS = ("curious", "patient", "quiet", "stubborn", "cheerful", "shy", "brave", "gentle", "clever", "forgetful")
_THINGS = ("a silver key", "a lantern", "an old map", "a wooden box", "a letter without a name", "a small bell", "a blue feather",
    "a broken clock", "a seed as big as a fist", "a red umbrella", "a stone that hummed", "a page of music")  # fmt: skip
_FINDS = ("under the stairs", "at the bottom of the well", "in the pocket of a coat", "between two old books", "on the doorstep",
    "in the roots of a tree", "behind the kitchen clock", "in the sand after the storm")  # fmt: skip
_PLIGHTS = (
    ("the well had run dry", "water began to run between the stones"), ("the tower bell had lost its voice", "the bell rang by itself, clear and low"),
    ("the winter would not end", "the snow turned into white flowers"), ("the bridge had been washed away", "a bridge of branches reached the other side"),
    ("no ship could find the harbor at night", "a hundred small boats came home"), ("the bees had left the orchard", "the bees came back, humming like summer"),
    ("the children could not sleep", "the children slept, all of them, with a smile"), ("the mill wheel stood still", "the mill wheel turned again"),
    ("every lamp in the street had gone out", "a warm light filled the whole street"), ("nobody remembered the old songs", "the old songs were whole again"),
)  # fmt: skip
_ADVICE = ("Go slowly, and look twice", "What is lost is often near", "Ask the river, it has seen everything", "Begin with the smallest thing",
    "Take bread for two", "Listen before you knock", "The longest road starts at your own door", "Trust the wind until noon")  # fmt: skip
_ROADS = ("over the hill and through the wet grass", "along the river until the stars came out", "up nine hundred steps of stone",
    "across the frozen lake", "through the forest, counting the trees", "down to the sea, where the boats slept",
    "past the last lamp, into the dark", "from door to door, asking everyone")  # fmt: skip
_WORKS = ("worked all night", "tried once, and failed, and tried again", "sat down and thought for a long time", "sang very softly",
    "dug where the ground was soft", "climbed to the very top", "mended what was broken, piece by piece", "waited until the moon rose")  # fmt: skip
_ENDS = ("From that day on, {the} kept a place at the table for the {animal}.", "And if you pass by there, you can still see the light in the window.",
    "{name} never told how it was done, and nobody asked.", "The {animal} only smiled, as such animals do.",
    "That evening the whole place danced, and {name} danced longest.", "{name} put {it} back where it had been found, for the next one.",
    "And {name} slept well, for the first time in a year.", "Some say it was luck. The {animal} knows better.")  # fmt: skip
_OPENS = ("Once upon a time there was a {mood} {hero} named {name} who lived in {place}.", "In {place} there lived a {mood} {hero} called {name}.",
    "Long ago, in {place}, people knew a {hero} named {name}, who was very {mood}.", "{name} was a {mood} {hero} and lived in {place}.")  # fmt: skip
_TURNS = (
    "One {time} {name} found {thing} {find}.",
    "One {time}, {find}, {name} found {thing}.",
    "Then one {time} {name} found {thing} {find}.",
)
_NEEDS = (
    "At that time {trouble}, and everyone was worried.",
    "It was the year when {trouble}.",
    "Everyone was sad, because {trouble}.",
)
_MEETS = ('On the way {name} met {a_animal}. "{advice}," said the {animal}.', 'There sat {a_animal}. "{advice}," it said, and came along.',
    '{a_animal_cap} was watching from the wall. "{advice}," it told {name}.')  # fmt: skip
_GOES = ("So {name} went {road}.", "{name} took {it} and went {road}.", "They went together {road}.")
_DOES = (
    "There {name} {work}, and at last {wonder}.",
    "{name} {work}. Nothing happened. Then, all at once, {wonder}.",
    "{name} {work}, until {wonder}.",
)
_TIMES = ("morning", "evening", "rainy day", "night", "spring morning", "autumn evening")

_ZH = {
    "name": ("小明", "小红", "阿宝", "小雨", "小雪", "老王"), "hero": ("面包师", "渔夫", "园丁", "画家", "牧羊人", "木匠"),
    "place": ("海边的村庄", "山里的小镇", "河边的磨坊", "一座古老的塔下", "森林旁的小屋"), "animal": ("狐狸", "猫头鹰", "乌龟", "小鸟", "白猫"),
    "thing": ("一把银钥匙", "一盏灯", "一张旧地图", "一封没有名字的信", "一颗很大的种子"), "trouble": ("井里没有水了", "冬天一直不走", "桥被水冲走了", "晚上没有了灯"),
    "advice": ("慢慢走，仔细看", "先听，再敲门", "从最小的事开始", "问问那条河吧"), "wonder": ("温暖的光照亮了山谷", "水又流了出来", "雪变成了白色的花", "一扇门打开了"),
    "end": ("从那天起，他们成了好朋友。", "那天晚上，大家都高兴地跳舞。", "如果你路过那里，还能看见窗里的灯。", "{name}睡得很香。"),
}  # fmt: skip
_ZH_STORY = (
    "从前，在{place}，有一个{hero}叫{name}。那一年，{trouble}，大家都很着急。一天早上，{name}找到了{thing}。"
    "路上遇见了{animal}，它说：“{advice}。”于是{name}走了很远的路，试了一次又一次，终于{wonder}。{end}"
)


def story(rng: Random, topic: str | None = None) -> str:
    """An English story of seven to nine sentences; `topic`, one of `TOPICS`, becomes its animal."""
    animal, thing, name, hero = (
        topic or rng.choice(_ANIMALS),
        rng.choice(_THINGS),
        rng.choice(NAMES),
        rng.choice(_HEROES),
    )
    trouble, wonder = rng.choice(_PLIGHTS)
    article = "an" if animal[0] in "aeiou" else "a"
    words = {
        "animal": animal, "a_animal": f"{article} {animal}", "a_animal_cap": f"{article.capitalize()} {animal}", "thing": thing,
        "it": "the " + thing.split(" ", 1)[1], "name": name, "hero": hero, "the": f"the {hero}", "place": rng.choice(_PLACES),
        "mood": rng.choice(_MOODS), "find": rng.choice(_FINDS), "trouble": trouble, "advice": rng.choice(_ADVICE),
        "road": rng.choice(_ROADS), "work": rng.choice(_WORKS), "wonder": wonder, "time": rng.choice(_TIMES),
    }  # fmt: skip
    middle = [rng.choice(_NEEDS), rng.choice(_TURNS)]
    rng.shuffle(middle)
    plan = [rng.choice(_OPENS), *middle, rng.choice(_MEETS), rng.choice(_GOES), rng.choice(_DOES), rng.choice(_ENDS)]
    sentences = [part.format_map(words) for part in plan]
    cut = rng.choice((3, 4))
    return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])


def story_zh(rng: Random) -> str:
    words = {key: rng.choice(choices) for key, choices in _ZH.items()}
    words["end"] = words["end"].format_map(words)
    return _ZH_STORY.format_map(words)


TOPICS = _ANIMALS
STORY_ASKS = ("Tell me a story", "Tell me a story.", "tell me a story please", "Can you tell me a story?", "Please tell me a short story.",
    "A story, please!", "I want to hear a story.", "story", "Write a short story.", "Once upon a time", "Tell me another story.",
    "tell a story", "Write me a story", "Do you know a story?")  # fmt: skip
TOPIC_ASKS = (
    "Tell me a story about {a}.",
    "Write a story about {a}.",
    "Can you tell me a story about {a}?",
    "a story about {a} please",
)
STORY_ASKS_ZH = ("讲个故事", "给我讲个故事", "讲一个故事吧。", "请给我讲一个故事。", "我想听故事", "再讲一个故事")
