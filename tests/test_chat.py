"""`jlora chat`: answers, commands, ends, and what reaches the terminal."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from command import on_a_terminal
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.cli.adapters import adapter_places
from jlora.cli.chat.options import Chat
from jlora.cli.chat.session import Session
from jlora.cli.chat.talk import stopped_by_interrupt, talk
from jlora.cli.chat.voices import Voices, load_voices
from jlora.cli.config_file import joined
from jlora.data import Continued, decode_continuation, prompt_ids, read_records
from jlora.generation import advance, begin

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = {"max_new_tokens": 8, "temperature": 0.0, "top_k": 50, "top_p": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A Llama with a chat template and room for a few turns of its babble."""
    fields = tiny.LLAMA | {"max_position_embeddings": 256}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("chat") / "llama", fields, chat=tiny.CHATML)


@pytest.fixture(scope="module")
def voices_dir(tmp_path_factory, chat_dir):
    """Two adapters that make the model say something else."""
    directory = tmp_path_factory.mktemp("voices")
    _, params = jlora.load(chat_dir, dtype=np.float32)
    for name, seed in (("gull", 1), ("tide", 2)):
        config = jlora.LoraConfig(rank=2 * seed, targets=["q_proj", "down_proj"])
        adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(seed)))
        wave = jax.tree.map(lambda x, s=seed: x + 0.3 * np.sin(s * np.arange(x.size).reshape(x.shape)), adapter)
        jlora.save_adapter(directory / name, jlora.combine(wave, base), config=config, base_model=chat_dir)
    return directory


