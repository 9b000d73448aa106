"""Who owns which row: requests as the scheduler tells of them, labels of a step's rows, tokens waiting to be sent."""

from collections.abc import Container
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream_monitor.engine.channels import Channels
from stream_monitor.engine.compat.schedule import NewRequest, ScheduledRequest
from stream_monitor.engine.marks import Marks, Reading
from stream_monitor.engine.policy import RequestPolicy, decide
from stream_monitor.engine.prompt_rows import offsets, spacing
from stream_monitor.engine.vocabulary import PromptRoles, overlay_untrusted
from stream_monitor.records import Phase, RequestFinished, RequestStarted, TokenRun

NO_PROMPT_IDS = "prompt_embeds"
REQUEST_LIMIT = "request_limit"
UNKNOWN_REQUEST = "unknown_request"
ID_TOO_LONG = "id_too_long"
MOST_WAITING = 16
"""Tokens of a request that wait for its next row."""

MAX_ID = 1024
"""Characters of an internal id that a receiver takes. Clients choose most of it; one such request must not spoil the
messages it shares with others, so it is counted and never named."""

MAX_PROMPT_IDS = 1 << 17
"""Token ids of a prompt that are sent: half a megabyte, an eighth of the largest message a receiver takes."""


class RowLabel(msgspec.Struct, frozen=True):
    """One row of a step: the last query token of one request, under speculative decoding one of its last, of a prompt
    any that is captured on demand.

    Attributes:
        position: of the query token, from 0; the row attends to keys 0 .. position.
        attempt: resumptions of the request so far.
        refused_reason: why the request is not captured; empty when it is.
        sampled: the stride picked this row.
        governed: the configured stride did, and the one that the governor made of it did not.
        after: query rows that the request has after this one in its step.
    """

    request_id: str
    position: int
    attempt: int
    phase: Phase
    refused_reason: str
    sampled: bool
    governed: bool = False
    after: int = 0


@dataclass(slots=True)
class _Tracked:
    """What is known of a request.

    Attributes:
        ahead: places from the last prompt token, less engine steps, when its prompt had been read last.
        cut: runs of tokens that the pending ones do not go on from.
    """

    prompt_tokens: int
    refused_reason: str
    attempt: int = 0
    ahead: int = 0
    total_tokens: int = 0
    stops: frozenset[int] = frozenset()
    stopped: bool = False
    pending_first: int = 0
    last_token: int = -1
    reading: Reading = field(default_factory=Reading)
    pending_flags: bytearray = field(default_factory=bytearray)
    pending_ids: list[int] = field(default_factory=list)
    cut: list[TokenRun] = field(default_factory=list)


