"""What became of the data on its way to rows: the numbers to show before a run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts of one data set. `truncated` and `dropped` are disjoint.

    records: records given (windows, for raw text).
    rows: rows made of them; fewer than the records when packed or dropped.
    tokens: distinct tokens in the rows, padding not counted.
    supervised_tokens: labels that count in the loss, over one epoch.
    truncated: records cut at `max_length` of which some of the response is left.
    dropped: records with no supervised token within `max_length`; they are not trained on.
    padding_efficiency: share of the positions of all rows, padded to the data set's length, that hold a token.
    longest: tokens of the longest record before truncation.
    truncated_at, dropped_at: where those records stand in their file.
    """

    records: int
    rows: int
    tokens: int
    supervised_tokens: int
    truncated: int
    dropped: int
    padding_efficiency: float
    longest: int
    truncated_at: tuple[str, ...] = ()
    dropped_at: tuple[str, ...] = ()

    def cut(self) -> list[str]:
        """What `max_length` took, in words: "2 records truncated at max_length (first: a.jsonl:3)"."""
        places = {"truncated": self.truncated_at, "dropped": self.dropped_at}
        return [f"{len(at)} records {what} at max_length (first: {at[0]})" for what, at in places.items() if at]
