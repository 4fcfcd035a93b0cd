"""Rules that the flags of several groups have in common."""

from collections.abc import Iterator

from jlora._numbers import MAX_COUNT


def counts(flags: object, *names: str) -> Iterator[str]:
    """What is wrong with those of the fields `names` that must be None or counts from 1 on."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            yield f"`{name}` must be at least 1; got {value}."
        elif value is not None and value > MAX_COUNT:
            yield f"`{name}` must be at most {MAX_COUNT}; got {value}."