class RequestTable:
    """Requests between their first scheduling and their end. Used by the runner thread alone.

    Args:
        stride: one row in every `stride` positions is sampled.
        max_requests: captured at a time; later ones are refused until others finish.
        client_may_disable: whether a request may switch its own monitoring off.
        token_flags: uint8 [vocabulary], `TokenFlag`s of every token id; None if this rank does not send tokens.
        roles: finds the role spans of a prompt.
        send_token_ids: whether token ids go along.
        channels: of the model's chats; None where it has none.
        marks: of sentence ends that no single token shows.
        tenant_argument: entry of the request's arguments in which the gateway says whose it is; empty for none.
        prompt_stride: one row in so many of each chunk of a prompt is captured; 0: only the last.
    """

    def __init__(
        self,
        stride: int,
        max_requests: int,
        client_may_disable: bool,
        token_flags: NDArray[np.uint8] | None,
        roles: PromptRoles | None,
        send_token_ids: bool,
        channels: Channels | None = None,
        marks: Marks | None = None,
        tenant_argument: str = "",
        prompt_stride: int = 0,
    ) -> None:
        self._stride = stride
        self._prompt_stride = prompt_stride
        self.factor = 1
        """By which the governor multiplies the stride."""
        self.step = 0
        """Number of the engine step whose rows are labelled; the same on all ranks of an engine."""
        self._max_requests = max_requests
        self._client_may_disable = client_may_disable
        self._flags = token_flags
        self._flag_of = b"" if token_flags is None else token_flags.tobytes()
        self._roles = roles
        self._send_ids = send_token_ids
        self._channels = channels
        self._marks = marks or Marks({})
        self._tenant_argument = tenant_argument
        self._tracked: dict[str, _Tracked] = {}
        self._captured = 0
        self._with_tokens: dict[str, None] = {}
        self.refused_arguments: dict[str, int] = {}

    def start(self, new: NewRequest) -> RequestStarted | None:
        """A request was scheduled for the first time, or again: with the same prompt as its next attempt, with another
        one as a session that goes on.

        Returns what to announce; None for a request that is announced already or whose id cannot be sent.
        """
        known = self._tracked.get(new.request_id)
        if known is not None and known.prompt_tokens == new.prompt_tokens:
            # What model runner V2 is told of a preempted request that runs again.
            known.attempt += 1
            return None
        if known is not None:
            self._forget(new.request_id)
        policy = decide(new.extra_args, new.prompt_tokens, self._client_may_disable, self._tenant_argument)
        for argument in policy.refused_arguments:
            self.refused_arguments[argument] = self.refused_arguments.get(argument, 0) + 1
        reason = self._refusal(new, policy)
        tracked = _Tracked(new.prompt_tokens, reason, attempt=known.attempt + 1 if known else 0)
        tracked.total_tokens = new.prompt_tokens
        tracked.stops = new.stop_token_ids
        if new.prompt_token_ids:
            tracked.last_token = new.prompt_token_ids[-1]
        self._tracked[new.request_id] = tracked
        self._captured += not reason
        return None if reason == ID_TOO_LONG else self._announce(new, policy, tracked)

    def _refusal(self, new: NewRequest, policy: RequestPolicy) -> str:
        if len(new.request_id) > MAX_ID:
            return ID_TOO_LONG
        if policy.refused_reason:
            return policy.refused_reason
        if new.prompt_token_ids is None:
            return NO_PROMPT_IDS
        return REQUEST_LIMIT if self._captured >= self._max_requests else ""

    def _announce(self, new: NewRequest, policy: RequestPolicy, tracked: _Tracked) -> RequestStarted:
        reason = tracked.refused_reason
        started = RequestStarted(new.request_id, new.prompt_tokens, b"", b"", b"", refused_reason=reason)
        started.tenant = policy.tenant
        if reason or self._flags is None or self._roles is None or new.prompt_token_ids is None:
            return started
        ids = np.asarray(new.prompt_token_ids, np.int64)
        starts, roles = self._roles.spans(ids)
        if policy.untrusted:
            starts, roles = overlay_untrusted(starts, roles, list(policy.untrusted), new.prompt_tokens)
        started.role_starts = np.asarray(starts, "<u4").tobytes()
        started.roles = np.asarray(roles, np.uint8).tobytes()
        started.prompt_flags = self._marks.revise(tracked.reading, new.prompt_token_ids, self._flags_of(ids).tobytes())
        if self._send_ids and len(ids) <= MAX_PROMPT_IDS:
            started.prompt_token_ids = ids.astype("<u4").tobytes()
        return started

    def resume(self, request_id: str) -> None:
        """A preempted request runs again."""
        if tracked := self._tracked.get(request_id):
            tracked.attempt += 1

    def rows(self, request: ScheduledRequest) -> list[RowLabel]:
        """The rows of a request without draft tokens that may be captured in the step, by position: of a prompt those
        that are captured on demand, and its last one."""
        if not self._prompt_stride or request.scheduled_tokens <= self._prompt_stride:
            return [self.label(request)]
        tracked = self._tracked.get(request.request_id)
        ends = request.computed_tokens + request.scheduled_tokens
        # What lies behind the prompt is output that is computed again.
        behind = ends - tracked.prompt_tokens if tracked else ends
        inside = [after for after in offsets(request.scheduled_tokens, self._prompt_stride) if after >= behind]
        return [*(self.label(request, after) for after in inside), self.label(request)]

    def drafted(self, request: ScheduledRequest) -> list[RowLabel]:
        """The rows of a request that verifies draft tokens: each draft's, after that of its last certain token."""
        return [self.label(request, after) for after in range(request.draft_tokens, -1, -1)]

    def label(self, request: ScheduledRequest, after: int = 0) -> RowLabel:
        """A row this request will have in the step: its last one, or the one that `after` others follow. Refused if the
        request started before capture was armed."""
        end = request.computed_tokens + request.scheduled_tokens - after
        certain = request.scheduled_tokens - request.draft_tokens
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            phase = Phase.DECODE if certain == 1 else Phase.PREFILL_END
            return RowLabel(request.request_id, end - 1, 0, phase, UNKNOWN_REQUEST, False, after=after)
        known = tracked.prompt_tokens + request.output_tokens
        if end < known:
            phase = Phase.PREFILL_CHUNK
        elif request.output_tokens and (certain == 1 or after < request.draft_tokens):
            phase = Phase.DECODE
        else:
            phase = Phase.PREFILL_END
        place = end - tracked.prompt_tokens
        if phase is Phase.PREFILL_END:
            tracked.ahead = place - self.step
        # Requests are sampled in the same steps, as long as they advance by one position a step: most of what a
        # captured step costs does not depend on how many rows it has. Ends of chunks are few and show how the prompt
        # was read, so all are taken.
        beat, every = 0, 1
        if phase is Phase.DECODE:
            beat, every = place - tracked.ahead, self._stride
        elif after and not request.draft_tokens:
            beat = after // spacing(request.scheduled_tokens, self._prompt_stride)
        sampled = beat % (every * self.factor) == 0
        governed = not sampled and beat % every == 0
        return RowLabel(
            request.request_id, end - 1, tracked.attempt, phase, tracked.refused_reason, sampled, governed, after
        )

    @property
    def reads_prompts(self) -> bool:
        """Whether more than the last row of each chunk of a prompt is captured."""
        return self._prompt_stride > 0

    @property
    def stride(self) -> int:
        """The stride in force."""
        return self._stride * self.factor

    def add_tokens(self, request_id: str, first_position: int, token_ids: list[int]) -> None:
        """Tokens were sampled: `token_ids[0]` stands at `first_position`."""
        tracked = self._tracked.get(request_id)
        if tracked is None or tracked.stopped:
            return
        if tracked.stops and (ends := [n for n, token in enumerate(token_ids) if token in tracked.stops]):
            # Asynchronous scheduling samples past the end before it knows of it.
            token_ids, tracked.stopped = token_ids[: ends[0] + 1], True
        goes_on = first_position == tracked.total_tokens
        tracked.total_tokens = first_position + len(token_ids)
        if self._flags is None or tracked.refused_reason:
            return
        if not goes_on:
            # Tokens in between were lost, or some come again: in a run of their own these keep their positions, by
            # which the receiver counts what it misses, and what was read before says nothing of them.
            if tracked.pending_flags:
                tracked.cut.append(self._run(request_id, tracked))
            tracked.reading, tracked.last_token = Reading(), -1
        if not tracked.pending_flags:
            tracked.pending_first = first_position
        if self._channels is None:
            # One token as a rule, on the runner thread: arrays would take ten times as long.
            flags = b"".join([self._flag_of[token : token + 1] or b"\0" for token in token_ids])
        else:
            ids = np.asarray(token_ids, np.int64)
            named = self._flags_of(ids)
            self._channels.add_flags(named, ids, tracked.last_token)
            flags = named.tobytes()
        tracked.pending_flags += self._marks.revise(tracked.reading, token_ids, flags)
        if token_ids:
            tracked.last_token = token_ids[-1]
        if self._send_ids:
            tracked.pending_ids += token_ids
        self._with_tokens[request_id] = None

    def take_tokens(self, rows: Container[str] | None = None) -> list[TokenRun]:
        """Tokens since they were last taken, one run a request unless some are missing in between.

        Args:
            rows: requests of which a row goes along. A sentence is scored when a row behind its end is in, so tokens of
                others wait for theirs, `MOST_WAITING` of them: fewer, longer runs cost less on their way. All if None.
        """
        ready = [
            request_id
            for request_id in self._with_tokens
            if rows is None or request_id in rows or len(self._tracked[request_id].pending_flags) >= MOST_WAITING
        ]
        for request_id in ready:
            del self._with_tokens[request_id]
        return [run for request_id in ready for run in self._take(request_id)]

    def _take(self, request_id: str) -> list[TokenRun]:
        tracked = self._tracked[request_id]
        runs, tracked.cut = [*tracked.cut, self._run(request_id, tracked)], []
        return runs

    @staticmethod
    def _run(request_id: str, tracked: _Tracked) -> TokenRun:
        run = TokenRun(
            request_id,
            tracked.pending_first,
            bytes(tracked.pending_flags),
            np.asarray(tracked.pending_ids, "<u4").tobytes(),
        )
        tracked.pending_flags.clear()
        tracked.pending_ids.clear()
        return run

    def finish(self, request_id: str) -> tuple[list[TokenRun], RequestFinished] | None:
        """The engine let go of a request: its last tokens and its end; None if it was never announced."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return None
        last = self._take(request_id) if self._with_tokens.pop(request_id, 0) is None else []
        self._forget(request_id)
        if tracked.refused_reason == ID_TOO_LONG:
            return None
        return last, RequestFinished(request_id, tracked.total_tokens)

    def _forget(self, request_id: str) -> None:
        tracked = self._tracked.pop(request_id)
        self._with_tokens.pop(request_id, None)
        self._captured -= not tracked.refused_reason

    def _flags_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Flags of ids; 0 for ids beyond the table (padding rows of the embedding)."""
        assert self._flags is not None
        inside = token_ids < len(self._flags)
        return np.where(inside, self._flags[np.where(inside, token_ids, 0)], 0).astype(np.uint8)
