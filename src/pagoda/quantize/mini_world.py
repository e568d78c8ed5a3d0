"""The small world that Pagoda mini knows: facts, words and names in English and Chinese (`mini_world.toml`)."""

from dataclasses import dataclass
from typing import Any

from pagoda.toml_data import read_table


@dataclass(frozen=True)
class Relation:
    """`asks` and `reply` are format strings over `columns`; `language` is "en" or "zh"."""

    columns: list[str]
    rows: list[list[str]]
    asks: list[str]
    reply: str
    language: str


def _rows(table: dict[str, Any]) -> list[list[str]]:
    """The table's rows; behind them, where it names `mirror`, each again with its columns in that order."""
    columns = table["columns"]
    turned = [columns.index(column) for column in table.get("mirror", ())]
    return table["rows"] + [[row[i] for i in turned] for row in table["rows"] if turned]


def _relation(table: dict[str, Any], asks: list[str], reply: str, language: str, without: tuple = ()) -> Relation:
    """`without`: first cells of the rows that are not asked about."""
    rows = [row for row in _rows(table) if row[0] not in without]
    return Relation(table["columns"], rows, asks, reply, language)


def _column(table: dict[str, Any], name: str) -> list[str]:
    return [row[table["columns"].index(name)] for row in table["rows"]]


_DATA = read_table("quantize", "mini_world")
_TABLES = _DATA["tables"]
WORDS: list[str] = _DATA["words"]
NAMES: list[str] = _DATA["names"]
NAMES_ZH: list[str] = _DATA["names_zh"]
JOBS: list[str] = _DATA["jobs"]
CITIES = _column(_TABLES["countries"], "capital")
CITIES_ZH = _column(_TABLES["countries"], "都")
FAVORITES: dict[str, Any] = _DATA["favorites"]
RELATIONS = [_relation(**{**row, "table": _TABLES[row["table"]]}) for row in _DATA["relations"]]
