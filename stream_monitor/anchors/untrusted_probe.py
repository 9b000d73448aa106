"""A linear probe of how heads read an untrusted stretch when an instruction in it is about to be followed.

Most heads read a document by position, or whatever it says; some read an instruction that is about to be followed more,
and others less. Which ones is a matter of the model: `probe_fitting.py` learns it from requests of which it is known
what became of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import Head, HeadShares
from stream_monitor.anchors.matrix import Mass
from stream_monitor.records import Role

_UNTRUSTED = int(Role.UNTRUSTED)
LEAST_SHARE = 1e-3
"""Added to every share: below it, differences say nothing."""


@dataclass(frozen=True)
class Probe:
    """A weight for the logarithm of what each head reads.

    Attributes:
        heads: (layer, query head) of each weight.
        weights: of the logarithm of a head's share on the untrusted sentence that it reads most.
        bias: added to the weighted sum, which then is the log odds, all groups being as frequent as they were made to
            be in fitting, that the request follows an instruction of the untrusted stretch.
    """

    heads: tuple[Head, ...]
    weights: tuple[float, ...]
    bias: float

    def weights_of(self, heads: Sequence[Head]) -> Mass:
        """The weights of a request's heads, float64 [heads]: 0 for those that the probe does not know, NaN for all
        where one that it knows is not there."""
        places = {head: place for place, head in enumerate(heads)}
        found = np.zeros(len(heads))
        known = [places.get(head, -1) for head in self.heads]
        if min(known, default=0) < 0:
            return found * math.nan
        found[known] = self.weights
        return found

    def log_odds(self, weights: Mass, shown: Mass) -> float:
        """Of a sentence or the opening, by `weights_of` and `log_shares`; NaN where heads are missing."""
        return float(weights @ shown + self.bias)


def log_shares(shares: HeadShares, roles: NDArray[np.uint8], heads: int, but: int = -1) -> Mass:
    """What the probe is shown of a sentence or of the opening: float64 [heads], logarithm of each head's share on the
    untrusted sentence that it reads most.

    Args:
        shares: of the sentence, head by head.
        roles: uint8 [sentences], at least of those that it reads.
        heads: of the request.
        but: a sentence that does not count: for the opening the prompt's last, which is read for being near.
    """
    there = (roles[shares.columns] == _UNTRUSTED) & (shares.columns != but)
    most = np.zeros(heads)
    np.maximum.at(most, shares.heads[there], shares.shares[there])
    return np.asarray(np.log(most + LEAST_SHARE))
