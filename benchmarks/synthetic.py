"""Synthetic teacher logits over a vocabulary of 151,936 tokens, for benchmarks that need its width and no model.

Token frequencies follow Zipf's law in the id, a context lifts a few candidates, the rest of the vocabulary is noise: heavy
tails, and entropies from 0 to about 5 nats at T = 1.
"""

from __future__ import annotations

import numpy as np
import torch

VOCABULARY = 151_936


def synthetic_logits(rows: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """float32 ``[rows, vocabulary]``."""
    generator = np.random.default_rng(seed)
    logits = np.empty((rows, vocabulary), np.float32)
    zipf = -np.log(np.arange(1, vocabulary + 1, dtype=np.float32) + 20.0)
    for row in range(rows):
        x = zipf + generator.standard_normal(vocabulary, dtype=np.float32) * 1.5
        candidates = generator.integers(3, 60)
        ids = np.minimum((vocabulary ** generator.random(candidates)).astype(int), vocabulary - 1)
        x[ids] += generator.exponential(5.0 * generator.uniform(0.1, 1.6), candidates) + generator.uniform(2.0, 7.0)
        logits[row] = x
    return torch.from_numpy(logits)
