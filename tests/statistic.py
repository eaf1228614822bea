"""Whether counts came from a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch


def g_test(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """The p-value of ``counts`` under ``probabilities`` (likelihood-ratio test); 0 if the impossible was counted.

    Cells where fewer than 5 are expected are joined into one, which the chi-square approximation needs.
    """
    total = sum(counts)
    cells, rare, rare_expected = [], 0, 0.0
    for count, probability in zip(counts, probabilities, strict=True):
        if probability == 0.0 and count:
            return 0.0
        if total * probability < 5:
            rare, rare_expected = rare + count, rare_expected + total * probability
        else:
            cells.append((count, total * probability))
    if rare_expected >= 5:
        cells.append((rare, rare_expected))
    g = 2 * sum(count * log(count / expected) for count, expected in cells if count)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(max(0.0, g) / 2, dtype=torch.float64)))
