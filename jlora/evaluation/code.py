"""Answers as programs: pass@k, each candidate in a confined process of its own."""

import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora._typing import JsonObject
from jlora.evaluation import confined
from jlora.evaluation.example import Answers, Counts, Example, mean

_FENCED = re.compile(r"^[ \t]*```[ \t]*(python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_READ = 1 << 16
"""Bytes of a result that are looked at."""


class Verdict(NamedTuple):
    passed: bool
    said: str
    """"passed", or what went wrong."""


@dataclasses.dataclass
class Sandbox:
    """Runs candidates; each program once, however often it is asked for."""

    seconds: float = 10.0
    """For each candidate, with what Python takes to start."""
    megabytes: int = 1024
    """Of address space."""
    workers: int = dataclasses.field(default_factory=lambda: min(4, os.cpu_count() or 1))
    measures: JsonObject = dataclasses.field(default_factory=dict)
    """What confines candidates here, by what it bounds; known after the first."""
    _verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)

    def verdicts(self, programs: Sequence[str]) -> list[Verdict]:
        new = [program for program in dict.fromkeys(programs) if program not in self._verdicts]
        with ThreadPoolExecutor(self.workers) as pool:
            self._verdicts |= zip(new, pool.map(self._run, new), strict=True)
        return [self._verdicts[program] for program in programs]

    def _run(self, program: str) -> Verdict:
        token = secrets.token_hex(16)
        limits = json.dumps({"seconds": self.seconds, "megabytes": self.megabytes})
        with tempfile.TemporaryDirectory(prefix="jlora-candidate-") as place, tempfile.TemporaryFile() as result:
            path = Path(place, "candidate.py")
            path.write_text(program, encoding="utf-8", errors="surrogateescape")
            process = subprocess.Popen(
                [sys.executable, "-I", confined.__file__, str(path), str(result.fileno()), token, limits],
                cwd=place,
                env={"PATH": os.defpath, "HOME": place, "TMPDIR": place, "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[result.fileno()],
                start_new_session=True,
            )
            try:
                code = process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            result.seek(0)
            return self._verdict(result.read(_READ), token, code)

    def _verdict(self, result: bytes, token: str, code: int | None) -> Verdict:
        in_force, *rest = result.decode("utf-8", errors="replace").splitlines() or [""]
        if not in_force:
            raise RuntimeError(f"A candidate's process ended with {code} before it was confined. Is there memory left?")
        self.measures = json.loads(in_force)
        end = next((json.loads(line) for line in rest if token in line), None)
        if end is not None:
            return Verdict(end["said"] == "passed", end["said"])
        if code is None or code == -signal.SIGXCPU or code == -signal.SIGKILL:
            return Verdict(False, f"timed out after {self.seconds:g} seconds")
        return Verdict(False, f"killed by signal {-code}" if code < 0 else f"ended the process itself, with {code}")


def _end(process: subprocess.Popen) -> None:
    """The process and its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def program_of(answer: str) -> str:
    """The first fenced block of Python in an answer, or else all of it.

    >>> program_of("Here:" + chr(10) + "```python" + chr(10) + "x = 1" + chr(10) + "```" + chr(10) + "Done.")
    'x = 1\\n'
    """
    found = _FENCED.search(answer)
    return found[2] if found else answer


def pass_at(k: int, sandbox: Sandbox, examples: Sequence[Example], answers: Answers) -> Counts:
    """The chance that one of `k` answers passes the tests."""
    unscored = {i: "it has no tests" for i, example in enumerate(examples) if example.tests is None}
    unscored |= {i: f"it has {len(a)} answers, fewer than {k}" for i, a in enumerate(answers) if len(a) < k}
    jobs = [i for i in range(len(examples)) if i not in unscored]
    verdicts = iter(sandbox.verdicts([f"{program_of(a)}\n{examples[i].tests}\n" for i in jobs for a in answers[i]]))
    rows, notes = np.zeros((len(examples), 2)), {}
    for i in jobs:
        found = [next(verdicts) for _ in answers[i]]
        rows[i] = estimated_pass_at(len(found), sum(verdict.passed for verdict in found), k), 1
        notes[i] = [verdict.said for verdict in found]
    return Counts(rows, mean, unscored, notes)


def estimated_pass_at(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k), without bias, as a product that does not overflow.

    Reference: Chen et al. 2021, arXiv:2107.03374, figure 3.
    """
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))
