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
    dropped: records with no supervised token within `max_length`; they are not trained on. (Of records apart: their rows.)
    padding_efficiency: share of the positions of all rows, padded to the data set's length, that hold a token.
    longest: tokens of the longest record before truncation.
    straddled: records of which a response begins within a token of its prompt when the text is encoded as a whole; the
        prompt keeps the tokens that generation will feed, and the response continues them.
    truncated_at, dropped_at, straddled_at, empty_at, apart_at: where those records stand in their file, at most 10,000 of each.
    empty: records with an answer to learn that is empty or white space; they are trained on, to say nothing.
    apart: records of which each answer is a row of its own, since the chat template rewrites earlier turns.
    left_out: what records say and the rows do not, by the name of the column or key, and in how many records.
    bad: records that could not be used and were left out, and what was wrong with the first.
    formats: what the records were read as, and how many.
    sources: where several are mixed, how often the records of each come in an epoch, in words.
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
    straddled: int = 0
    straddled_at: tuple[str, ...] = ()
    empty: int = 0
    empty_at: tuple[str, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()
    apart: int = 0
    apart_at: tuple[str, ...] = ()
    bad: int = 0
    bad_first: str = ""
    formats: tuple[tuple[str, int], ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def left_out_shown(self) -> tuple[str, ...]:
        """`left_out` as text, the most frequent first: "text (10,000 records)"."""
        return tuple(f"{name} ({count:,} {'record' if count == 1 else 'records'})" for name, count in self.left_out)

    @property
    def bad_said(self) -> list[str]:
        return [f"{self.bad:,} bad records left out (first: {self.bad_first})"] if self.bad else []

    def cut(self) -> list[str]:
        """What `max_length` cost, in words: "2 records truncated at max_length (first: a.jsonl:3)"."""
        return self._counted({"truncated": "truncated at max_length", "dropped": "dropped at max_length"})

    def odd(self) -> list[str]:
        """What else the rows lack or part, in words."""
        found = self._counted(
            {
                "straddled": "whose response begins within a token of the prompt, which keeps its tokens",
                "empty": "with an empty answer, which is trained",
                "apart": "of which each answer is a row of its own, since the template rewrites earlier turns",
            }
        )
        found += self.bad_said
        return found + ([f"not in the text: {', '.join(self.left_out_shown)}"] if self.left_out else [])

    def _counted(self, said: dict[str, str]) -> list[str]:
        places = {kind: getattr(self, f"{kind}_at") for kind in said}
        return [f"{getattr(self, kind)} records {said[kind]} (first: {at[0]})" for kind, at in places.items() if at]
