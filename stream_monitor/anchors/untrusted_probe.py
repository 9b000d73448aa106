"""What the probe of UNTRUSTED_ANCHOR is shown: how heads read an untrusted stretch.

Most heads read a document by position, or whatever it says; some read an instruction that is about to be followed more,
and others less.
"""

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.matrix import Mass
from stream_monitor.records import Role

_UNTRUSTED = int(Role.UNTRUSTED)
_LEAST_SHARE = 1e-3
"""Added to every share before its logarithm is taken: below it, differences say nothing."""


def log_shares(shares: HeadShares, roles: NDArray[np.uint8], heads: int, but: int = -1) -> Mass:
    """Of a sentence or of the opening: float64 [heads], logarithm of each head's share on the untrusted sentence that
    it reads most.

    Args:
        shares: of the sentence, head by head.
        roles: uint8 [sentences], at least of those that it reads.
        heads: of the request.
        but: a sentence that does not count: for the opening the prompt's last, which is read for being near.
    """
    there = (roles[shares.columns] == _UNTRUSTED) & (shares.columns != but)
    most = np.zeros(heads)
    np.maximum.at(most, shares.heads[there], shares.shares[there])
    return np.asarray(np.log(most + _LEAST_SHARE))
