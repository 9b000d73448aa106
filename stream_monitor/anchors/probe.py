"""A linear probe: a weight for every number that heads show, where only some heads tell and which ones is a matter of
the model. `untrusted_fitting.py` and `shift_fitting.py` learn one from requests of which it is known what became."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stream_monitor.anchors.heads import Head
from stream_monitor.anchors.matrix import Mass


@dataclass(frozen=True)
class Probe:
    """Weights of a logistic regression.

    Attributes:
        heads: (layer, query head), each once.
        weights: of what these heads show: first of the first number of each head, then of the second of each.
        bias: added to the weighted sum, which then is log odds, what is looked for being as frequent as all else.
    """

    heads: tuple[Head, ...]
    weights: tuple[float, ...]
    bias: float

    def weights_of(self, heads: Sequence[Head]) -> Mass:
        """The weights of a request's heads, float64 [numbers * heads]: 0 for heads that the probe does not know, NaN
        for all where one that it knows is not there."""
        places = {head: place for place, head in enumerate(heads)}
        found = np.zeros((len(self.weights) // len(self.heads), len(heads)))
        known = [places.get(head, -1) for head in self.heads]
        if min(known) < 0:
            return found.ravel() * math.nan
        found[:, known] = np.reshape(self.weights, (-1, len(known)))
        return found.ravel()
