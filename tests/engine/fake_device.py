"""A device that "computes" tokens by hashing every cache entry that it reads through the block tables: whoever reads
a wrong, stale or unwritten entry gets wrong tokens. It runs steps in order at launch, as a real one does."""

from hashlib import blake2b

from pagoda.engine.request import EngineRequest, SamplingParams, TokenLogprobs
from pagoda.engine.schedule import Schedule, StepResult

VOCAB = 6


def entry(before: bytes, token: int, variant: int) -> bytes:
    """What the cache holds at a position: it depends on everything before, as in a deep model."""
    return blake2b(before + bytes([token]) + variant.to_bytes(4, "little"), digest_size=8).digest()


def choose(last: bytes, num_generated: int, params: SamplingParams) -> int:
    noise = params.seed.to_bytes(8, "little") + num_generated.to_bytes(4, "little")
    drawn = blake2b(last + noise, digest_size=2).digest()
    token = drawn[0] % VOCAB if drawn[1] % 2 else 1 + num_generated % 2  # often a pattern, which can be guessed
    if token in params.stop_ids and num_generated < params.min_tokens:
        token = next(t for t in range(VOCAB) if t not in params.stop_ids)
    return token


def expected(prompt: list[int], params: SamplingParams, limit: int, variant: int) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that runs alone, without blocks."""
    last, tokens = b"", []
    for token in prompt:
        last = entry(last, token, variant)
    while True:
        token = choose(last, len(tokens), params)
        if token in params.stop_ids and len(tokens) >= params.min_tokens:
            return tokens, "stop"
        tokens.append(token)
        if len(tokens) == params.max_tokens or len(prompt) + len(tokens) == limit:
            return tokens, "length"
        last = entry(last, token, variant)


class FakeDevice:
    def __init__(self, block_len: int, num_blocks: int, variant=lambda _: 0):
        self.block_len, self.num_blocks, self.variant = block_len, num_blocks, variant
        self.cache: dict[tuple[int, int], bytes] = {}
        self.slots: dict[int, dict] = {}
        self.choose = choose
        self.unseen: dict[int, int] = {}  # tokens of a slot that the host has not digested

    def launch(self, plan: Schedule) -> StepResult:
        for slot in plan.freed:
            del self.slots[slot]
        for init in plan.inits:
            assert init.slot not in self.slots, "a slot got a second tenant"
            num_generated = len(init.history) - init.num_prompt
            self.slots[init.slot] = {"init": init, "table": {}, "last": None, "num_generated": num_generated}
            self.unseen[init.slot] = 0
        for slot, index, block in plan.block_updates:
            assert 0 < block < self.num_blocks
            self.slots[slot]["table"][index] = block
        assert plan.rows and [r.tokens is not None for r in plan.rows] == sorted(
            r.tokens is not None for r in plan.rows
        )
        assert len({r.slot for r in plan.rows}) == len(plan.rows)
        result = StepResult([], logprobs=[])
        for row in plan.rows:
            self._run(row, result)
        return result

    def _run(self, row, result: StepResult) -> None:
        state = self.slots[row.slot]
        init, table = state["init"], state["table"]
        variant = self.variant(init.rope_len)
        tokens = [state["last"]] if row.tokens is None else row.tokens
        assert len(tokens) == row.num_tokens >= 1
        spot = lambda p: (table[p // self.block_len], p % self.block_len)  # noqa: E731
        scores = []
        for position, token in enumerate(tokens, row.start):
            before = self.cache[spot(position - 1)] if position else b""
            self.cache[spot(position)] = entry(before, token, variant)
            if row.prompt_logprobs and position + 1 < init.num_prompt:
                scores.append(TokenLogprobs(init.history[position + 1], -float(position + 1)))
        if row.prompt_logprobs:
            result.prompt_logprobs[row.slot] = scores
        if row.samples and init.params.grammar is not None:
            assert self.unseen[row.slot] == 0, "a grammar must have seen every token"
            assert row.samples == 1, "a grammar's tokens are not guessed"
        right = True  # after a wrong guess all is void
        for i in range(row.samples):
            position = row.start + row.num_tokens - row.samples + i
            token = self.choose(self.cache[spot(position)], state["num_generated"], init.params)
            result.tokens.append(token)
            result.logprobs.append(TokenLogprobs(token, -1.0))
            if right:
                state["last"] = token
                state["num_generated"] += 1
                right = i + 1 < row.samples and tokens[i + 1] == token
        self.unseen[row.slot] += row.samples > 0

    def seen(self, plan: Schedule) -> None:
        for row in plan.rows:
            if row.samples and self.unseen.get(row.slot):
                self.unseen[row.slot] -= 1


def request(id: str, prompt: list[int], salt: str = "", session: str | None = None, priority: int = 0, **params):
    return EngineRequest(id, prompt, SamplingParams(**{"max_tokens": 4, **params}), session, priority, salt)
