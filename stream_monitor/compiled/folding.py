"""Rows of a sentence, summed by what they read."""

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import checked_jit

Numbers = NDArray[np.uint32]
Places = NDArray[np.int64]
Shares = NDArray[np.float32]
Mass = NDArray[np.float64]


@checked_jit()
def sentences_of(keys: Numbers, table: NDArray[np.int32], starts: Places) -> Places:
    """The sentence of each of these tokens [n], all of which lie in sentences.

    Args:
        keys: [n].
        table: the sentence of each token, or nothing.
        starts: [sentences], first token of each, by which it is searched then.
    """
    found = np.empty(len(keys), np.int64)
    for entry in range(len(keys)):
        key = keys[entry]
        if len(table):
            found[entry] = table[key]
        else:
            low, high = 0, len(starts)
            while high - low > 1:
                middle = (low + high) // 2
                if starts[middle] <= key:
                    low = middle
                else:
                    high = middle
            found[entry] = low
    return found


@checked_jit()
def fold_rows(
    table: NDArray[np.int32],
    starts: Places,
    keys: Numbers,
    mass: Shares,
    edges: Places,
    heads: NDArray[np.uint16],
    weights: Mass,
    telling: int,
) -> tuple[Places, Numbers, Shares, NDArray[np.uint8], Numbers, Shares, Places, Mass]:
    """Sum the entries of one sentence's rows by the sentence read: row by row, head by head, and over heads.

    What lies on the context's first token, the attention sink, counts for no head.

    Args:
        table, starts: of `sentences_of`.
        keys, mass: [n], the token that each entry reads.
        edges: [rows + 1], where each row's entries begin, and their end.
        heads: [n], place of the head of each entry; those beyond the heads that there are are not told apart.
        weights: [heads], what each counts in the mean.
        telling: rows whose heads are told apart.

    Returns:
        Edges [rows + 1], columns and mass of the rows, ascending within each; places, columns and shares of the heads,
        head by head; columns and shares of their mean.
    """
    size = len(starts)
    columns = sentences_of(keys, table, starts)
    # Of each sentence that is read, its place among them.
    places = np.zeros(size, np.int64)
    for column in columns:
        places[column] = 1
    found = np.empty(size, np.int64)
    read = 0
    for column in range(size):
        if places[column]:
            places[column], found[read] = read, column
            read += 1

    rows, count = len(edges) - 1, len(weights)
    sums, by_head = np.zeros(read), np.zeros((count + 1) * read)
    row_edges = np.zeros(rows + 1, np.int64)
    row_columns, row_mass = np.empty(len(keys), np.uint32), np.empty(len(keys), np.float32)
    end = 0
    for row in range(rows):
        for entry in range(edges[row], edges[row + 1]):
            place = places[columns[entry]]
            sums[place] += mass[entry]
            if keys[entry] != 0:
                by_head[min(int(heads[entry]), count) * read + place] += mass[entry]
        for place in range(read):
            if sums[place] != 0.0:
                row_columns[end], row_mass[end] = found[place], sums[place]
                sums[place] = 0.0
                end += 1
        row_edges[row + 1] = end

    head_places, head_columns = np.empty(len(keys), np.uint8), np.empty(len(keys), np.uint32)
    head_shares = np.empty(len(keys), np.float32)
    held = 0
    for head in range(count):
        for place in range(read):
            summed = by_head[head * read + place]
            if summed != 0.0:
                share = np.float32(summed / max(1, telling))
                head_places[held], head_columns[held], head_shares[held] = head, found[place], share
                sums[place] += share * weights[head]
                held += 1

    mean_columns, mean_shares = np.empty(read, np.int64), np.empty(read)
    used = 0
    for place in range(read):
        if sums[place] != 0.0:
            mean_columns[used], mean_shares[used] = found[place], sums[place]
            used += 1
    return (
        row_edges,
        # Copies: a view would keep all of the room.
        row_columns[:end].copy(),
        row_mass[:end].copy(),
        head_places[:held].copy(),
        head_columns[:held].copy(),
        head_shares[:held].copy(),
        mean_columns[:used].copy(),
        mean_shares[:used].copy(),
    )
