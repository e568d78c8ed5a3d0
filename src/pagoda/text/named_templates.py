"""Chat formats by name, for models whose checkpoint has no template of its own (`named_templates.toml`)."""

from dataclasses import dataclass
from typing import Any

from pagoda.toml_data import read_table


@dataclass(frozen=True)
class NamedTemplate:
    """Marks around the turns of one chat format. `source` is the Jinja text that reads them as `f`."""

    names: tuple[str, ...]
    source: str
    system: str = ""
    end_system: str = ""
    user: str = ""
    end_user: str = ""
    assistant: str = ""
    end_assistant: str = ""
    separator: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    bos: bool = True
    bos_each: bool = False
    trim_last: bool = False


def _templates(table: dict[str, Any]) -> tuple[NamedTemplate, ...]:
    """The formats in their order, with what they name in the other tables."""

    def template(names: list[str], marks: str = "", **own: Any) -> NamedTemplate:
        record = {**table["marks"].get(marks, {}), **own}
        record["source"] = table["sources"][record.get("source", "turns")]
        record["stop_words"] = tuple(record.get("stop_words", ()))
        if "default_system" in record:
            record["default_system"] = table["systems"][record["default_system"]]
        return NamedTemplate(tuple(names), **record)

    return tuple(template(**row) for row in table["formats"])


def by_name(templates: tuple[NamedTemplate, ...]) -> dict[str, NamedTemplate]:
    """Every name and alias -> its record; a name given to two records is our mistake."""
    table = {name: t for t in templates for name in t.names}
    assert len(table) == sum(len(t.names) for t in templates)
    return table


TEMPLATES = _templates(read_table("text", "named_templates"))
NAMED = by_name(TEMPLATES)