@pytest.fixture
def chat(monkeypatch, call):
    """Runs the command on lines; gives (standard output, standard error)."""

    def talked(*flags, lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        return call("chat", *flags)

    return talked


@pytest.fixture
def session(chat_dir):
    model, voices, tokenizer, _ = load_voices(Chat(model=chat_dir))
    return Session(model, voices, tokenizer, SETTINGS)


def said(session, text, **options):
    return "".join(session.answer(text, **options))


def expected(directory, messages, params=None, new=8):
    model, base = jlora.load(directory, dtype=np.float32)
    tokenizer = jlora.load_tokenizer(directory)
    ids = prompt_ids({"messages": messages}, tokenizer, template="chat")
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (row,) = jlora.generate(model, params or base, [ids], max_new_tokens=new, temperature=0, eos_token_id=eos)
    return decode_continuation(tokenizer, ids, row)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.slow
def test_a_pipe_gets_the_answers_alone_with_the_history_in_the_template(chat, chat_dir, tmp_path):
    flags = ["--model", chat_dir, "--temperature", 0, "--max-new-tokens", 8, "--system", "rain"]
    out, err = chat(*flags, lines=["the keeper", "", "wind", f"/save {tmp_path / 'c.jsonl'}", "/help"])
    system = {"role": "system", "content": "rain"}
    first = expected(chat_dir, [system, user("the keeper")])
    second = expected(chat_dir, [system, user("the keeper"), assistant(first), user("wind")])
    assert out == f"{first}\n{second}\n"
    assert "cut here after 8 tokens" in err and "/undo" in err and "a second" not in err
    ((_, record),) = read_records(tmp_path / "c.jsonl")
    turns = [system, user("the keeper"), assistant(first), user("wind"), assistant(second)]
    assert [{k: turn[k] for k in ("role", "content")} for turn in record["messages"]] == turns


@pytest.mark.slow
def test_adapters_are_switched_without_compiling(chat, chat_dir, voices_dir):
    flags = ["--adapter", voices_dir, "--temperature", 0, "--max-new-tokens", 8]
    lines = ["the keeper", "/reset", "/adapter tide", "the keeper", "/reset", "/base", "the keeper", "/adapter"]
    chat(*flags, lines=lines[:1])
    before = begin._cache_size(), advance._cache_size()
    out, err = chat(*flags, lines=[*lines, "/set top_k 3", "/set temperature 0.7", "/reset", "the keeper"])
    assert (begin._cache_size(), advance._cache_size()) == before
    _, base = jlora.load(chat_dir, dtype=np.float32)
    trees = [jlora.load_adapter(voices_dir / name, base) for name in ("gull", "tide")]
    answers = [expected(chat_dir, [user("the keeper")], tree) for tree in (*trees, base)]
    assert out.startswith("".join(f"{answer}\n" for answer in answers)) and len(set(answers)) == 3
    assert "adapters: gull, tide; now the base" in err
    alone = chat("--adapter", voices_dir / "tide", *flags[2:], lines=["the keeper", "/reset", "/base", "the keeper"])
    assert alone.out == f"{answers[1]}\n{answers[2]}\n"


@pytest.mark.slow
def test_an_adapter_that_cannot_stand_beside_others(chat, chat_dir, tmp_path):
    _, params = jlora.load(chat_dir, dtype=np.float32)
    config = jlora.LoraConfig(rank=2, targets=["q_proj"], use_dora=True)
    jlora.save_adapter(
        tmp_path / "gale" / "adapter",
        jlora.add_lora(params, config, key=jax.random.key(0)),
        config=config,
        base_model=chat_dir,
    )
    out, err = chat(
        "--adapter", tmp_path / "gale" / "adapter", "--temperature", 0, "--max-new-tokens", 8,
        lines=["rain", "/reset", "/base", "rain", "/adapter gale"],
    )  # fmt: skip
    assert out == 2 * f"{expected(chat_dir, [user('rain')])}\n"
    assert "'gale' is more than a plain low-rank update" in err and "now the adapter gale" in err


def test_settings_history_and_what_is_wrong(session, tmp_path):
    session.set("temperature", "0.7")
    first, second = said(session, "rain"), (session.undo(), said(session, "rain"))[1]
    session.undo()
    session.set("seed", "0")
    assert said(session, "rain") == first != second
    assert session.turns == [user("rain"), assistant(first)] and session.undo() and not session.undo()
    aside, out = io.StringIO(), io.StringIO()
    from jlora._terminal import console

    lines = [
        "/set temperature -1", "/set temperature warm", "/set colour 3", "/set top_p=0.5", "/hlep", "/adapter gull", "/save",
        f"/save {tmp_path / 'c.jsonl'}", "/system rain", "/system", "/undo", "half \udc80", "//save",
        f"/save {tmp_path}/no/c.jsonl",
    ]  # fmt: skip
    talk(session, iter(lines), out=console(file=out), aside=console(file=aside))
    errors = aside.getvalue()
    for text in (
        "`temperature` must be 0 (greedy) or positive", "must be a number; got 'warm'", "no setting 'colour'", "top_p 0.5",
        "did you mean /help", "none was given (--adapter)", "/save needs a file", "nothing to save", "system prompt set",
        "no turn to take back", "half of a surrogate pair", "No such file",
    ):  # fmt: skip
        assert text in errors
    assert session.turns[0] == user("/save") and out.getvalue() == session.turns[1]["content"] + "\n"


def test_a_conversation_longer_than_the_model(session):
    """The last answers are cut where they end, and a turn for which there is no room is refused."""
    session.set("max_new_tokens", "400")
    said(session, "the keeper lit a lamp")
    assert "no more positions" in session.cut
    with pytest.raises(ValueError, match=r"positions\. /undo takes the last turn back, /reset begins anew"):
        said(session, "rain")
    kept = len(session.turns)
    with pytest.raises(ValueError, match="in fewer words"):
        said(session, "the keeper lit a lamp " * 60)
    assert len(session.turns) == kept


def test_an_answer_is_stopped_and_kept_as_far_as_it_came(session):
    whole = said(session, "the keeper")
    session.undo()
    with stopped_by_interrupt() as stopped:
        parts = []
        for part in session.answer("the keeper", stopped=stopped):
            parts.append(part)
            if len(parts) == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert session.cut == "stopped" and session.count in (3, 4)
    text = "".join(parts)
    assert whole.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")) and len(text) < len(whole)
    assert session.turns == [user("the keeper"), assistant(text)]
    assert said(session, "wind") == expected_after(session, "wind"), "the cache holds what was really said"


def expected_after(session, text):
    again = Session(session.model, session.voices, session.tokenizer, session.settings)
    again.turns = session.turns[:-2]
    return said(again, text)


def test_a_second_interrupt_is_one():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopped_by_interrupt() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


TOKENIZER = tiny.tokenizer()


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=12), st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12), st.text(max_size=12))
def test_streamed_text_is_whole_characters_and_all_of_it(prompt, noise, text):
    before = TOKENIZER(f"a{prompt}")["input_ids"]
    ids = [*TOKENIZER(text)["input_ids"], *noise]
    streamed = Continued(TOKENIZER, before)
    parts = [streamed.add(token) for token in ids]
    assert not any(part.endswith("\N{REPLACEMENT CHARACTER}") for part in parts)
    assert "".join([*parts, streamed.rest()]) == decode_continuation(TOKENIZER, before, ids)
    whole = Continued(TOKENIZER, before)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(map(whole.add, TOKENIZER(text)["input_ids"]))


