"""`jlora push` against a server here that speaks the hub's protocol: what arrives, the card, and what goes wrong."""

import ast
import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import jax
import pytest
import tiny
import yaml
from command import run
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import jlora
from jlora.cli import push
from jlora.cli.config_file import flags_of
from jlora.publish.card import RunRecord, _use_gguf, _use_mlx, model_card, read_publication

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKEN = "hf_of_the_tests"
REPO = "somebody/tiny-adapter"


class Hub(ThreadingHTTPServer):
    """The calls of huggingface_hub that a push makes, over HTTP: repositories in memory, LFS by git-lfs's batch API."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict] = {}  # name -> {"private", "branches": {name: {path: bytes}}, "commits"}
        self.lfs: dict[str, bytes] = {}
        self.failures: dict[str, tuple] = {}  # part of a path -> (status, body)
        self.ignored: set[str] = set()
        self.calls: list[str] = []

    def files(self, repo=REPO, branch="main"):
        return self.repos[repo]["branches"][branch]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Not to the console."""

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        hub, path, data = self.server, urlsplit(self.path).path, self.body()
        hub.calls.append(f"{self.command} {path}")
        for part, (status, text) in hub.failures.items():
            if part in path:
                return self.answer(status, text)
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        for pattern, call in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return call(self, data, *match.groups())
        return self.answer(404, {"error": f"no such call: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self, data):
        fields = json.loads(data)
        name = f"{fields.get('organization') or 'somebody'}/{fields['name']}"
        there = name in self.server.repos
        if not there:
            private = fields.get("visibility") == "private" or fields.get("private") is True
            self.server.repos[name] = {"private": private, "branches": {"main": {}}, "commits": []}
        self.answer(409 if there else 200, {"url": f"{self.server.url}/{name}"})

    def info(self, data, repo):
        self.answer(200, {"id": repo, "private": self.server.repos[repo]["private"]})

    def branch(self, data, repo, name):
        branches = self.server.repos[repo]["branches"]
        there = name in branches
        branches.setdefault(name, dict(branches["main"]))
        self.answer(409 if there else 200, {})

    def validate(self, data):
        front = json.loads(data)["content"].split("---\n")[1]
        good = isinstance(yaml.safe_load(front), dict)
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "not a mapping"}], "warnings": []})

    def preupload(self, data, repo, branch):
        files = json.loads(data)["files"]
        large = (".safetensors", ".png")
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                "shouldIgnore": f["path"] in self.server.ignored,
            }
            for f in files
        ]
        self.answer(200, {"files": modes})

    def batch(self, data, repo):
        objects = json.loads(data)["objects"]
        actions = {o["oid"]: {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}} for o in objects}
        self.answer(200, {"transfer": "basic", "objects": [{**o, "actions": actions[o["oid"]]} for o in objects]})

    def put(self, data, oid):
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.lfs[oid] = data
        self.answer(200)

    def commit(self, data, repo, branch):
        lines = [json.loads(line) for line in data.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
                assert value["size"] == len(files[value["path"]])
        self.server.files(repo, branch).update(files)
        self.server.repos[repo]["commits"].append((branch, lines[0]["value"]["summary"], sorted(files)))
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/0", "commitOid": "0" * 40})

    def tree(self, data, repo, branch):
        files = self.server.files(repo, branch)
        self.answer(200, [{"type": "file", "path": p, "size": len(x), "oid": "0" * 40} for p, x in files.items()])


NAME = r"([\w-]+/[\w-]+)"
ROUTES = {
    r"POST /api/repos/create": Handler.create,
    rf"GET /api/models/{NAME}": Handler.info,
    rf"POST /api/models/{NAME}/branch/(.+)": Handler.branch,
    r"POST /api/validate-yaml": Handler.validate,
    rf"POST /api/models/{NAME}/preupload/(.+)": Handler.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /lfs/(\w+)": Handler.put,
    rf"POST /api/models/{NAME}/commit/(.+)": Handler.commit,
    rf"GET /api/models/{NAME}/tree/([^/]+)": Handler.tree,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()  # they go to stderr, where the tests read the error
    yield server
    enable_progress_bars()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, gpt2_dir, text_file):
    """A run, with checkpoints and data, and a file that somebody left beside its adapter."""
    output = tmp_path_factory.mktemp("push") / "run"
    config = jlora.FinetuneConfig(
        model=gpt2_dir, data=text_file, output=str(output), rank=2, targets=("c_attn",), steps=3, batch_size=2,
        max_length=16, learning_rate=1e-2, eval_every=3, quiet=True,
    )  # fmt: skip
    jlora.finetune(config)
    (output / "adapter" / ".env").write_text("HF_TOKEN=hf_secret")
    (output / "adapter" / "notes.txt").write_text("private")
    return output


def snapshot(directory):
    return {p: p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


# What arrives


@pytest.mark.slow
def test_a_run_arrives_whole_and_nothing_else(hub, finetuned, capsys):
    before = snapshot(finetuned)
    assert run("push", finetuned, REPO, "--base-model", "somebody/tiny-gpt2", "--license", "mit") == 0
    said = capsys.readouterr().out
    files = hub.files()
    adapter = finetuned / "adapter"
    known = {p.name for p in adapter.iterdir()} - {".env", "notes.txt"}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= known
    assert set(files) == known | {"README.md", "loss.png"}
    for name in known - {"adapter_config.json", "jlora_run.json"}:
        assert files[name] == (adapter / name).read_bytes(), name
    # The base is a path of this machine: the flag's name goes up in its place, the file here stays.
    here, there = json.loads((adapter / "adapter_config.json").read_text()), json.loads(files["adapter_config.json"])
    assert there == here | {"base_model_name_or_path": "somebody/tiny-gpt2"} != here
    settings = [json.loads(text) for text in ((adapter / "jlora_run.json").read_bytes(), files["jlora_run.json"])]
    assert settings[0]["data"] and settings[1] == settings[0] | {"data": None}
    assert files["loss.png"].startswith(b"\x89PNG")
    assert snapshot(finetuned) == before
    assert hub.repos[REPO]["commits"] == [("main", "Upload LoRA adapter with jlora", sorted(files))]
    assert hub.url + "/" + REPO in said
    for left in (".env", "notes.txt", "checkpoints/", "data/", "config.yaml", "metrics.jsonl"):
        assert re.search(rf"^{re.escape(left)} +stays here", said, re.MULTILINE), left
    everything = b"".join(files.values())
    assert b"hf_secret" not in everything and str(finetuned).encode() not in everything


@pytest.mark.slow
@pytest.mark.parametrize("what", ["", "adapter"])
def test_without_flags_every_byte_is_the_files(what, hub, finetuned):
    """The run, or its adapter directory, which finds the run beside it."""
    assert run("push", finetuned / what, REPO) == 0
    files = hub.files()
    for path in read_publication(finetuned).files().values():
        assert path.name == "jlora_run.json" or files[path.name] == path.read_bytes()
    assert "| learning rate | 0.01 |" in files["README.md"].decode()


@pytest.mark.slow
def test_what_is_asked_for_goes_up_too(hub, finetuned):
    assert run("push", finetuned, REPO, "--include", "metrics", "config", "checkpoints") == 0
    files = hub.files()
    for name in ("metrics.jsonl", "config.yaml", "run.json"):
        assert files[name] == (finetuned / name).read_bytes()
    stored = {p.relative_to(finetuned).as_posix() for p in (finetuned / "checkpoints").rglob("*") if p.is_file()}
    assert stored and stored <= set(files) and not any(name.startswith("data/") for name in files)


def test_an_adapter_without_a_run(hub, gpt2_dir, tmp_path):
    _, params = jlora.load(gpt2_dir, dtype="float32")
    config = jlora.LoraConfig(rank=2, targets=["c_attn"], use_dora=True)
    params = jlora.add_lora(params, config, key=jax.random.key(0))
    model, _ = jlora.load(gpt2_dir, dtype="float32")
    jlora.save_adapter(tmp_path / "peft", params, config=config, base_model="gpt2")
    jlora.save_mlx_adapter(tmp_path / "mlx", params, config=config, model=model, base_model="gpt2")
    for name, library in (("peft", "peft"), ("mlx", "mlx")):
        repo = f"somebody/{name}"
        assert run("push", tmp_path / name, repo) == 0
        files = hub.files(repo)
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} | {
            "README.md": files["README.md"]
        } == files
        card = files["README.md"].decode()
        fields = front_matter(card)
        assert (fields["library_name"], fields["base_model"]) == (library, "gpt2")
        assert "| use dora | True |" in card and "| targets | `" in card
        assert "loss" not in card and "license" not in fields and "datasets" not in fields
    assert "mlx_lm.generate" in card


def test_a_checkpoint_with_the_run_it_came_from(hub, finetuned, tmp_path):
    merged = tmp_path / "merged"
    assert run("merge", "--adapter", finetuned / "adapter", "--output", merged) == 0
    assert run("push", merged, REPO, "--run", finetuned) == 0
    files = hub.files()
    assert {p.name for p in merged.iterdir()} | {"README.md", "loss.png"} == set(files)
    assert files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert front_matter(card)["library_name"] == "transformers" and "perplexity" in card


def test_gguf_models(hub, finetuned, tmp_path):
    assert run("export", "--adapter", finetuned / "adapter", "--to", "gguf", "--output", tmp_path / "tiny.gguf") == 0
    assert run("push", tmp_path / "tiny.gguf", "somebody/one") == 0
    assert hub.files("somebody/one")["tiny.gguf"] == (tmp_path / "tiny.gguf").read_bytes()
    assert "llama-cli -m model/tiny.gguf" in hub.files("somebody/one")["README.md"].decode()
    (tmp_path / "ollama").mkdir()
    (tmp_path / "tiny.gguf").rename(tmp_path / "ollama" / "tiny.gguf")
    (tmp_path / "ollama" / "Modelfile").write_text("FROM ./tiny.gguf\n")
    (tmp_path / "ollama" / "key.pem").write_text("secret")
    assert run("push", tmp_path / "ollama", "somebody/two") == 0
    assert set(hub.files("somebody/two")) == {"tiny.gguf", "Modelfile", "README.md"}


def test_private_revision_and_message(hub, finetuned):
    assert run("push", finetuned, REPO, "--private", "--revision", "v2", "--message", "Second try") == 0
    assert hub.repos[REPO]["private"] and hub.repos[REPO]["commits"][0][:2] == ("v2", "Second try")
    assert not hub.files(REPO, "main")


@pytest.mark.slow
def test_the_environment_names_the_endpoint_and_the_token(hub, finetuned):
    """As a user runs it, in a process of its own."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-c", "from jlora.cli import main; main()", "push", str(finetuned), REPO]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert "adapter_model.safetensors" in hub.files()


# An existing repository, an existing card


def test_a_second_push_updates_and_keeps_a_card_that_is_there(hub, finetuned, capsys):
    assert run("push", finetuned, REPO) == 0
    hub.files()["README.md"] = b"---\nlicense: mit\n---\nWritten on the hub."
    hub.files()["other.txt"] = b"stays"
    assert run("push", finetuned, REPO) == 0
    assert "README.md of the repository was kept" in capsys.readouterr().out
    assert hub.files()["README.md"].endswith(b"Written on the hub.") and hub.files()["other.txt"] == b"stays"
    assert run("push", finetuned, REPO, "--overwrite-card") == 0
    assert hub.files()["README.md"].startswith(b"---\n") and b"Written on the hub" not in hub.files()["README.md"]


def test_a_card_beside_the_adapter_is_the_users(hub, finetuned, tmp_path, capsys):
    shutil.copytree(finetuned / "adapter", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\nMy own words.")
    assert run("push", tmp_path / "mine", REPO) == 0
    assert hub.files()["README.md"].endswith(b"My own words.")
    assert "--overwrite-card" in capsys.readouterr().out
    assert run("push", tmp_path / "mine", REPO, "--overwrite-card") == 0
    assert b"My own words" not in hub.files()["README.md"]
    assert (tmp_path / "mine" / "README.md").read_text().endswith("My own words.")


def test_a_public_repository_is_not_taken_for_a_private_one(hub, finetuned, fails):
    assert run("push", finetuned, REPO) == 0
    hub.files().clear()
    assert "exists and is public, so nothing was pushed" in fails("push", finetuned, REPO, "--private")
    assert not hub.files()


# The dry run


def test_a_dry_run_shows_all_and_contacts_nobody(hub, finetuned, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert run("push", finetuned, REPO, "--dry-run", "--license", "mit", "--base-model", "somebody/tiny-gpt2") == 0
    said = capsys.readouterr().out
    assert not hub.calls and not hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run("push", finetuned, REPO, "--license", "mit", "--base-model", "somebody/tiny-gpt2") == 0
    for name, content in hub.files().items():
        assert re.search(rf"^{re.escape(name)} +{len(content):,} ", said, re.MULTILINE), name
    assert hub.files()["README.md"].decode() in said
    assert "nothing was sent" in said


# The card


def test_the_card_says_how_the_adapter_came_to_be(finetuned):
    publication = read_publication(finetuned)
    card = model_card(publication, REPO, base_model="somebody/tiny-gpt2", license="mit", curve=True)
    assert front_matter(card) == {
        "base_model": "somebody/tiny-gpt2",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "jlora"],
        "license": "mit",
    }
    log = tiny.read_log(finetuned)
    first, last = (e["loss"] for e in (log[1], log[-1]))
    before, after = log[0]["eval_loss"], log[-1]["eval_loss"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    for row in (
        ["rank", "2"], ["alpha", "16.0"], ["targets", "`c_attn`"], ["batch size", "2"], ["steps", "3"], ["seed", "0"],
        ["training, first step", "1", f"{first:.4f}"], ["training, last step", "3", f"{last:.4f}"],
        ["evaluation, before training", "0", f"{before:.4f}"], ["evaluation, this adapter", "3", f"{after:.4f}"],
    ):  # fmt: skip
        assert any(found[: len(row)] == row for found in rows), row
    assert "![training and evaluation loss by step](loss.png)" in card
    assert "Data: `logbook.txt`" in card and str(finetuned.parent) not in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        ast.parse(code)
    assert 'PeftModel.from_pretrained(base, "somebody/tiny-adapter")' in card and "jlora.load_adapter(" in card
    assert ModelCard(card).data.base_model == "somebody/tiny-gpt2"
    # Nothing is invented: no license and no base without a flag, as this base is a path.
    plain = front_matter(model_card(publication, REPO))
    assert not {"license", "base_model", "base_model_relation", "datasets"} & set(plain)
    # A directory called "gpt2" is not the hub's gpt2.
    assert 'from_pretrained("path/to/gpt2")' in model_card(publication, REPO)


@pytest.mark.parametrize(
    ("data", "shards", "named"),
    [
        ("tatsu-lab/alpaca", False, ["tatsu-lab/alpaca"]),
        ("tatsu-lab/alpaca", True, None),
        ("records.jsonl", False, None),
        ("/home/somebody/secret.jsonl", False, None),
        ("../up/and/down", False, None),
    ],
)
def test_only_data_of_the_hub_are_named_as_such(data, shards, named, finetuned, tmp_path):
    record = RunRecord.read(finetuned)
    (tmp_path / "data").mkdir()
    if shards:
        (tmp_path / "data" / "tokens.bin").touch()
    config = {**record.config, "data": data, "quantize": "nf4", "save": "best"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in record.history))
    (tmp_path / "adapter").symlink_to(finetuned / "adapter")
    card = model_card(read_publication(tmp_path), REPO)
    assert front_matter(card).get("datasets") == named
    assert front_matter(card)["tags"] == ["lora", "qlora", "jlora"]
    assert "/home" not in card and ".." not in card.split("## Use")[0]


HOSTILE = [
    'evil"); import os; os.system("id")#/x',
    "a\nb",
    "`a` | <script>",
    "/home/me/`id`$(id)",
    "/x/```\n# Title",
    '../x"y',
    "x/\x1b[2Jy",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_stay_text_in_the_card(name, finetuned, tmp_path):
    """In code of Python and of the shell, in tables and in sentences."""
    shutil.copytree(finetuned / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    record = RunRecord.read(finetuned)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**record.config, "data": name, "targets": [name]}))
    shutil.copy(finetuned / "metrics.jsonl", tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    card = model_card(read_publication(tmp_path), REPO)
    plain = model_card(read_publication(finetuned), REPO)
    assert card.count("\n") == plain.count("\n") and "\x1b" not in card
    assert [line for line in card.splitlines() if line.startswith(("```", "#", "---"))] == [
        line for line in plain.splitlines() if line.startswith(("```", "#", "---"))
    ]
    front_matter(card)
    for code in re.findall(r"```python\n(.*?)```\n", card, re.DOTALL):
        calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "system"]
    prose = re.sub(r"(`+).*?\1", "", re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE))
    assert "<script>" not in prose, "only within code"


def test_names_stay_words_in_the_shell(finetuned, tmp_path):
    publication = read_publication(finetuned)
    card = "\n".join(_use_mlx(dataclasses.replace(publication, base="/x/$(id) `id`"), REPO))
    assert "--model 'path/to/$(id) `id`' --adapter-path" in card
    (tmp_path / "a $(id).gguf").touch()
    card = "\n".join(_use_gguf(read_publication(tmp_path), REPO))
    assert "llama-cli -m 'model/a $(id).gguf'" in card


@pytest.mark.parametrize(
    ("config", "log", "says"),
    [
        ("data: 1", None, "`data` in config.yaml must be text; got 1"),
        ("model: [a]", None, "`model` in config.yaml must be text"),
        ("- a", None, "must map names to values; got a list"),
        ("a: *b", None, "has an alias"),
        ("", None, "must map names to values; got nothing"),
        (None, '{"loss": 1.0}', "metrics.jsonl line 1: `step` is missing; it must be an integer"),
        (
            None,
            '{"step": "3", "loss": 1.0}',
            "metrics.jsonl line 1: `step` must be an integer from 0 to 2147483647; got '3'",
        ),
        (None, '{"step": 1, "loss": "x"}', "metrics.jsonl line 1: `loss` must be a finite number; got 'x'"),
        (None, '{"step": 0, "eval_loss": NaN}', "metrics.jsonl line 1: `eval_loss` must be a finite number; got nan"),
        (None, "7", "metrics.jsonl line 1 must hold an object"),
        (None, "", "metrics.jsonl line 1 is not valid JSON"),
    ],
)
def test_a_damaged_run_is_named(config, log, says, finetuned, tmp_path, fails):
    shutil.copytree(finetuned / "adapter", tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(config if config is not None else "model: a/b\ndata: x.txt\n")
    (tmp_path / "metrics.jsonl").write_text("" if log is None else log + "\n")
    said = fails("push", tmp_path, REPO, "--dry-run")
    assert says in said and "cannot be read" in said and "JLORA_TRACEBACK" not in said


def test_a_log_without_learning_rates_is_drawn(hub, finetuned, tmp_path):
    shutil.copytree(finetuned / "adapter", tmp_path / "adapter")
    shutil.copy(finetuned / "config.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert run("push", tmp_path, REPO) == 0 and hub.files()["loss.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["tokenizer.model", "adapter_model.safetensors", "README.md", "chat_template.jinja"])
def test_links_out_of_the_directory_are_refused(name, hub, finetuned, fails, tmp_path):
    shutil.copytree(finetuned / "adapter", tmp_path / "mine")
    (tmp_path / "secret").write_bytes((finetuned / "adapter" / "adapter_model.safetensors").read_bytes())
    (tmp_path / "mine" / name).unlink(missing_ok=True)
    (tmp_path / "mine" / name).symlink_to("../secret")
    said = fails("push", tmp_path / "mine", REPO)
    assert name in said and "is a link out of the directory" in said and str(tmp_path / "secret") in said
    assert not hub.calls and "is a link" in fails("push", tmp_path / "mine", REPO, "--dry-run")


def test_links_of_a_run_and_within_a_directory(hub, finetuned, fails, tmp_path):
    """What is pushed may be reached by a link, and hold links to what is in it."""
    shutil.copytree(finetuned, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "tokenizer.model").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to("run")
    assert run("push", tmp_path / "link", REPO) == 0
    assert hub.files()["tokenizer.model"] == hub.files()["tokenizer.json"]
    (tmp_path / "run" / "checkpoints" / "secret").symlink_to("/etc/hostname")
    assert "is a link out of the directory" in fails("push", tmp_path / "run", REPO, "--include", "checkpoints")


@pytest.mark.parametrize("text", [f"Authorization: Bearer {TOKEN}", TOKEN, f'{{"token": "{TOKEN}"}}'])
def test_a_server_that_echoes_the_token(text, hub, finetuned, fails, monkeypatch):
    hub.failures = {"/api/repos/create": (400, {"error": text})}
    said = fails("push", finetuned, REPO)
    assert TOKEN not in said and "(status 400)" in said


# What goes wrong


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("where", "status", "says"),
    [
        ("/api/repos/create", 401, "the token was refused. Log in with a valid one (`hf auth login`"),
        ("/api/repos/create", 403, "the token may not write there. Use a token with write permission"),
        ("/api/repos/create", 500, "the hub failed with status 500. Push again later. Nothing was pushed."),
        ("/commit/", 403, "the token may not write there"),
        ("/commit/", 500, "A push is one commit: the repository is there, its files are as they were."),
        ("/commit/", 413, "(status 413)"),
    ],
)
def test_what_the_hub_refuses(where, status, says, hub, finetuned, fails, monkeypatch):
    before = snapshot(finetuned)
    hub.failures = {where: (status, {"error": "no"})}
    if where == "/api/repos/create" and status < 500:
        hub.failures["/api/models/"] = (status, {"error": "no"})  # the client asks whether it is there already
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    said = fails("push", finetuned, REPO)
    assert says in said and "The files here are untouched." in said and "JLORA_TRACEBACK" not in said
    assert snapshot(finetuned) == before
    assert not hub.repos.get(REPO, {}).get("commits")
    hub.failures = {}
    assert run("push", finetuned, REPO) == 0, "and once it is mended, the same command does it"


def test_a_hub_that_fails_after_the_commit(hub, finetuned, fails, monkeypatch):
    hub.failures = {"/tree/": (500, {"error": "no"})}
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    said = fails("push", finetuned, REPO, "--overwrite-card")
    assert "The files were sent, but not looked at again." in said and "tokenizer.json" in hub.files()


def test_a_card_that_the_hub_does_not_take(hub, finetuned, fails, tmp_path):
    shutil.copytree(finetuned / "adapter", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\n- a\n- list\n---\n")
    said = fails("push", tmp_path / "mine", REPO)
    assert "Invalid metadata in README.md. - not a mapping" in said and not hub.files()


def test_no_token(hub, finetuned, fails, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = fails("push", finetuned, REPO)
    assert "There is no Hugging Face token" in said and "hf auth login" in said and not hub.calls


def test_a_wrong_token(hub, finetuned, fails, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    said = fails("push", finetuned, REPO)
    assert "the token was refused" in said and "hf_another" not in said and not hub.repos


def test_nobody_answers(hub, finetuned, fails, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Check the repository's name, the network and HF_ENDPOINT" in fails("push", finetuned, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = fails("push", finetuned, REPO)
    assert "OfflineModeIsEnabled" in said and "offline mode" in said and ".." not in said


def test_a_name_that_is_none(hub, finetuned, fails):
    for name in ("a/b/c", "../x", "/x", "x/", "a b/c", "a..b", "a\nb", "", "a/b.git"):
        for dry in ((), ("--dry-run",)):
            assert "is called user/name" in fails("push", finetuned, name, *dry) and not hub.calls
    assert "is called user/name" in fails("push", finetuned, "a/b", "--base-model", "/home/me/gpt2") and not hub.calls


def test_a_file_that_the_repository_ignores_is_missed(hub, finetuned, fails):
    """huggingface_hub passes over what the repository's .gitignore names, and says nothing."""
    hub.ignored = {"tokenizer.json"}
    assert "did not take tokenizer.json (does it have a .gitignore" in fails("push", finetuned, REPO)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: None, "holds nothing to push"),
        (lambda d: d.rmdir(), "There is no"),
        (lambda d: (d / "config.yaml").write_text("a: 1"), "has no adapter yet"),
        (lambda d: [(d / "adapter").mkdir(), (d / "config.yaml").touch()], "there is no metrics.jsonl"),
        (
            lambda d: [
                (d / "adapter").mkdir(),
                (d / "config.yaml").write_text("a: 1"),
                (d / "metrics.jsonl").write_text("{"),
            ],
            "cannot be read",
        ),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "peft_type 'LOHA' or 'LORA'"),
        (
            lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["a"]}'),
            "There is no adapter_model.safetensors",
        ),
        (lambda d: (d / "config.json").write_text("{}"), "There is no model.safetensors"),
    ],
)
def test_what_is_not_there_is_not_pushed(make, says, hub, fails, tmp_path):
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    assert says in fails("push", tmp_path / "x", REPO) and not hub.calls


def test_files_of_a_run_need_a_run(hub, finetuned, fails, tmp_path):
    shutil.copytree(finetuned / "adapter", tmp_path / "mine")
    assert "`--include` means files of a run" in fails("push", tmp_path / "mine", REPO, "--include", "metrics")


def test_places_are_not_flags(tmp_path):
    (tmp_path / "push.yaml").write_text("private: true\nlicense: mit\n")
    assert flags_of(push.Push, tmp_path / "push.yaml") == ["--private", "--license", "mit"]
    (tmp_path / "push.yaml").write_text("repo: a/b\n")
    with pytest.raises(ValueError, match="given on the command line, without a flag"):
        flags_of(push.Push, tmp_path / "push.yaml")


def test_the_hub_client_is_a_dependency():
    """Imported directly, so named in pyproject.toml."""
    assert '"huggingface-hub>=' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert huggingface_hub.__version__
