"""Who owns which block of the KV cache."""

from collections import OrderedDict

from pagoda.engine.prefix import PrefixCache


class BlockPool:
    """Blocks 1 .. num_blocks-1 with reference counts; block 0 is scratch and never handed out.

    A block without references is free. The order of the free list is the order of eviction: blocks without a name
    first, then named ones by the time of their last use. A free named block can be revived by `acquire` until
    `allocate` hands it out anew.

    A freed block may be handed out at once, although a step that writes into it is still in flight: the device runs
    steps in order, so that write comes before any of the new owner's, and it falls behind the positions that were
    digested, thus never into a block that has a name.
    """

    def __init__(self, num_blocks: int, cache: PrefixCache):
        self.num_blocks = num_blocks - 1
        self._cache = cache
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def refs(self, block: int) -> int:
        return self._refs[block]

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of undefined contents with one reference each, or None when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._cache.forget(block)
            self._refs[block] = 1
        return blocks

    def acquire(self, blocks: list[int]) -> None:
        """One more reference to each of these blocks, which the prefix cache named."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def forget(self, blocks: list[int]) -> None:
        """Nobody finds these blocks again, for what they hold may be no number. Who gets them anew writes what it
        reads: no attention takes anything from the tokens past the end of a sequence."""
        for block in blocks:
            self._cache.forget(block)

    def release(self, blocks: list[int]) -> None:
        """Drop one reference to each block of one table. Its end is freed first, so that beginnings, which more
        prompts share, are evicted last."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} was released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._cache:
                    self._free.move_to_end(block, last=False)
