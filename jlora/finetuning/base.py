"""What a run asks of its base checkpoint before the first step."""

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 1 << 20  # hashing all of a large model would take longer than loading it


def fingerprint(directory: Path) -> str:
    """Of the base checkpoint: its config, and of each file of weights the name, the size, the start and the end."""
    sha = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            sha.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            sha.update(file.read())
    return sha.hexdigest()
