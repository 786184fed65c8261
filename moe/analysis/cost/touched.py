"""How many experts a batch visits: each one visited is read whole, however few its tokens are."""

import numpy as np
from jaxtyping import Float


def touched_evenly(num_experts: int, experts_per_token: float, tokens: int) -> float:
    """Expected number of distinct experts that some tokens visit, E (1 - (1 - K / E)^T).

    Exact where tokens choose independently and every expert is as likely: a token misses a given expert with
    probability 1 - K / E whichever way its K distinct experts hang together, and by linearity of expectation
    that is all that counts. Tokens of one text choose alike and visit fewer.
    """
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** tokens)


def touched_by_load(share: Float[np.ndarray, "E"], tokens: int) -> float:
    """The same where experts are not as likely: the sum of 1 - (1 - p_e)^T. Uneven load visits fewer.

    Args:
        share: probability p_e that a token visits each expert; sums to K.
        tokens: that choose independently.
    """
    return float((1.0 - (1.0 - np.clip(share, 0.0, 1.0)) ** tokens).sum())
