"""What commands and functions write appears whole or not at all: killed, on a full disk, and the same command again."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import yaml
from command import run
from savers import SAVERS

import jlora
from jlora import cli
from jlora.cli.config_file import flags_of, with_config_file
from jlora.cli.memory import Memory
from jlora.files.gguf import save_gguf
from jlora.storage import whole

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(llama_dir):
    """(model, params with an adapter that does something, config)."""
    config = jlora.LoraConfig(rank=2, targets=["q_proj"])
    model, params = jlora.load(llama_dir, dtype="float32")
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    adapter = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size, dtype=np.float32).reshape(x.shape)), adapter)
    return model, jlora.combine(adapter, base), config


@pytest.fixture(scope="module")
def adapter_dir(trained, llama_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    jlora.save_adapter(directory, trained[1], config=trained[2], base_model=llama_dir)
    return directory


@pytest.fixture(scope="module")
def tokenizer(llama_dir):
    return jlora.load_tokenizer(llama_dir)


savers = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)


def tree(path):
    if Path(path).is_file():
        return Path(path).read_bytes()
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


@pytest.mark.few(3)
@savers
def test_stopped_at_every_flush_and_rename_it_is_there_whole_or_not(save, trained, tokenizer, tmp_path, monkeypatch):
    """As a kill leaves it: nothing is cleaned up after it; then the same call again."""
    save(tmp_path / "whole", trained, tokenizer)
    expected = tree(tmp_path / "whole")
    calls = stop_at = 0
    remove, killed = whole._remove, False

    def stopping(call):
        def one(*args, **kwargs):
            nonlocal calls, killed
            calls += 1
            if calls == stop_at:
                killed = True
                raise Killed
            return call(*args, **kwargs)

        return one

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    monkeypatch.setattr(whole, "_remove", lambda work, lock: os.close(lock) if killed else remove(work, lock))
    for stop_at in (1, 2, 3, 5, 8, 13):  # noqa: B007
        calls, killed, path = 0, False, tmp_path / f"{stop_at}" / "whole"
        try:
            save(path, trained, tokenizer)
        except Killed:
            pass
        if not path.exists():
            stop_at, killed = 0, False
            save(path, trained, tokenizer)
        assert tree(path) == expected
        killed = False
        whole.remove_partial(path)
        assert os.listdir(path.parent) == ["whole"]


@savers
def test_a_full_disk_leaves_nothing_and_says_so(save, trained, tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(whole.NoSpace, match=r"^no space left on .* free\.$"):
        save(tmp_path / "out", trained, tokenizer)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    save(tmp_path / "out", trained, tokenizer)
    assert os.listdir(tmp_path) == ["out"]


LIMITED = """
import resource, signal, sys
sys.path[:0] = [{tests!r}]
import jax, numpy as np, jlora
from jlora.storage.whole import NoSpace
from savers import SAVERS
config = jlora.LoraConfig(rank=2, targets=["q_proj"])
model, params = jlora.load({model!r}, dtype="float32")
tokenizer = jlora.load_tokenizer({model!r})
trained = model, jlora.add_lora(params, config, key=jax.random.key(0)), config
for name in {names!r}:
    SAVERS[name]("whole-" + name, trained, tokenizer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import os
for name in {names!r}:
    size = os.path.getsize("whole-" + name)
    for limit in (100, size // 2, size - 2000, size - 100, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            SAVERS[name]("short-" + name, trained, tokenizer)
            print(name, limit, "written", os.path.getsize("short-" + name), "of", size)
        except NoSpace as error:
            print(name, "refused", "large" in str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.slow
def test_a_gguf_file_is_never_cut_short(llama_dir, tmp_path):
    """By a limit on the size of files, in a process of its own: `ndarray.tofile` loses the error of the last bytes."""
    names = ["save_gguf", "save_gguf_adapter", "save_torch"]
    code = LIMITED.format(tests=str(Path(__file__).parent), model=llama_dir, names=names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} refused True" for name in names for _ in range(5)]
    assert sorted(os.listdir(tmp_path)) == sorted(f"whole-{name}" for name in names)


def test_a_gguf_file_is_as_gguf_itself_writes_it(trained, tokenizer, tmp_path):
    """Its reader finds every tensor where it is, up to the last byte."""
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        save_gguf(tmp_path / dtype, trained[0], trained[1], tokenizer=tokenizer, dtype=dtype)
        tensors = gguf.GGUFReader(tmp_path / dtype).tensors
        end = max(t.data_offset + t.n_bytes for t in tensors)
        assert 0 <= (tmp_path / dtype).stat().st_size - end < 32


@savers
def test_others_may_read_what_the_umask_lets_them(save, trained, tokenizer, tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "out", trained, tokenizer)
    finally:
        os.umask(before)
    made = [p for p in (tmp_path / "out", *(tmp_path / "out").rglob("*"))]
    assert {stat.S_IMODE(p.stat().st_mode) for p in made if p.is_file()} == {0o640}
    assert {stat.S_IMODE(p.stat().st_mode) for p in made if p.is_dir()} <= {0o750}


def test_an_adapter_is_replaced_whole(trained, adapter_dir, tmp_path, monkeypatch):
    """A run that is finished again writes over its adapter; the tokenizer beside it stays."""
    directory = tmp_path / "adapter"
    other = jlora.LoraConfig(rank=4, alpha=99.0, targets=["v_proj"])
    params = jlora.add_lora(jlora.remove_lora(trained[1]), other, key=jax.random.key(1))
    jlora.save_adapter(directory, params, config=other, base_model="b")
    (directory / "tokenizer.json").write_text("mine")
    jlora.save_adapter(directory, trained[1], config=trained[2], base_model="b")
    assert jlora.LoraConfig.load(directory).rank == 2 and (directory / "tokenizer.json").read_text() == "mine"
    assert sorted(os.listdir(directory)) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]

    # Stopped between the two files: no weights beside another's config.
    replace = Path.replace

    def stop_before_the_config(self, target):
        if Path(target) == directory / "adapter_config.json":
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop_before_the_config)
    with pytest.raises(Killed):
        jlora.save_adapter(directory, params, config=other, base_model="b")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        jlora.LoraConfig.load(directory)
    jlora.save_adapter(directory, params, config=other, base_model="b")
    assert jlora.LoraConfig.load(directory).rank == 4


def test_a_checkpoint_comes_into_a_directory_that_has_other_things(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    jlora.save_pretrained(tmp_path, trained[0], trained[1])
    assert {"notes.txt", "config.json", "model.safetensors"} <= set(os.listdir(tmp_path))
    with pytest.raises(FileExistsError, match="already holds"):
        jlora.save_pretrained(tmp_path, trained[0], trained[1])
    assert (tmp_path / "notes.txt").read_text() == "mine" and not [n for n in os.listdir(tmp_path) if "partial" in n]


# The commands

COMMANDS = {
    "merge": ["merge", "--adapter", "{adapter}"],
    "quantize": ["quantize", "--model", "{model}", "--block-size", "32"],
    **{
        to: ["export", "--to", to, "--adapter", "{adapter}"]
        for to in ("transformers", "torch", "gguf", "gguf-adapter", "ollama")
    },
    **{to: ["export", "--to", to, "--adapter", "{adapter}"] for to in ("mlx", "peft")},
}
KILLING = """
import os, signal, sys
calls = 0
def killing(call):
    def one(*args, **kwargs):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return one
os.fsync, os.rename, os.replace = map(killing, (os.fsync, os.rename, os.replace))
from jlora import cli
cli.main(sys.argv[1:])
"""


def flags_for(name, adapter_dir, llama_dir, output):
    places = {"adapter": adapter_dir, "model": llama_dir}
    return [flag.format(**places) for flag in COMMANDS[name]] + ["--output", str(output)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"), [("merge", 2), ("merge", 6), ("ollama", 3), ("quantize", 4), ("gguf", 1), ("mlx", 5)]
)
def test_killed_and_run_again(name, at, adapter_dir, llama_dir, tmp_path):
    output = tmp_path / "out"
    flags = flags_for(name, adapter_dir, llama_dir, output)
    done = subprocess.run([sys.executable, "-c", KILLING.format(at=at), *flags], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists() and len(os.listdir(tmp_path)) == 1
    assert run(*flags) == 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", COMMANDS)
def test_where_nothing_can_be_written_is_said_before_anything_is_loaded(
    name, adapter_dir, llama_dir, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr("jlora.files.hf.load", None)
    monkeypatch.setattr("jlora.cli.base.load", None)
    monkeypatch.setattr("jlora.cli.quantize.load", None)
    (tmp_path / "file").write_text("mine")
    said = fails(*flags_for(name, adapter_dir, llama_dir, tmp_path / "file" / "out"))
    assert "Not a directory" in said and "JLORA_TRACEBACK" not in said
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.safetensors").write_text("mine")
    said = fails(*flags_for(name, adapter_dir, llama_dir, tmp_path / "there"))
    assert "exists; choose another" in said or "already holds 'model.safetensors'; choose another" in said
    assert tree(tmp_path) == {"file": b"mine", "there/model.safetensors": b"mine"}


@pytest.mark.parametrize("output", ["exp[v2]", "a[/b]", "[red]", ":rocket:", "\x1b]0;t\x07", "x\ny", "--flag=a"])
def test_paths_are_printed_as_they_are(output, adapter_dir, llama_dir, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("export", "--to", "peft", "--adapter", adapter_dir, f"--output={output}").out
    assert said.startswith(f"{output}: an adapter for PEFT") and (tmp_path / output / "adapter_config.json").is_file()


def test_expressions_and_models_are_printed_as_they_are(llama_dir, trained, tmp_path, call):
    params = jlora.remove_lora(trained[1])
    for i, targets in enumerate((r".*\.[qv]_proj", r".*(q_proj|[/x])", r".*q_proj|:rocket:")):
        config = jlora.LoraConfig(rank=2, targets=targets)
        adapted = jlora.add_lora(params, config, key=jax.random.key(0))
        jlora.save_adapter(tmp_path / f"a[/{i}", adapted, config=config, base_model="[/x]")
        said = call("inspect", tmp_path / f"a[/{i}").out.replace("\n", "")
        assert json.dumps(targets) in said and "base [/x]" in said
    (tmp_path / "m[").mkdir()
    (tmp_path / "m[" / "b]").symlink_to(llama_dir)
    assert "m[/b]:linearkernels" in "".join(call("inspect", tmp_path / "m[/b]").out.split())  # wherever lines are cut
    assert "m[/b]: " in call("memory", "--model", tmp_path / "m[/b]", "--max-length", 16).out


def test_an_ollama_directory_of_any_name(adapter_dir, tmp_path, call):
    call("export", "--to", "ollama", "--adapter", adapter_dir, "--output", tmp_path / 'a"\nSYSTEM x')
    (directory,) = tmp_path.iterdir()
    assert (directory / "Modelfile").read_text().startswith("FROM ./model.gguf\n") and (
        directory / "model.gguf"
    ).is_file()


@pytest.mark.parametrize("where", ["file/x.json", "there"])
def test_an_evaluation_is_not_run_for_nothing(where, llama_dir, text_file, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("jlora.cli.evaluate.command.load_models", None)
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    said = fails("evaluate", "--model", llama_dir, "--data", text_file, "--output", tmp_path / where)
    assert "directory." in said and "JLORA_TRACEBACK" not in said


def test_an_evaluation_is_printed_also_when_its_file_cannot_be_written(
    llama_dir, text_file, tmp_path, capsys, monkeypatch
):
    def full(path, text):
        raise whole.NoSpace("no space left on x")

    monkeypatch.setattr("jlora.cli.evaluate.command.write_text", full)
    flags = ["--data", text_file, "--split", "all", "--max-length", 16, "--output", tmp_path / "e.json"]
    assert run("evaluate", "--model", llama_dir, *flags) == cli.FAILURE
    said = capsys.readouterr()
    assert json.loads(said.out)["eval_loss"] > 0 and "error: no space left on x." in said.err


def test_a_comparison_is_not_run_for_nothing(adapter_dir, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("jlora.cli.compare.load_models", None)
    (tmp_path / "file").touch()
    said = fails("compare", "--adapter", adapter_dir, "--prompts", "x", "--output", tmp_path / "file" / "x")
    assert "Not a directory" in said and "JLORA_TRACEBACK" not in said


# --config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("targets: []\n", "sets 'targets' to [], an empty list; name at least one, or leave the line out"),
        ("rank:\n", "sets 'rank' to None, which is nothing; give a value"),
        ("template: no\n", "sets 'template' to False, as YAML reads it, a bool; it is text: write it in quotes"),
        ("output: 010\n", "sets 'output' to 8, as YAML reads it, a int; it is text: write it in quotes"),
        ("targets: [q_proj, on]\n", "it is text: write it in quotes"),
        ("targets: [[q_proj]]\n", "a list; flags take numbers, text, true and false, and lists of these"),
        ("targets: {a: b}\n", "a dict; flags take"),
        ("data: 2024-01-01\n", "a date; flags take"),
        ("rank: [8, 16]\n", "a list; it takes one value"),
        ("rank: true\n", "as YAML reads it, a bool"),
        ("pack: 1\n", "and is true or false"),
        ('pack: "yes"\n', "and is true or false"),
        ("targets: [--seed=7]\n", "would be taken for a flag"),
        ("batch_size: 1\nbatch-size: 2\n", "sets 'batch-size' twice"),
        ("a: &x [1]\nb: *x\n", "has an alias"),
        ("1: 2\n", "must map names to values"),
        ("targets: !!python/name:os.system\n", "is not valid YAML"),
        ("x: " + "[" * 100 + "]" * 100 + "\n", "nested deeper than 64"),
        ("\0", "is not valid YAML"),
        ("just text\n", "must map names to values; got a str"),
    ],
)
def test_a_config_file_says_what_is_wrong_with_it(text, says, tmp_path, fails):
    (tmp_path / "run.yaml").write_text(text)
    said = fails("finetune", "--config", tmp_path / "run.yaml")
    assert says in said and "run.yaml" in said and "JLORA_TRACEBACK" not in said


def test_a_config_file_that_is_none(tmp_path, fails):
    (tmp_path / "latin.yaml").write_bytes("model: Köln\n".encode("latin-1"))
    assert "must be UTF-8; got byte 0xf6" in fails("finetune", "--config", tmp_path / "latin.yaml")
    assert "cannot be read" in fails("finetune", "--config", tmp_path)


def test_values_that_look_like_flags_are_values(tmp_path):
    (tmp_path / "run.yaml").write_text('model: "--adapter"\ndata: -x\nseed: -1\nlayers_to_transform: [-1, 0]\n')
    flags = with_config_file(jlora.FinetuneConfig, ["--config", str(tmp_path / "run.yaml")])
    assert flags == ["--model=--adapter", "--data=-x", "--seed=-1", "--layers-to-transform", "-1", "0"]


def test_the_config_of_every_command_reads_back(tmp_path):
    """As a run writes it: every field, with text in quotes where it must be."""
    config = jlora.FinetuneConfig(
        model="010", data="no", output="1e5", targets=("on", "2024-01-01"), layers_to_transform=(0, 1)
    )
    import dataclasses

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    import tyro

    assert tyro.cli(jlora.FinetuneConfig, args=flags_of(jlora.FinetuneConfig, tmp_path / "config.yaml")) == config
    memory = Memory(model="[/x]")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(memory)))))
    assert tyro.cli(Memory, args=flags_of(Memory, tmp_path / "config.yaml")) == memory
