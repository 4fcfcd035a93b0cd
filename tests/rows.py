"""Data sets of random rows, and what counts in a batch of them."""

import numpy as np

from jlora.data import IGNORED, Row

PAD = 7


class Rows:
    """Rows of random lengths; the first token of row i is 1000 + i, the pad id occurs among real tokens."""

    def __init__(self, n: int, *, pack: bool = False, length: int = 12, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.length, self.pad_id, self.rows = length, PAD, []
        for i in range(n):
            ids = rng.integers(0, 10, rng.integers(1, length + 1)).astype(np.int32)
            ids[0] = 1000 + i
            labels = np.where(rng.random(len(ids)) < 0.5, ids, IGNORED).astype(np.int32)
            segments = np.sort(rng.integers(1, 4, len(ids))).astype(np.int32) if pack else None
            self.rows.append(Row(ids, labels, segments))

    def __len__(self):
        return len(self.rows)

    def row(self, index):
        return self.rows[index]


def counted(arrays):
    """Labels that count in a batch, by the loss's own rule."""
    counts = arrays["labels"][:, 1:] != IGNORED
    if "segment_ids" in arrays:
        counts &= arrays["segment_ids"][:, 1:] == arrays["segment_ids"][:, :-1]
    return int(counts.sum())
