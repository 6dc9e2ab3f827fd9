"""
A number with its standard error.

    loss, error = ratio(nats, tokens)    # loss per token of N texts, from each text's sum of losses and its tokens
"""

import math


def ratio(numerators, denominators):
    """
    sum(numerators) / sum(denominators) over independent units, two arrays, and its standard error, to first order. With
    denominators of one: the mean and its usual standard error. NaN for the error of a single unit.
    """
    n, total = len(numerators), denominators.sum()
    if not total:
        return math.nan, math.nan
    value = numerators.sum() / total
    residuals = numerators - value * denominators
    return float(value), math.sqrt(n / (n - 1) * (residuals**2).sum()) / float(total) if n > 1 else math.nan
