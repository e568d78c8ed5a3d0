"""How models mark the reasoning before an answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands between `begin` and `end`, at the start of a reply; the prompt may already hold `begin`."""

    begin: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether the rendered prompt ends inside reasoning, so that the reply begins there."""
        return prompt.rstrip().endswith(self.begin)


REASONING_FORMATS = {"think": ReasoningFormat("<think>", "</think>")}


def guess_reasoning(template_source: str) -> str | None:
    """The format whose marks a chat template mentions."""
    return next((name for name, f in REASONING_FORMATS.items() if f.end in template_source), None)
