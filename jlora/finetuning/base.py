"""What a run asks of its base checkpoint before the first step."""

from typing import Any

from jlora._numbers import first_not_finite


def check_finite(params: Any) -> None:
    """Raises a ValueError that names a tensor with values that are not finite, if there is one."""
    if (path := first_not_finite(params)) is not None:
        raise ValueError(
            f"The base model's weights must be finite; NaN or infinity is in {path!r}. Download the checkpoint again, or take "
            "another."
        )