def test_a_terminal_shows_what_a_model_writes_and_does_not_obey_it(session, monkeypatch):
    hostile = "a\x1b[2Jb\n\n  漢字 🌊\x9b31m"
    ids = [*session.tokenizer(hostile)["input_ids"], session.tokenizer.eos_token_id]
    monkeypatch.setattr("jlora.cli.chat.session.stream", lambda *a, **k: ([i] for i in ids))
    terminal, aside = on_a_terminal(), on_a_terminal()
    talk(session, iter(["hello"]), out=terminal, aside=aside)
    assert terminal.file.getvalue() == "a\\x1b[2Jb\n\n  漢字 🌊\\x9b31m\n"
    assert "tokens, " in aside.file.getvalue() and "a second]" in aside.file.getvalue()
    assert session.turns[-1] == assistant(hostile) and session.cut is None


def test_refusals(gpt2_dir, chat_dir, voices_dir, fails, tmp_path):
    assert "needs a tokenizer with a chat template" in fails("chat", "--model", gpt2_dir)
    assert "Give --model" in fails("chat")
    twice = [voices_dir / "gull", voices_dir]
    assert "Two adapters are called 'gull'" in fails("chat", "--adapter", *twice)
    assert "`top_p` in (0, 1]" in fails("chat", "--model", chat_dir, "--top-p", 2)


def test_voices_of_a_base_alone():
    assert Voices.of({"a": np.ones(1)}, {}).params(None) == {"a": np.ones(1)}


ON_ITS_TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background is started without
from jlora import cli
cli.main()
"""


@pytest.mark.slow
def test_on_a_real_terminal_interrupts_stop_answers_and_then_the_program(chat_dir):
    leader, follower = pty.openpty()
    flags = ["--model", chat_dir, "--max-new-tokens", "30", "--temperature", "0"]
    child = subprocess.Popen(
        [sys.executable, "-c", ON_ITS_TERMINAL, "chat", *flags],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    shown = b""

    def until(text, seconds=120):
        nonlocal shown
        deadline = time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([leader], [], [], 1)[0]:
                shown += os.read(leader, 4096)
        before, _, shown = shown.partition(text)
        return before

    def interrupt():
        time.sleep(2)  # readline shows its prompt a moment before it listens
        os.write(leader, b"\x03")

    try:
        until(b"Ctrl-D leaves")
        until(b"> ")
        os.write(leader, b"the keeper\n")
        until(b"a second]")
        until(b"> ")
        interrupt()
        until(b"again leaves")
        until(b"> ")
        os.write(leader, b"/set top_k 3\n")
        until(b"top_k 3")
        until(b"> ")
        interrupt()
        until(b"again leaves")
        until(b"> ")
        interrupt()
        with contextlib.suppress(OSError):  # how Linux ends a terminal that nobody has open any more
            while os.read(leader, 4096):
                pass
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        os.close(leader)


def test_adapters_have_the_names_that_they_are_given(voices_dir, tmp_path):
    """NAME=PLACE; a flag that is given again adds to what was given."""
    flags = ["--adapter", f"bird={voices_dir / 'gull'}", "--seed", "1", f"--adapter={voices_dir / 'tide'}"]
    assert joined(Chat, flags) == ["--seed", "1", "--adapter", flags[1], str(voices_dir / "tide")]
    assert list(adapter_places((flags[1], str(voices_dir / "tide")))) == ["bird", "tide"]
    (odd := tmp_path / "a=b").mkdir()
    assert adapter_places((str(odd),)) == {"a=b": odd}
    with pytest.raises(ValueError, match="gives one name to the adapters gull, tide"):
        adapter_places((f"x={voices_dir}",))
    with pytest.raises(ValueError, match="Two adapters are called 'tide'.*NAME=DIR"):
        adapter_places((str(voices_dir), f"tide={voices_dir / 'gull'}"))
