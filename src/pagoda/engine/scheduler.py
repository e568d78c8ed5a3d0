"""Who computes what in the next step: a token budget handed out over slots, as plain data."""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from pagoda.engine.blocks import BlockPool
from pagoda.engine.lookup import Lookup, may_guess
from pagoda.engine.metrics import Counters, EngineStats
from pagoda.engine.prefix import PrefixCache
from pagoda.engine.request import EngineRequest, FinishReason, Output, check_sizes, too_long
from pagoda.engine.schedule import NO_TOKEN, Row, Schedule, SlotInit, StepResult
from pagoda.engine.scheduler_config import SchedulerConfig
from pagoda.engine.sequence import Launched, Sequence
from pagoda.engine.sessions import Sessions
from pagoda.engine.waiting import ORDER, Waiting
from pagoda.errors import OverloadedError, PagodaError, PromptTooLongError, RequestError


class Scheduler:
    """Requests in, schedules out, results in, outputs out. Not thread-safe; never blocks; imports no torch.

    `schedule()` may run ahead: it plans step n+1, n+2 while the results of step n are still on the way, and `digest`
    takes the results in the order of the steps. What an in-flight row of a request that has ended or was preempted
    yields is thrown away. Its writes are harmless: see `BlockPool`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        sessions: Sessions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config, self.clock = config, clock
        self.sessions = sessions or Sessions(clock=clock)
        self.cache = PrefixCache(config.block_len)
        self.pool = BlockPool(config.num_blocks, self.cache)
        self.max_len = min(config.session_len, self.pool.num_blocks * config.block_len)
        self.counters = Counters()
        self._live: dict[str, Sequence] = {}
        self._waiting = Waiting(config.max_queued, config.max_queued_tokens)
        self._running: list[Sequence] = []  # sorted by `order`
        self._slots = list(range(config.max_batch_size))
        self._freed: list[int] = []  # slots that the device has not been told of
        self._flights: deque[tuple[int, list[Launched]]] = deque()
        self._num_steps = 0
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Some request could go on, or waits for one that could."""
        return any(not seq.held for seq in self._live.values())

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest, held: bool = False) -> None:
        """Queue a request; one that is `held` gets no slot before `settle`. Raises `RequestError`,
        `PromptTooLongError`, `SessionBusyError` or `OverloadedError`, having changed nothing."""
        try:
            self._add(request, held)
        except PagodaError:
            self.counters.refused += 1
            raise

    def _add(self, request: EngineRequest, held: bool) -> None:
        params, session_id = request.params, request.session_id
        if request.id in self._live:
            raise RequestError(f"The request id {request.id!r} is in use: choose another.", "id")
        check_sizes(params)
        self._waiting.check_room(len(request.prompt_ids))
        self.sessions.expire()
        history = self.sessions.tokens(session_id) if session_id is not None else []
        tokens = history + request.prompt_ids
        if not request.prompt_ids:
            raise RequestError("The prompt is empty: send at least one token.", "prompt")
        if len(tokens) + 1 > self.max_len:
            raise PromptTooLongError(too_long(len(history), len(request.prompt_ids), self.max_len), "prompt")
        if session_id is not None:
            self.sessions.begin(session_id, request.id)
        limit = min(len(tokens) + params.max_tokens, self.max_len)
        root = self.cache.root(request.salt, self.config.cache_variant(len(tokens)))
        self._num_added += 1
        seq = Sequence(request, (request.priority, self._num_added), tokens, len(tokens), limit, root, held)
        seq.lookup = Lookup() if self.config.num_guesses and may_guess(params) else None
        seq.watched = seq.lookup is not None or params.grammar is not None
        self._live[request.id] = seq
        self._waiting.add(seq)

    def settle(self, request_id: str, error: PagodaError | None = None) -> Output | None:
        """What a held request waited for is there; or an `error` ends it, and this is its last output. Nothing happens
        to one that has ended."""
        seq = self._live.get(request_id)
        if seq is None or not seq.held:
            return None
        seq.held = False
        return None if error is None else self._refuse(seq, error)

    def abort(self, request_id: str, keep_tokens: int | None = None) -> Output | None:
        """End a request in whatever state it is, and return its last output; None if there is no such request (any
        more). Its session keeps exactly `keep_tokens` of the generated tokens (what the client received), or nothing
        of the turn when None. For a turn that has just ended by itself `keep_tokens` still holds."""
        seq = self._live.get(request_id)
        if seq is not None:
            return self._finish(seq, Output(request_id), "abort", keep_tokens)
        if keep_tokens is not None:
            self.sessions.trim(request_id, keep_tokens)
        return None

    def abort_all(self, prefix: str) -> list[Output]:
        """End every request whose id begins with `prefix`; sessions keep the tokens that were given out."""
        ids = [i for i in self._live if i.startswith(prefix)]
        return [self._finish(seq, Output(seq.request.id), "abort", len(seq.tokens)) for seq in map(self._live.get, ids)]

    def expire_waiting(self) -> list[Output]:
        """Refuse the requests that waited for their first slot longer than their `max_wait`."""
        why = "The request waited for {:g} s, the most allowed: try again later."
        late = self._waiting.late(self.clock())
        return [self._refuse(seq, OverloadedError(why.format(seq.request.max_wait))) for seq in late]

    # ---- steps -------------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule | None:
        """Plan the next step: decode rows, then prompts under way, then new ones. None if there is nothing to
        compute until a result is digested or a request arrives."""
        plan, launched, budget = Schedule(self._num_steps, []), [], self.config.max_step_tokens
        num_preemptions = self.counters.preemptions
        guessing: list[Sequence] = []
        for seq in list(self._running):  # the youngest are preempted, so no row that is planned already
            if budget > len(guessing) and self._may_decode(seq) and self._grow(seq, plan):
                if seq.lookup is None:
                    budget -= self._launch_next(seq, plan, launched)
                else:
                    guessing.append(seq)
        for seq, guesses in self._with_guesses(guessing, budget - len(guessing), plan):
            budget -= self._launch(seq, 1, plan, launched, guesses)
        for seq in list(self._running):
            if budget and not seq.sampled:
                budget -= self._launch(seq, min(budget, len(seq.tokens) - seq.num_computed), plan, launched)
        while budget and num_preemptions == self.counters.preemptions and (seq := self._admit(plan)) is not None:
            budget -= self._launch(seq, min(budget, len(seq.tokens) - seq.num_computed), plan, launched)
        if not plan.rows:
            return None
        plan.freed, self._freed = self._freed, []
        self._flights.append((plan.step, launched))
        self._num_steps += 1
        self.counters.steps += 1
        self.counters.step_tokens += self.config.max_step_tokens - budget
        return plan

    def digest(self, schedule: Schedule, result: StepResult) -> list[Output]:
        """Take the result of the oldest step in flight; the outputs are its news for the clients."""
        step, launched = self._flights.popleft()
        assert step == schedule.step, "results must come in the order of the steps"
        now, outputs, sampled = self.clock(), [], 0
        for row in launched:
            at, sampled = sampled, sampled + row.samples
            if row.epoch == row.seq.epoch:
                output = self._advance(row, result, at, now)
                if output is not None:
                    outputs.append(output)
        assert sampled == len(result.tokens), "one token for each position that samples"
        return outputs

    def stats(self) -> EngineStats:
        pool, queue = self.pool, (self.num_running, self.num_waiting)
        used = pool.num_blocks - pool.num_free
        return EngineStats(*queue, len(self.sessions), pool.num_blocks, used, len(self.cache), self.counters)

    # ---- parts of a step ---------------------------------------------------------------------------------------

    def _may_decode(self, seq: Sequence) -> bool:
        """It has a last token on the device, room for one more, and was not preempted in this very step. A grammar
        and who guesses must have seen every token."""
        return seq.sampled and len(seq.tokens) + seq.pending < seq.limit and not (seq.watched and seq.pending)

    def _grow(self, seq: Sequence, plan: Schedule) -> bool:
        """A block for the next position. If none is free the youngest are preempted; False: it was itself the one."""
        while seq.num_computed >= len(seq.blocks) * self.config.block_len:
            if self._extend(seq, plan):
                continue
            victim = self._running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _extend(self, seq: Sequence, plan: Schedule) -> bool:
        """One more block, if one is free."""
        blocks = self.pool.allocate(1)
        if blocks is None:
            return False
        plan.block_updates.append((seq.slot, len(seq.blocks), blocks[0]))
        seq.blocks += blocks
        return True

    def _with_guesses(self, ready: list[Sequence], spare: int, plan: Schedule) -> list[tuple[Sequence, list[int]]]:
        """Those that decode, each with the tokens that are guessed to follow its last one, `spare` of them in all;
        those without guesses first."""
        pairs = []
        for seq in ready:
            guesses = self._guess(seq, spare, plan) if seq.lookup is not None else []
            spare -= len(guesses)
            pairs.append((seq, guesses))
        return sorted(pairs, key=lambda pair: len(pair[1]) > 0)

    def _guess(self, seq: Sequence, most: int, plan: Schedule) -> list[int]:
        """As many as there is room for: in the request, and in free blocks, for nobody is preempted for a guess."""
        assert seq.lookup is not None and not seq.pending
        most = min(most, self.config.num_guesses, seq.limit - len(seq.tokens) - 1)
        guesses = seq.lookup.guess(seq.tokens, most) if most > 0 else []
        while seq.num_computed + len(guesses) >= len(seq.blocks) * self.config.block_len:
            if not self._extend(seq, plan):
                return guesses[: len(seq.blocks) * self.config.block_len - seq.num_computed - 1]
        return guesses

    def _admit(self, plan: Schedule) -> Sequence | None:
        """The first waiting request gets a slot, the cached blocks of its beginning and new ones for all of its
        tokens, or nobody does. A hundredth of the pool stays free for the growth of those that run."""
        seq, block_len = self._waiting.first() if self._slots else None, self.config.block_len
        if seq is None:
            return None
        hits: list[int] = []
        if self.config.prefix_caching and not (seq.scores_prompt or seq.anew):
            hits = self.cache.match(seq.names, seq.root, seq.tokens, (len(seq.tokens) - 1) // block_len)
        self.pool.acquire(hits)
        need = -(-len(seq.tokens) // block_len) - len(hits)
        reserve = self.pool.num_blocks // 100 if self._running else 0
        blocks = self.pool.allocate(need) if need + reserve <= self.pool.num_free else None
        if blocks is None:
            self.pool.release(hits)
            return None
        self._waiting.remove(seq)
        insort(self._running, seq, key=ORDER)
        seq.slot, seq.blocks = heappop(self._slots), hits + blocks
        seq.num_computed = len(hits) * block_len
        seq.num_named = seq.num_found = len(hits)
        self._count_admission(seq)
        params, request_id = seq.request.params, seq.request.id
        plan.inits.append(SlotInit(seq.slot, request_id, params, list(seq.tokens), seq.num_prompt, seq.num_prompt))
        plan.block_updates += [(seq.slot, i, block) for i, block in enumerate(seq.blocks)]
        return seq

    def _launch_next(self, seq: Sequence, plan: Schedule, launched: list[Launched]) -> int:
        """`_launch` of one token after a last sampled one, which is what nearly all rows are."""
        start = seq.num_computed
        plan.rows.append(Row(seq.slot, start))
        plan.needs_masks |= seq.watched
        launched.append(Launched(seq, seq.epoch, seq.slot, start + 1, 1, ()))
        seq.num_computed = start + 1
        seq.pending += 1
        return 1

    def _launch(
        self, seq: Sequence, num_tokens: int, plan: Schedule, launched: list[Launched], guesses: Iterable[int] = ()
    ) -> int:
        """A row of the next `num_tokens` tokens and, after a last sampled one, of `guesses`; the tokens it costs."""
        guesses, start, end = list(guesses), seq.num_computed, seq.num_computed + num_tokens
        tokens = None if seq.sampled else seq.tokens[start:end]
        if guesses:
            tokens, end = seq.tokens[start:] + guesses, end + len(guesses)
        samples = len(guesses) + 1 if seq.sampled or end == len(seq.tokens) else 0
        scores = seq.scores_prompt and not seq.sampled and start < seq.num_prompt - 1
        plan.rows.append(Row(seq.slot, start, end - start, tokens, samples, scores))
        plan.needs_masks |= samples > 0 and seq.request.params.grammar is not None
        launched.append(Launched(seq, seq.epoch, seq.slot, end, samples, guesses))
        seq.num_computed = end
        seq.pending += samples
        seq.sampled = samples > 0
        return end - start

    def _advance(self, row: Launched, result: StepResult, at: int, now: float) -> Output | None:
        """What one row's result means for its request."""
        seq, output = row.seq, Output(row.seq.request.id)
        if row.slot in result.errors:
            output.error = result.errors[row.slot]
            return self._finish(seq, output, "error")
        if seq.scores_prompt:
            seq.prompt_logprobs = (seq.prompt_logprobs or [None]) + result.prompt_logprobs.get(row.slot, [])
        if not row.samples:
            self._name_blocks(seq, row.end)
            return None
        seq.pending -= row.samples
        if len(seq.tokens) == seq.num_prompt:
            output.num_prompt_tokens, output.num_cached_tokens = seq.num_prompt, seq.num_cached or 0
            output.prompt_logprobs = seq.prompt_logprobs
        reason, right = None, 0
        while True:
            reason = self._take(seq, output, result, at + right, now)
            if reason is not None or right == len(row.guesses) or row.guesses[right] != result.tokens[at + right]:
                break
            right += 1
        wrong = len(row.guesses) - right
        self._name_blocks(seq, row.end - wrong)
        seq.num_computed -= wrong
        self.counters.guessed_tokens += len(row.guesses)
        self.counters.accepted_tokens += right
        if reason == "error":
            self.pool.forget(seq.blocks)
            if seq.num_found and not seq.anew:
                return self._begin_anew(seq, output)
        keep = None if reason == "error" else len(seq.tokens)
        return output if reason is None else self._finish(seq, output, reason, keep)

    def _take(self, seq: Sequence, output: Output, result: StepResult, at: int, now: float) -> FinishReason | None:
        """The next token of a request; why it ends, if it does."""
        params, token = seq.request.params, result.tokens[at]
        if token < 0:
            output.error = NO_TOKEN
            return "error"
        self._count_token(seq, now)
        if token in params.stop_ids and len(seq.tokens) - seq.num_prompt >= params.min_tokens:
            output.stop_id = token
            return "stop"
        seq.tokens.append(token)
        output.token_ids.append(token)
        logprobs = result.logprobs[at] if result.logprobs is not None else None
        if params.logprobs is not None and logprobs is not None:
            output.logprobs = [*(output.logprobs or ()), logprobs]
        return "length" if len(seq.tokens) == seq.limit else None

    def _name_blocks(self, seq: Sequence, end: int) -> None:
        """The prefix cache may find the blocks that are full of known tokens: those before position `end`."""
        if self.config.prefix_caching and end // self.config.block_len > seq.num_named:
            for i in range(seq.num_named, end // self.config.block_len):
                self.cache.put(seq.blocks[i], i, seq.names, seq.root, seq.tokens)
                seq.num_named = i + 1

    # ---- ends --------------------------------------------------------------------------------------------------

    def _finish(self, seq: Sequence, output: Output, reason: FinishReason, keep_tokens: int | None = None) -> Output:
        """The one place where a request ends."""
        if seq.slot >= 0:
            self._vacate(seq)
        else:
            self._waiting.remove(seq)
        del self._live[seq.request.id]
        if seq.request.session_id is not None:
            kept = None if keep_tokens is None else seq.tokens[: seq.num_prompt + max(0, keep_tokens)]
            self.sessions.end(seq.request.session_id, seq.request.id, kept, seq.num_prompt)
        self.counters.finished[reason] += 1
        self.counters.total_time.add(self.clock() - seq.request.arrival)
        output.finish_reason = reason
        return output

    def _refuse(self, seq: Sequence, error: PagodaError) -> Output:
        self.counters.refused += 1
        return self._finish(seq, Output(seq.request.id, error=str(error), error_kind=type(error).__name__), "error")

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue with its tokens; sampled tokens in flight are void and will be sampled again, equal."""
        self._vacate(seq)
        seq.num_computed = seq.num_named = seq.pending = 0
        seq.sampled = False
        if seq.scores_prompt:
            seq.prompt_logprobs = None
        self._waiting.add(seq)
        self.counters.preemptions += 1

    def _begin_anew(self, seq: Sequence, output: Output) -> Output | None:
        """Its own tokens need not be the reason: who filled the blocks that it found may have left before its error
        showed, and within a chunk what is no number spreads to the tokens before it."""
        self._preempt(seq)
        seq.anew, seq.num_cached, output.error = True, 0, None
        return output if output.token_ids else None

    def _vacate(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.pool.release(seq.blocks)
        self._freed.append(seq.slot)
        heappush(self._slots, seq.slot)
        seq.slot, seq.blocks = -1, []
        seq.epoch += 1

    # ---- counting ----------------------------------------------------------------------------------------------

    def _count_admission(self, seq: Sequence) -> None:
        self.counters.prompt_tokens += len(seq.tokens)
        self.counters.cached_tokens += seq.num_computed
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
            self.counters.queue_time.add(self.clock() - seq.request.arrival)

    def _count_token(self, seq: Sequence, now: float) -> None:
        self.counters.generated_tokens += 1
        if len(seq.tokens) == seq.num_prompt:
            self.counters.first_token_time.add(now - seq.request.arrival)
        else:
            self.counters.inter_token_time.add(now - seq.last_output)
        seq.last_output = now
