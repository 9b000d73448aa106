"""Prints findings as they come and, of each, what the sentence it was found at reads.

Started again, it goes on where it ended: the cursor of the last event it dealt with is kept in a file.

    python follow.py [ADDRESS] [CURSOR_FILE]
"""

import sys
from pathlib import Path

from stream_monitor.client import Monitor

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9750"
place = Path(sys.argv[2] if len(sys.argv) > 2 else "cursor")
cursor = place.read_text() if place.exists() else ""

with Monitor(address) as monitor:
    for received in monitor.subscribe(cursor=cursor, last=10, notify=lambda text: print(text, file=sys.stderr)):
        event = received.event
        if received.lost or received.gap:
            print(f"{received.lost or 'some'} events were missed before this one {received.gap}", file=sys.stderr)
        trace = monitor.get_trace(event.key.request_id, engine_instance=event.key.engine_instance)
        of_sentence = trace.matrix.row == event.sentence.index
        columns, shares = trace.matrix.column[of_sentence], trace.matrix.share[of_sentence]
        reads = ", ".join(f"{columns[i]} ({shares[i]:.0%})" for i in (-shares).argsort()[:3])
        print(f"{event.external_id}: {event.summary}; it reads sentences {reads}", flush=True)
        written = place.with_suffix(".new")
        written.write_text(received.cursor)
        written.replace(place)  # whole or not at all: a kill in the middle must not leave an empty cursor
