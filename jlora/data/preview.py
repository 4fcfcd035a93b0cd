"""What a data set looks like: a few rows as text, and its counts."""

from functools import partial
from itertools import groupby

from jlora._typing import PretrainedTokenizer
from jlora.data.rows import IGNORED, CountedDataset, Dataset
from jlora.data.tokens import continuation


def preview(dataset: Dataset, tokenizer: PretrainedTokenizer, *, rows: int) -> list[list[tuple[str, bool]]]:
    """The first rows as (text, supervised) runs, decoded from the very tokens that are trained on.

    Special tokens are shown. A packed row starts a new run at each record.

    Args:
        dataset: the rows.
        tokenizer: the one that made them.
        rows: how many at most, >= 1.
    Raises:
        ValueError: `rows` < 1.
    """
    if rows < 1:
        raise ValueError(f"`rows` must be >= 1; got {rows}. Give the number of rows to show.")
    return [_runs(dataset, tokenizer, index) for index in range(min(rows, len(dataset)))]


def _runs(dataset: Dataset, tokenizer: PretrainedTokenizer, index: int) -> list[tuple[str, bool]]:
    show = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    row = dataset.row(index)
    supervised = (row.labels != IGNORED).tolist()
    segments = [0] * len(supervised) if row.segment_ids is None else row.segment_ids.tolist()
    runs, segment_of, before = [], None, []
    tokens = zip(row.input_ids.tolist(), supervised, segments, strict=True)
    for (flag, segment), run in groupby(tokens, key=lambda token: token[1:]):
        before = before if segment == segment_of else []
        ids = [token_id for token_id, _, _ in run]
        runs.append((continuation(show, before, ids), flag))
        segment_of, before = segment, before + ids
    return runs


def summary(dataset: CountedDataset) -> dict[str, int | float | tuple[str, ...]]:
    """The counts of a data set by name, in the order to show them; shares are in 0..1."""
    stats = dataset.stats
    return {
        "records": stats.records,
        "rows": stats.rows,
        "length": dataset.length,
        "longest": stats.longest,
        "tokens": stats.tokens,
        "supervised_tokens": stats.supervised_tokens,
        "supervised_share": stats.supervised_tokens / stats.tokens,
        "padding_efficiency": stats.padding_efficiency,
        "truncated": stats.truncated,
        "truncated_at": stats.truncated_at,
        "dropped": stats.dropped,
        "dropped_at": stats.dropped_at,
        "straddled": stats.straddled,
        "straddled_at": stats.straddled_at,
        "empty": stats.empty,
        "empty_at": stats.empty_at,
        "left_out": stats.left_out_shown,
    }
