"""A command that is told to end cleans up as it does at Ctrl-C."""

import signal


def end_as_at_ctrl_c() -> None:
    """Raise KeyboardInterrupt also where `kill`, a scheduler or a closed terminal ends this process.

    Started in the background of a script, a process inherits SIGINT as ignored, and Python then leaves it so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
