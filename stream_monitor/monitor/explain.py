"""`stream-monitor explain`: one request's anchor curve, and one finding on it, in a terminal."""

import numpy as np
from rich.bar import Bar
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from stream_monitor.client import Monitor, Target, Trace
from stream_monitor.monitor.text import one_line
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2

_BAR = 30
"""Characters of the longest bar."""
_TEXT = 60
"""Characters of a sentence that are shown."""


class NoSuchFinding(Exception):
    """One line."""


def explain(target: Target, request_id: str, number: int | None, console: Console) -> None:
    """Prints a request and, if `number` is given, its finding of that number, from 1, oldest first.

    Raises:
        MonitorError: the monitor cannot be asked, or there is no such request.
        NoSuchFinding: the request has no finding of that number.
    """
    with Monitor(target) as monitor:
        trace = monitor.get_trace(request_id)
    if number is not None and not 1 <= number <= len(trace.events):
        raise NoSuchFinding(f"{request_id} has {len(trace.events)} findings; there is no number {number}")
    event = None if number is None else trace.events[number - 1]
    console.print(Group(_heading(trace), _curve(trace, event), _findings(trace)))
    if event is not None:
        console.print(_finding(trace, event))


def _heading(trace: Trace) -> Text:
    info = trace.info
    unobserved = trace.unobserved_share
    seen = unobserved[np.isfinite(unobserved)]
    missed = f", {seen.mean():.1%} of the attention not observed" if len(seen) else ""
    ranks = f", ranks missing: {', '.join(info.missing_ranks)}" if info.missing_ranks else ""
    return Text(
        f"{info.external_id or info.key.request_id}: {info.model_name}, {info.prompt_tokens:,} prompt tokens, "
        f"{info.output_tokens:,} sampled, {info.sentences:,} sentences, {info.rows_kept:,} rows captured{missed}{ranks}"
    )


def _curve(trace: Trace, event: monitor_pb2.Event | None) -> Table:
    """The anchor curve: what sentences at least four later gave each sentence, and beside it, under a finding, what
    the output rested on before and rests on there."""
    scores = trace.vertical_score
    rows = trace.captured_rows
    table = Table(box=None, title="anchor curve")
    for name in ("sentence", "role", "tokens", "rows", "score"):
        table.add_column(name, no_wrap=True)
    # Bars and the text give way where the screen is narrow.
    table.add_column(max_width=_BAR)
    before = {anchor.sentence.index: anchor.share for anchor in event.from_anchors} if event else {}
    after = {anchor.sentence.index: anchor.share for anchor in event.to_anchors} if event else {}
    if event:
        table.add_column("before", no_wrap=True)
        table.add_column("since" if before else "at the finding", no_wrap=True)
    if with_text := any(sentence.text for sentence in trace.sentences):
        table.add_column("text")
    found = {one.sentence.index for one in trace.events}
    # The first sentence holds the attention sink, beside which no bar could be seen.
    most = float(np.nanmax(scores[1:])) if np.isfinite(scores[1:]).any() else 0.0
    for sentence in trace.sentences:
        index = sentence.index
        score = float(scores[index])
        cells: list[str | Bar] = [
            f"{index}{' ◀' if index in found else ''}",
            summary_pb2.Role.Name(sentence.role).removeprefix("ROLE_").lower(),
            f"{sentence.first_token}-{sentence.end_token - 1}",
            str(rows[index]),
            "" if not np.isfinite(score) else "<0.0001" if 0 < score < 1e-4 else f"{score:.4f}",
            Bar(most, 0, score) if score > 0 and most > 0 else "",
        ]
        if event:
            cells += [f"{shares[index]:.0%}" if index in shares else "" for shares in (before, after)]
        text = Text(one_line(sentence.text, _TEXT), no_wrap=True, overflow="ellipsis")
        table.add_row(*cells, *[text] * with_text)
    return table


def _findings(trace: Trace) -> Text:
    if not trace.events:
        return Text("no findings")
    lines = [f"{number}. {event.summary}" for number, event in enumerate(trace.events, 1)]
    return Text("findings (◀ marks their sentences)\n" + "\n".join(lines))


def _finding(trace: Trace, event: monitor_pb2.Event) -> Text:
    """The finding, and the row of the sentence matrix it was detected at."""
    kind = monitor_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")
    rare = f"p = {event.p_value:.2g}" if event.HasField("p_value") else "not calibrated"
    here = trace.matrix.row == event.sentence.index
    columns, shares = trace.matrix.column[here], trace.matrix.share[here]
    heaviest = np.argsort(-shares, kind="stable")[:10]
    read = ", ".join(f"{columns[place]} ({shares[place]:.1%})" for place in heaviest)
    opening = event.sentence.end_token <= trace.info.prompt_tokens
    told = ", from whose last token the output's first one is sampled" if opening else ""
    carriers = ", ".join(f"{one.head.layer}.{one.head.query_head} ({one.share:.0%})" for one in event.heads)
    of = "score, log odds by a probe," if event.by_probe else "score"
    return Text(
        f"\n{kind}: {of} {event.score:.3g}, threshold {event.threshold:.3g}, {rare}; began at sentence "
        f"{event.began.index}, detected at {event.sentence.index}{told}\n"
        f"sentence {event.sentence.index} reads: {read}; not observed: {event.unobserved_share:.1%}\n"
        f"carried by heads (layer.head): {carriers or 'none in particular'}"
    )
