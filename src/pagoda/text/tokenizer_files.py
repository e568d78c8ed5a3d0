"""What a checkpoint's small JSON files say about its tokenizer: added tokens, begin and end of sequence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.errors import TokenizerError


@dataclass(frozen=True)
class AddedToken:
    """A token outside the trained vocabulary. `special`: no part of the text; `lstrip`/`rstrip`: eats spaces beside."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """`bos`, `eos`: token texts; `eos_ids` come from `generation_config.json`, else `config.json`."""

    folder: Path
    config: dict[str, Any]
    added: dict[int, AddedToken]
    bos: str | None
    eos: str | None
    eos_ids: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, `{}` where there is no file; `TokenizerError` where it is not a JSON object."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} is no JSON ({error}): take the file from the checkpoint anew.") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object: take the file from the checkpoint anew.")
    return value


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_tokens(folder: Path, config: dict[str, Any], special_map: dict[str, Any]) -> dict[int, AddedToken]:
    specials = {_token_text(v) for v in (*special_map.values(), *config.values())}
    for source in (special_map, config):
        extra = source.get("additional_special_tokens")
        specials.update(_token_text(v) for v in (extra if isinstance(extra, list) else ()))
    added: dict[int, AddedToken] = {}
    for content, token_id in read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, int):
            added[token_id] = AddedToken(content, token_id, special=content in specials)
    flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
    for key, value in (config.get("added_tokens_decoder") or {}).items():
        text = _token_text(value)
        if text is not None:
            known = {name: bool(value.get(name)) for name in flags} if isinstance(value, dict) else {}
            added[int(key)] = AddedToken(text, int(key), **known)
    return dict(sorted(added.items()))


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `generation_config.json` and
    `config.json`; each may be absent. `TokenizerError` when one of them is damaged."""
    config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    eos_ids = _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id"))
    return TokenizerFiles(
        folder=folder,
        config=config,
        added=_added_tokens(folder, config, special_map),
        bos=_token_text(config.get("bos_token")) or _token_text(special_map.get("bos_token")),
        eos=_token_text(config.get("eos_token")) or _token_text(special_map.get("eos_token")),
        eos_ids=eos_ids,
    )
