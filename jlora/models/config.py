"""Reading a Hugging Face `config.json` strictly: a field that would change the numbers is used or refused, never ignored."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ConfigReader:
    """Typed access to the fields of a `config.json`; absent fields have transformers' defaults.

    Every method raises a ValueError that names the field, the value got and what is accepted.
    """

    fields: Mapping[str, Any]

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` in config.json must be a positive integer; got {value!r}.")
        return value

    def divisor(self, name: str, default: int, *, of: int, of_name: str) -> int:
        value = self.integer(name, default)
        if of % value:
            raise ValueError(f"`{name}` in config.json must divide `{of_name}` = {of}; got {value}.")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"`{name}` in config.json must be a positive number; got {value!r}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` in config.json must be true or false; got {value!r}.")
        return value

    def token_id(self, name: str) -> int | None:
        ids = self.token_ids(name)
        return ids[0] if isinstance(ids, tuple) else ids

    def token_ids(self, name: str) -> int | tuple[int, ...] | None:
        """One id, or several as Llama 3 has for end-of-text."""
        value = self.fields.get(name)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"`{name}` in config.json must be a token id or a list of them; got {value!r}.")
        return tuple(value) if isinstance(value, list) else value

    def require(self, name: str, default: Any, accepted: tuple[Any, ...]) -> None:
        """Refuses a value that the model graph does not compute."""
        value = self.fields.get(name, default)
        if value not in accepted:
            raise ValueError(
                f"config.json has `{name}` = {value!r}; jlora's {self.fields.get('model_type')} computes "
                f"{' or '.join(map(repr, accepted))} only, and other outputs would come of ignoring it."
            )
