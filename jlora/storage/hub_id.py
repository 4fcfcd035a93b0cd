"""Repositories of the Hugging Face hub by name."""

import re
from pathlib import Path

_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git\Z))(?:[\w-][\w.-]*/)?\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""Of a repository. Reference: huggingface_hub, `validate_repo_id`."""


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be one of the hub's: it has the form of one, and is no path here."""
    return bool(_NAME.fullmatch(name)) and not Path(name).expanduser().exists()


def check_name(repo: str) -> None:
    """Raises a ValueError for what no repository can be called."""
    if not _NAME.fullmatch(repo):
        raise ValueError(
            f"A repository of the hub is called user/name or name, of letters, digits, '-', '_' and '.'; got {repo!r}."
        )
