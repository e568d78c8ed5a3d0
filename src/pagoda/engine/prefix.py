"""The prefix cache: full blocks of the KV cache found again by the tokens that they hold.

A block's name is a keyed 128-bit hash chained over all tokens up to its end, begun from the salt and the rope variant.
The key is drawn per process, so names can be neither guessed nor prepared; tokens are compared on a hit all the same.
"""

import os
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple


class Entry(NamedTuple):
    block: int
    parent: bytes
    tokens: bytes


class PrefixCache:
    """Which named block lies where. Knows nothing of who uses a block; `BlockPool` says when one is evicted.

    Only blocks whose contents are final may be put: their tokens are known and a step that computed them is digested.
    """

    def __init__(self, block_len: int, key: bytes | None = None):
        self.block_len = block_len
        self._key = key or os.urandom(32)
        self._entries: dict[bytes, Entry] = {}
        self._names: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._names

    def __len__(self) -> int:
        return len(self._names)

    def root(self, salt: str, variant: int) -> bytes:
        """The name before the first block; chains of different salts or rope variants never meet."""
        return self._digest(variant.to_bytes(8, "little"), salt.encode("utf-8", "surrogatepass"))

    def extend(self, names: list[bytes], root: bytes, tokens: Sequence[int], count: int) -> None:
        """Append to `names` until it names the first `count` blocks of `tokens`."""
        for i in range(len(names), count):
            names.append(self._digest(names[-1] if names else root, self._bytes(tokens, i)))

    def match(self, names: list[bytes], root: bytes, tokens: Sequence[int], count: int) -> list[int]:
        """The cached blocks of the longest beginning of `tokens`, at most `count`. `names` is extended on the way."""
        blocks: list[int] = []
        for i in range(count):
            self.extend(names, root, tokens, i + 1)
            entry = self._entries.get(names[i])
            parent = names[i - 1] if i else root
            if entry is None or entry.parent != parent or entry.tokens != self._bytes(tokens, i):
                break
            blocks.append(entry.block)
        return blocks

    def put(self, block: int, index: int, names: list[bytes], root: bytes, tokens: Sequence[int]) -> None:
        """Block number `index` of `tokens` lies in `block`. An equal block that is already known stays so."""
        self.extend(names, root, tokens, index + 1)
        if names[index] not in self._entries and block not in self._names:
            parent = names[index - 1] if index else root
            self._entries[names[index]] = Entry(block, parent, self._bytes(tokens, index))
            self._names[block] = names[index]

    def forget(self, block: int) -> None:
        """The block gets other contents. Unnamed blocks are welcome."""
        name = self._names.pop(block, None)
        if name is not None:
            del self._entries[name]

    def _bytes(self, tokens: Sequence[int], index: int) -> bytes:
        return array("i", tokens[index * self.block_len : (index + 1) * self.block_len]).tobytes()

    def _digest(self, parent: bytes, data: bytes) -> bytes:
        return blake2b(parent + data, digest_size=16, key=self._key).digest()
