"""Rows of a prompt that are captured on demand as it is read: which rows of a step they are, and where they are kept.

Of each chunk every so many query rows, counted back from its last one, which is captured anyway. How long a request's
chunk is says all, so that the scheduler's word on the host and `query_start_loc` on the device tell the same rows.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

MOST_OF_CHUNK = 64
"""Rows of one chunk: a request's rows of a step go into one message, whatever is captured of each."""


def spacing(tokens: int, stride: int) -> int:
    """Query rows from one captured row of a chunk to the next: the stride, or as many of it as leave few enough rows.

    >>> spacing(2048, 32), spacing(2049, 32)
    (32, 64)
    """
    return stride * max(1, -(-tokens // (stride * MOST_OF_CHUNK)))


def offsets(tokens: int, stride: int) -> range:
    """How many query rows of the chunk come after each captured one but the last, descending.

    >>> list(offsets(100, 32)), list(offsets(32, 32))
    ([96, 64, 32], [])
    """
    every = spacing(tokens, stride)
    return range((tokens - 1) // every * every, 0, -every)


def room(tokens: int, stride: int) -> int:
    """Places for the rows of a batch of so many query tokens, one for each stretch of `stride` tokens: rows of a chunk
    are not nearer to each other, and the last one of a chunk lies farther than that from its end."""
    return -(-tokens // stride) if stride else 0


def taken_from(query_tokens: Sequence[int], stride: int) -> int:
    """Places that a batch takes, of requests with so many query tokens each: none where no chunk is long enough."""
    return room(sum(query_tokens), stride) if stride and max(query_tokens, default=0) > stride else 0


def tokens_of(query_start_loc: Iterable[int], stride: int) -> list[int]:
    """The query tokens to keep, ascending, of requests that begin and end there."""
    return [end - 1 - after for begin, end in pairwise(query_start_loc) for after in offsets(end - begin, stride)]
