"""A model of an engine's block pool and scheduler that goes through random histories.

Written from vLLM's v1/core: what is handed out, kept for its prefix, taken back, copied, loaded by a connector or lost.
Every step tells the worker what a SchedulerOutput tells.
"""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.typing import NDArray

from stream_kernels.cpu import ROW_OK, ROW_RACED

from .paged_worker import PREFIXES, ROWS, Shape, Worker

NULL_PAGE = 0


class BlockPool:
    """Pages as vLLM's pool hands them out (v1/core/block_pool.py): the longest free first, those whose content nobody
    can find again before all others; a page keeps its content, and its name, until it is handed out."""

    def __init__(self, pages: int) -> None:
        self.free = deque(range(NULL_PAGE + 1, pages))
        self._holders = [0] * pages
        self._name_of: dict[int, tuple[int, int]] = {}
        self.named: dict[tuple[int, int], int] = {}
        """Page by the group and the prefix that end in it."""
        self.prefix_of: dict[int, NDArray[np.int64]] = {}
        """The whole prefix that ends in a named page."""

    def take(self) -> int:
        page = self.free.popleft()
        self.forget(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        if not self._holders[page]:
            self.free.remove(page)
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            (self.free.append if page in self._name_of else self.free.appendleft)(page)

    def alone(self, page: int) -> bool:
        return self._holders[page] == 1

    def name(self, page: int, name: tuple[int, int], prefix: NDArray[np.int64]) -> None:
        if page not in self._name_of and name not in self.named:
            self._name_of[page], self.named[name], self.prefix_of[page] = name, page, prefix

    def forget(self, page: int) -> None:
        if page in self._name_of:
            del self.named[self._name_of.pop(page)], self.prefix_of[page]

    def rename(self, source: int, target: int) -> None:
        """The copy takes over what the original was known as."""
        name, prefix = self._name_of[source], self.prefix_of[source]
        self.forget(source)
        self.name(target, name, prefix)


@dataclass
class Request:
    """A request with all the tokens it will ever have, as prefixes; `computed` of them have keys in its pages."""

    request_id: str
    ids: NDArray[np.int64]
    prompt: int
    names: list[int]
    """Of the prefix that ends with each full page."""
    computed: int = 0
    pages: list[list[int]] = field(default_factory=list)
    known: bool = False
    """The worker was told of it."""


@dataclass
class Scheduled:
    """What a step does with a request."""

    tokens: int
    accepted: int
    """Tokens whose keys stay; the others are rejected drafts."""
    new_pages: list[list[int]] | None
    joined: bool = False
    """It was not running before."""


class EngineHistory(RuleBasedStateMachine):
    """Random histories of an engine: arrivals, steps, ends, preemptions, copies, failed loads, sleep."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    @initialize(seed=st.integers(0, 2**16), zeroes=st.booleans(), tail_first=st.booleans())
    def start(self, seed: int, zeroes: bool, tail_first: bool) -> None:
        self.worker = Worker(self.shape)
        self.pool = BlockPool(self.shape.pages)
        self.rng = np.random.default_rng(seed)
        self.zeroes = zeroes
        self.tail_first = tail_first
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.ended: list[str] = []
        self.past: list[NDArray[np.int64]] = []
        self.count = 0
        for length in (3, 1, 2):
            self._arrive(seed, True, length)
        # Of the coming step.
        self.copies: list[tuple[int, int]] = []
        self.to_zero: list[int] = []
        self.retained: list[int] = []
        self.touched: set[int] = set()
        """Pages whose content may change in the coming step."""
        self.touched_at = np.zeros(self.shape.pages, np.int64)
        self.unwritten: set[int] = set()
        """Pages that are named and get their keys in the coming step."""

    @precondition(lambda self: len(self.running) + len(self.waiting) < ROWS - 1)
    @rule(seed=st.integers(0, 2**16), shares=st.booleans(), long=st.integers(0, 3))
    def arrive(self, seed: int, shares: bool, long: int) -> None:
        self._arrive(seed, shares, long)

    def _arrive(self, seed: int, shares: bool, long: int) -> None:
        """A prompt, which may begin as another one did, up to any token."""
        rng, size = np.random.default_rng(seed), self.shape.block_size
        length = int(rng.integers(2, (15, 30, 75, 110)[long] * size))
        shared = self.past[rng.integers(len(self.past))] if shares and self.past else np.zeros(0, np.int64)
        shared = shared[: rng.integers(0, len(shared) + 1)][: length - 1]
        ids = np.concatenate([shared, self.rng.integers(0, PREFIXES, length - len(shared))])
        self.past = [*self.past[-5:], ids]
        prompt = int(rng.integers(1 + length // 2, length + 1))
        names = [0]
        for first in range(0, length - self.shape.page_size + 1, self.shape.page_size):
            names.append(hash((names[-1], ids[first : first + self.shape.page_size].tobytes())))
        self.waiting.append(Request(f"r{self.count}", ids, prompt, names[1:]))
        self.count += 1

    @rule(seed=st.integers(0, 2**16), drafts=st.integers(0, 5), searches=st.integers(0, 1))
    def decode(self, seed: int, drafts: int, searches: int) -> None:
        self._step(seed, 9, drafts, admits=False)
        self._search(searches)

    @rule(seed=st.integers(0, 2**16), chunk=st.sampled_from([20000, 2000, 100]), searches=st.integers(0, 1))
    def read_prompts(self, seed: int, chunk: int, searches: int) -> None:
        self._step(seed, chunk, 0, admits=True)
        self._search(searches)

    def _step(self, seed: int, chunk: int, drafts: int, admits: bool) -> None:
        """Running requests decode, with drafts, or read on in their prompts; then waiting ones join."""
        rng = np.random.default_rng(seed)
        scheduled: dict[str, Scheduled] = {}
        for request in list(self.running):
            if request in self.running and rng.random() < 0.9:
                self._schedule(request, chunk, drafts, scheduled, rng)
        loads: list[tuple[str, int, int]] = []
        while self.waiting and admits and len(self.running) < ROWS:
            if not self._admit(self.waiting[0], chunk, scheduled, loads, rng):
                break
        self._run(scheduled, loads, rng)

    @rule(what=st.sampled_from(["copy", "failed load", "end", "preemption", "sleep"]), which=st.integers(0, 2**16))
    def disturb(self, what: str, which: int) -> None:
        """One of what happens seldom, as one rule, so that it is seldom."""
        if what == "copy" and self.pool.named:
            self._copy_cached_page(sorted(self.pool.prefix_of)[which % len(self.pool.prefix_of)])
        elif what == "sleep" and which % 4 == 0:
            self._sleep()
        elif self.running:
            request = self.running[which % len(self.running)]
            if what == "end":
                self._end(request)
            elif what == "preemption":
                self._preempt(request)
            elif what == "failed load" and self.shape.connector:
                self._load_fails(request, which % (request.computed // self.shape.page_size + 1))

    def _copy_cached_page(self, source: int) -> None:
        """The prefix cache moves to a copy, which no request was ever given, while a request keeps the original
        (v1/core/single_type_kv_cache_manager.py, `move_block_hashes`)."""
        if source in {target for _, target in self.copies}:
            return
        self.pool.hold(source)
        self.retained.append(source)
        if self.pool.free:
            target = self._take()
            self.retained.append(target)
            self.pool.rename(source, target)
            self.copies.append((source, target))

    def _load_fails(self, request: Request, first: int) -> None:
        """What a connector should have loaded, from page `first` on, is zeroed and computed again, in the pages the
        request has (v1/core/kv_cache_manager.py, `record_blocks_for_zeroing`)."""
        lost = [page for pages in request.pages for page in pages[first:]]
        if not all(self.pool.alone(page) for page in lost):
            return
        for page in lost:
            self.pool.forget(page)
        self.to_zero += lost
        self.touched |= set(lost)
        request.computed = min(request.computed, first * self.shape.page_size)

    def _sleep(self) -> None:
        """The pages lose their content and the prefix cache is emptied, after every request was put off."""
        for request in list(self.running):
            self._preempt(request)
        for page in list(self.pool.prefix_of):
            self.pool.forget(page)
        for page in self.retained:
            self.pool.drop(page)
        self.copies, self.to_zero, self.retained = [], [], []
        self.touched.clear()
        self.worker.invalidate()
        self.touched_at[:] = self.worker.generations.now

    @rule(times=st.integers(1, 3), overtaken=st.booleans())
    def search(self, times: int, overtaken: bool) -> None:
        self._search(times, overtaken)

    def _search(self, times: int, overtaken: bool = False) -> None:
        """Searches the steps that wait longest; of their rows those are refused whose pages may have changed since."""
        for _ in range(times):
            for row in self.worker.search_next(overtaken):
                given_away = any((self.touched_at[pages] > row.generation).any() for pages in row.pages)
                # With a connector even the pages of a true prefix hit are taken to be rewritten.
                assert row.status == ROW_OK or given_away or self.shape.connector
                assert row.status == ROW_RACED or not given_away
                event("raced row" if row.status == ROW_RACED else "searched row")

    def teardown(self) -> None:
        if hasattr(self, "worker"):
            while self.worker.search_next():
                pass
            for level in +self.worker.compared:
                event(f"summaries of level {level} compared")

    def _take(self) -> int:
        page = self.pool.take()
        self.touched.add(page)
        if self.zeroes:
            self.to_zero.append(page)
        return page

    def _grow(self, request: Request, tokens: int) -> list[list[int]] | None:
        """Pages for `tokens` tokens in every group, all or none; returns the new ones."""
        short = [-(-tokens // self.shape.page_size) - len(pages) for pages in request.pages]
        if sum(max(0, count) for count in short) > len(self.pool.free):
            return None
        new = [[self._take() for _ in range(count)] for count in short]
        for pages, more in zip(request.pages, new, strict=True):
            pages += more
        return new

    def _name(self, request: Request, tokens: int) -> None:
        """Full pages can be found by others from when they are scheduled, as in vLLM."""
        size = self.shape.page_size
        for group, pages in enumerate(request.pages):
            for i, page in enumerate(pages[: tokens // size]):
                self.pool.name(page, (group, request.names[i]), request.ids[: (i + 1) * size])
                if (i + 1) * size > request.computed:
                    self.unwritten.add(page)

    def _schedule(
        self, request: Request, chunk: int, drafts: int, scheduled: dict[str, Scheduled], rng: np.random.Generator
    ) -> None:
        """Gives a running request tokens, and the pages for them, if need be those of requests that started later."""
        left = len(request.ids) - request.computed
        if left <= 0:
            self._end(request)
            return
        if request.computed < request.prompt:
            tokens = accepted = min(chunk, request.prompt - request.computed)
        else:
            tokens = min(1 + drafts, left)
            accepted = int(rng.integers(1, tokens + 1))
        while (new := self._grow(request, request.computed + tokens)) is None:
            victim = next(r for r in reversed(self.running) if r.request_id not in scheduled)
            self._preempt(victim)
            if victim is request:
                return
        self._name(request, request.computed + (tokens if request.computed < request.prompt else 1))
        scheduled[request.request_id] = Scheduled(tokens, accepted, new if any(new) else None)

    def _admit(
        self,
        request: Request,
        chunk: int,
        scheduled: dict[str, Scheduled],
        loads: list[tuple[str, int, int]],
        rng: np.random.Generator,
    ) -> bool:
        """Starts or resumes a request behind what the prefix cache, or a connector, has of it, if there is room."""
        size, groups, most = self.shape.page_size, range(self.shape.groups), request.prompt - 1
        hits = request.names[: most // size]
        count = next(
            (i for i, name in enumerate(hits) if any((g, name) not in self.pool.named for g in groups)), len(hits)
        )
        request.pages = [[self.pool.named[group, name] for name in hits[:count]] for group in groups]
        for page in (page for pages in request.pages for page in pages):
            self.pool.hold(page)
        computed = count * size
        tails, matched = self._partial_hit(request, computed, most) if rng.random() < 0.7 else ([], 0)
        for page in tails:
            self.pool.hold(page)
        self.retained += tails
        computed += matched
        loaded = int(rng.integers(0, most - computed + 1)) if self.shape.connector and not tails else 0
        tokens = min(chunk, request.prompt - computed - loaded)
        target = computed + loaded + tokens
        if self.shape.groups * (-(-target // size) - count) > len(self.pool.free):
            self._release(request)
            return False
        # A shared tail is copied to a page of the request's own, before it writes behind the match.
        for pages, source in zip(request.pages, tails, strict=False):
            pages.append(self._take())
            self.copies.append((source, pages[-1]))
        assert self._grow(request, target) is not None
        if loaded:
            loads.append((request.request_id, computed, computed + loaded))
            self.touched |= {page for pages in request.pages for page in pages[computed // size :]}
        request.computed = computed
        self._name(request, target)
        request.computed += loaded
        self.waiting.remove(request)
        self.running.append(request)
        scheduled[request.request_id] = Scheduled(tokens, tokens, request.pages, joined=True)
        return True

    def _partial_hit(self, request: Request, computed: int, most: int) -> tuple[list[int], int]:
        """Cached pages, one of each group, whose first tokens are the request's next ones; and how many are."""
        size = self.shape.page_size
        wanted = request.ids[computed : min(computed + size, most)]
        tails, matched = [], len(wanted)
        for group in range(self.shape.groups):
            best, page_found = 0, None
            for (of_group, _), page in self.pool.named.items():
                prefix = self.pool.prefix_of[page]
                if of_group != group or len(prefix) != computed + size or page in self.unwritten:
                    continue
                if not np.array_equal(prefix[:computed], request.ids[:computed]):
                    continue
                same = prefix[computed : computed + len(wanted)] == wanted
                length = len(same) if same.all() else int(same.argmin())
                if length > best:
                    best, page_found = length, page
            if page_found is None:
                return [], 0
            tails.append(page_found)
            matched = min(matched, best)
        return tails, matched

    def _release(self, request: Request) -> None:
        """Lets go of the pages: in vLLM the last first, so that they are the first to be used again."""
        for pages in request.pages:
            for page in reversed(pages) if self.tail_first else pages:
                self.pool.drop(page)
        request.pages = []

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.ended.append(request.request_id)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.prompt, request.computed = max(request.prompt, request.computed), 0
        self.waiting.insert(0, request)

    def _run(
        self, scheduled: dict[str, Scheduled], loads: list[tuple[str, int, int]], rng: np.random.Generator
    ) -> None:
        """Tells the worker of the step, as a SchedulerOutput would, and checks all that runs afterwards."""
        new, cached = (
            [],
            SimpleNamespace(
                req_ids=[], resumed_req_ids=set(), num_computed_tokens=[], num_output_tokens=[], new_block_ids=[]
            ),
        )
        ids, accepted = {}, {}
        for request in self.running:
            if (plan := scheduled.get(request.request_id)) is None:
                continue
            end = request.computed + plan.tokens
            accepted[request.request_id] = request.computed + plan.accepted
            drafted = end - accepted[request.request_id]
            ids[request.request_id] = np.concatenate(
                [request.ids[: end - drafted], self.rng.integers(0, PREFIXES, drafted)]
            )
            block_ids = None if plan.new_pages is None else tuple(list(pages) for pages in plan.new_pages)
            # Model runner V1 is told of a resumption, V2 of a new request of a known name.
            if plan.joined and (not request.known or rng.random() < 0.5):
                data = SimpleNamespace(
                    req_id=request.request_id,
                    prompt_token_ids=[0] * request.prompt,
                    sampling_params=None,
                    block_ids=block_ids,
                    num_computed_tokens=request.computed,
                )
                new.append(data)
            else:
                if plan.joined:
                    cached.resumed_req_ids.add(request.request_id)
                cached.req_ids.append(request.request_id)
                cached.num_computed_tokens.append(request.computed)
                cached.num_output_tokens.append(max(0, request.computed - request.prompt + 1))
                cached.new_block_ids.append(block_ids)
            request.known = True
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={name: plan.tokens for name, plan in scheduled.items()},
            finished_req_ids=set(self.ended),
            preempted_req_ids=None,
            new_block_ids_to_zero=self.to_zero,
            kv_cache_block_copies=[SimpleNamespace(src_block_id=a, dst_block_id=b) for a, b in self.copies],
            scheduled_spec_decode_tokens={},
        )
        self.worker.execute(output, ids, accepted, loads)
        self.touched_at[list(self.touched)] = self.worker.generations.now
        for page in self.retained:
            self.pool.drop(page)
        self.ended, self.copies, self.to_zero, self.retained = [], [], [], []
        self.touched.clear()
        self.unwritten.clear()
        for request in self.running:
            if request.request_id in scheduled:
                request.computed = accepted[request.request_id]
        if self.running:  # a row of any might have been searched
            request = self.running[rng.integers(len(self.running))]
            pages = [np.array(pages, np.int32) for pages in request.pages]
            self.worker.check_summaries(pages, request.ids[: request.computed], self.worker.generations.now)
