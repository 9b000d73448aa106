"""What a detector says of one sentence."""

from enum import StrEnum


class Verdict(StrEnum):
    """What became of one sentence."""

    INSUFFICIENT = "insufficient"
    """Too few captured rows, or too little mass on what the detector looks at, to say anything."""
    WARM_UP = "warm_up"
    STEADY = "steady"
    ALARM = "alarm"

    # See `Kind`.
    __hash__ = str.__hash__
