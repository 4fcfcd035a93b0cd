"""Tokens that a tokenizer is given."""

from pathlib import Path

from jlora._typing import PretrainedTokenizer


def read_new_tokens(file: str) -> list[str]:
    """The tokens of a file, one a line.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file without tokens, an empty line, spaces around a token, and one that stands twice.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of new tokens {file!r}.")
    tokens = path.read_text(encoding="utf-8").splitlines()
    for number, token in enumerate(tokens, 1):
        if not token or token != token.strip():
            raise ValueError(f"Line {number} of {file!r} must be a token, without spaces around it; got {token!r}.")
        if token in tokens[: number - 1]:
            raise ValueError(f"Line {number} of {file!r} has {token!r} again. Leave one of them.")
    if not tokens:
        raise ValueError(f"{file!r} is empty: write a token on each line, or leave --new-tokens out.")
    return tokens


def add_tokens(tokenizer: PretrainedTokenizer, tokens: list[str]) -> tuple[list[int], list[int]]:
    """(ids of the tokens, those of them that are new to the tokenizer, which has them now)."""
    before = len(tokenizer)
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    return ids, [i for i in ids if i >= before]
