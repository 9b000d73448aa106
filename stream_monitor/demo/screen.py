"""What the demo shows: per request the text so far and what its reasoning rests on right now."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from stream_monitor.demo.client import Reply, top_sentences
from stream_monitor.monitor.text import one_line
from stream_monitor.v1alpha1 import monitor_pb2 as pb
from stream_monitor.v1alpha1 import summary_pb2

ANCHORS_SHOWN = 3
TEXT_LINES = 3
BAR_CELLS = 10
TEXT_CHARACTERS = 200


class Screen:
    """Renders the replies anew each time rich asks for it, so that whoever fills them in needs not know of it."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self._replies = replies

    def __rich__(self) -> RenderableType:
        return Group(*map(_panel, self._replies))


def _panel(reply: Reply) -> Panel:
    state = "done" if reply.answered else "decoding" if reply.output_ids else "waiting"
    title = Text(f"{reply.id}  {state}, {len(reply.output_ids)} tokens")
    parts: list[RenderableType] = [Text(_tail(reply.text), style="dim" if reply.answered else "")]
    if reply.trace is not None:
        parts += _lines("Read most by later sentences, over the whole answer", _scores(reply.trace))
    elif reply.newest is not None:
        number = reply.newest.sentence.index
        anchors = [(anchor.sentence, anchor.share) for anchor in reply.newest.to_anchors[:ANCHORS_SHOWN]]
        parts += _lines(f"Sentence {number} rests on", anchors)
    parts += [Text(f"! {finding.summary}", style="bold yellow") for finding in reply.findings[-2:]]
    return Panel(Group(*parts), title=title, title_align="left", border_style="green" if reply.answered else "cyan")


def _lines(title: str, rows: Iterable[tuple[pb.Sentence, float]]) -> list[RenderableType]:
    # One line each, cut at the panel's edge: the share and the place matter more than the sentence's end.
    lines = [
        Text.assemble(
            (f"{'█' * round(share * BAR_CELLS) or '▏':<{BAR_CELLS}} ", "cyan"),
            f"{share:4.0%} ",
            (f"{role_name(sentence.role)} {sentence.index} ", "magenta"),
            one_line(sentence.text, TEXT_CHARACTERS),
            no_wrap=True,
            overflow="ellipsis",
        )
        for sentence, share in rows
    ]
    if not lines:
        return [Text(f"{title}: nothing yet (too few sentences before it)", style="dim")]
    return [Text(title, style="bold"), *lines]


def role_name(role: summary_pb2.Role.ValueType) -> str:
    """ROLE_USER -> user."""
    return summary_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _scores(trace: pb.GetTraceResponse) -> list[tuple[pb.Sentence, float]]:
    return top_sentences(trace, ANCHORS_SHOWN)


def _tail(text: str, width: int = 100) -> str:
    """The end of a text, about as much as TEXT_LINES lines hold."""
    flat = " ".join(text.split())
    return flat if len(flat) <= TEXT_LINES * width else "… " + flat[-TEXT_LINES * width :]
