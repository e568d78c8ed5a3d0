"""Dialogues and questions of the small world: training and evaluation draw from here with seeds that never meet.

A seed is a string; evaluation prefixes its own with `eval/`, training with `train/`, so no stream is shared.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from pagoda.quantize import mini_stories as stories
from pagoda.quantize.mini_exchanges import SINGLE, TALK, Exchange, Message, exchange, rough
from pagoda.quantize.mini_memory import recall, tell
from pagoda.quantize.mini_tools import make_tools, tool_exchange, tools_prompt

TASKS = (*SINGLE, "memory", "tool_call", "tool_answer")
_NAMES, _SHARES = tuple(SINGLE), tuple(share for _, share in SINGLE.values())
_SUMS = ("add", "subtract", "multiply", "multiply", "multiply", "divide")


@dataclass(frozen=True)
class Question:
    task: str
    messages: list[Message]
    answer: str

    def is_right(self, reply: str) -> bool:
        """To the letter, white space around it aside."""
        return reply.strip() == self.answer


@dataclass(frozen=True)
class TaskScore:
    task: str
    num_right: int
    num_asked: int

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        n, p, z = self.num_asked, self.accuracy, 1.96
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def small_talk(rng: Random) -> Exchange:
    topics = TALK["small_talk"]
    topic = rng.choice(topics[:3] + topics) if rng.random() < 0.7 else topics[0]
    return exchange("talk", rough(rng, rng.choice(topic["asks"])), rng.choice(topic["replies"]))


def tell_story(rng: Random) -> Exchange:
    if rng.random() < 0.25:
        return exchange("story", rough(rng, rng.choice(stories.STORY_ASKS_ZH)), stories.story_zh(rng))
    if rng.random() < 0.3:
        topic = rng.choice(stories.TOPICS)
        ask = rng.choice(stories.TOPIC_ASKS).format(a=stories.with_article(topic))
        return exchange("story", rough(rng, ask), stories.story(rng, topic))
    return exchange("story", rough(rng, rng.choice(stories.STORY_ASKS)), stories.story(rng))


def _single(rng: Random) -> Exchange:
    return SINGLE[rng.choices(_NAMES, _SHARES)[0]][0](rng)


def _filler(rng: Random, memory: dict[str, str], language: str) -> Exchange:
    """One exchange of a mixed conversation; what it tells goes to `memory`."""
    dice = rng.random()
    if dice < 0.62:
        return _single(rng)
    if dice < 0.78:
        return small_talk(rng)
    if dice < 0.86:
        return tell(rng, memory, language)
    if dice < 0.97:
        return recall(rng, memory, language)
    return tell_story(rng)


def _system(rng: Random) -> list[Message]:
    return [{"role": "system", "content": rng.choice(TALK["systems"])}] if rng.random() < 0.4 else []


def _language(rng: Random) -> str:
    return "zh" if rng.random() < 0.3 else "en"


def _flatten(head: list[Message], exchanges: Iterable[Exchange]) -> list[Message]:
    return head + [message for part in exchanges for message in part.messages]


def _tool_head(rng: Random, tools: dict) -> list[Message]:
    system = rng.choice(["", "", TALK["systems"][0], *TALK["systems"]])
    return [{"role": "system", "content": tools_prompt(list(tools.values()), system)}]


def _tool_filler(rng: Random, tools: dict) -> Exchange:
    """Something that none of the tools is for."""
    while True:
        part = small_talk(rng) if rng.random() < 0.3 else _single(rng)
        if part.task != "unknown" and ("calculator" not in tools or part.task not in (*_SUMS, "working")):
            return part


def _tool_dialogue(rng: Random) -> list[Message]:
    tools, parts = make_tools(rng), []
    for _ in range(rng.choice((1, 2, 3, 4))):
        parts.append(tool_exchange(rng, tools, answered=True) if rng.random() < 0.75 else _tool_filler(rng, tools))
    return _flatten(_tool_head(rng, tools), parts)


def _memory_parts(rng: Random) -> list[Exchange]:
    memory, language, parts = {}, _language(rng), []
    for _ in range(rng.randrange(1, 4)):
        parts.append(tell(rng, memory, language))
        parts.extend(_filler(rng, memory, language) for _ in range(rng.choice((0, 0, 1, 2))))
    parts.extend(_filler(rng, memory, language) for _ in range(rng.choice((0, 0, 1, 2, 3))))
    parts.extend(recall(rng, memory, language) for _ in range(rng.randrange(1, 3)))
    return parts[:12]


def dialogue(rng: Random) -> list[Message]:
    """A conversation of one to twelve turns that ends with the assistant."""
    dice = rng.random()
    if dice < 0.13:
        return _tool_dialogue(rng)
    if dice < 0.31:
        return _flatten(_system(rng), [SINGLE[rng.choice(_SUMS)][0](rng) for _ in range(rng.randrange(2, 13))])
    if dice < 0.47:
        return _flatten(_system(rng), _memory_parts(rng))
    memory: dict[str, str] = {}
    language = _language(rng)
    if dice < 0.53:
        return _flatten(_system(rng), [small_talk(rng)] if rng.random() < 0.7 else [tell_story(rng)])
    num_turns = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 12))
    return _flatten(_system(rng), [_filler(rng, memory, language) for _ in range(num_turns)])


def story(rng: Random) -> str:
    """A story on its own, without a conversation around it."""
    return stories.story_zh(rng) if rng.random() < 0.2 else stories.story(rng)


def _memory_question(rng: Random) -> list[Message]:
    parts = _memory_parts(rng)
    while parts[-1].task != "memory":
        parts = _memory_parts(rng)
    return _flatten(_system(rng), parts)


def _tool_question(rng: Random, answered: bool) -> list[Message]:
    tools = make_tools(rng)
    before = [tool_exchange(rng, tools, answered=True)] if rng.random() < 0.3 else []
    return _flatten(_tool_head(rng, tools), [*before, tool_exchange(rng, tools, answered)])


def question(rng: Random, task: str) -> Question:
    """One scored question of `task`: alone, or after some turns of conversation."""
    if task == "memory":
        messages = _memory_question(rng)
    elif task.startswith("tool_"):
        messages = _tool_question(rng, task == "tool_answer")
    else:
        memory: dict[str, str] = {}
        before = [_filler(rng, memory, "en") for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        messages = _flatten(_system(rng), [*before, SINGLE[task][0](rng)])
    return Question(task, messages[:-1], messages[-1]["content"])


def questions(seed: int, num: int) -> list[Question]:
    """`num` questions, the tasks in turn; a longer list from the same seed begins with the shorter one."""
    return [question(Random(f"eval/{seed}/{i}"), TASKS[i % len(TASKS)]) for i in range(num)]


def held_out_dialogues(seed: int, num: int) -> list[list[Message]]:
    """Whole conversations for perplexity."""
    return [dialogue(Random(f"eval/dialogue/{seed}/{i}")) for i in range(num)]


def held_out_stories(seed: int, num: int) -> list[str]:
    """Stories without conversation, for perplexity."""
    return [story(Random(f"eval/story/{seed}/{i}")) for i in range(num)]


def training_documents(seed: int, shard: int) -> Iterator[list[Message] | str]:
    """An endless stream: conversations, and one story in twenty."""
    rng = Random(f"train/{seed}/{shard}")
    while True:
        yield story(rng) if rng.random() < 0.05 else dialogue(rng)


def score(asked: list[Question], replies: list[str]) -> list[TaskScore]:
    """Exact match by task (surrounding white space aside)."""
    assert len(replies) == len(asked)
    hits: dict[str, list[bool]] = {task: [] for task in TASKS}
    for q, reply in zip(asked, replies):
        hits[q.task].append(q.is_right(reply))
    return [TaskScore(task, sum(found), len(found)) for task, found in hits.items() if found]


def overall(scores: list[TaskScore]) -> TaskScore:
    return TaskScore("overall", sum(s.num_right for s in scores), sum(s.num_asked for s in scores))
