"""Raw text: shards, windows, streaming, and what is refused."""

import io
import json
import os
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
from tokenizer_kinds import KINDS, make
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jlora.data import IGNORED, TextDataset, kind_of, load_data, prepare_text, preview, summary
from jlora.data import text as text_module
from jlora.data.chunks import CONTEXT, context_of, encode_chunks, stable_chunks
from jlora.data.tokens import encode, fingerprint, pad_id
from jlora.storage.lock import InUse, only_writer
from jlora.storage.whole import NoSpace

EOT = "<|endoftext|>"
STORY = "".join(
    f"Chapter {i}{'.' * (i % 3)}{chr(10) * (i % 4 + 1)}It's the {i * 37}th day; naïve cats (and dogs) said: “hé, "
    f"東京!”  Then they ran\taway{' ' * (i % 5)}\n\n\n  indented line\r\n\r\n* item{chr(10) * (i % 5)}"
    for i in range(60)
)
# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/tokenizer.json, pre_tokenizer
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(kind="gpt2", *, bos=False, eos=True, text=STORY):
    """A small byte-level BPE tokenizer, split as GPT-2 or Llama 3 do; `bos`: it adds one itself."""
    backend = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    split = [pre_tokenizers.Split(Regex(LLAMA3), "isolated")] if kind == "llama3" else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte])
    backend.decoder = decoders.ByteLevel()
    special = [EOT] * eos + ["<s>"] * bos
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text, "\n\n \n\n\n"] * 2, trainer)
    if bos:
        ids = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOT if eos else None, bos_token="<s>" if bos else None
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_bytes(STORY.encode())
    return file


def stored(directory, split):
    return np.concatenate([np.load(file) for file in sorted(directory.glob(f"{split}-*.npy"))])


# ---- cutting


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
@pytest.mark.parametrize("block", [1, 50, 333, 1000])
def test_chunks_have_the_tokens_of_the_whole_text(kind, block):
    tokenizer = byte_level(kind)
    blocks = [STORY[i : i + block] for i in range(0, len(STORY), block)]
    chunks = list(stable_chunks(blocks, lambda text: encode(tokenizer, text)))
    assert "".join(chunk.text for chunk in chunks) == STORY
    assert len(chunks) > len(STORY) // max(2 * block, 4 * CONTEXT)
    assert sum(encode_chunks(tokenizer, chunks), []) == encode(tokenizer, STORY)


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_cutting_behind_every_newline_run_would_differ_for_gpt2(kind):
    """The reason why a cut is tried: one fixed rule does not suit both tokenizers."""
    tokenizer = byte_level(kind)
    joined = encode(tokenizer, "cats\n\ndogs")
    assert (encode(tokenizer, "cats\n\n") + encode(tokenizer, "dogs") == joined) == (kind == "llama3")
    assert (encode(tokenizer, "cats\n") + encode(tokenizer, "\ndogs") == joined) == (kind == "gpt2")


def test_text_without_newlines_is_cut_at_spaces(tokenizer):
    text = "the cats and dogs ran away " * 200
    chunks = list(stable_chunks([text[:2000], text[2000:]], lambda part: encode(tokenizer, part)))
    assert len(chunks) == 3 and sum(encode_chunks(tokenizer, chunks), []) == encode(tokenizer, text)


@pytest.mark.parametrize(("kind", "ends"), [("gpt2", "s\n"), ("llama3", "s\n\n")])
def test_the_cut_in_a_run_of_newlines_follows_the_tokenizer(kind, ends):
    tokenizer, text = byte_level(kind), "cats\n\ndogs\n\n" * 200
    chunks = list(stable_chunks([text[:1000], text[1000:]], lambda part: encode(tokenizer, part)))
    assert len(chunks) == 3 and all(chunk.text.endswith(ends) for chunk in chunks[:-1])
    assert sum(encode_chunks(tokenizer, chunks), []) == encode(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [97, 500])
def test_chunks_of_every_kind_of_tokenizer(kind, block):
    """Also of those that begin every text with a space, or with a new word."""
    tokenizer = make(kind, STORY)
    blocks = [STORY[i : i + block] for i in range(0, len(STORY), block)]
    chunks = list(stable_chunks(blocks, lambda text: encode(tokenizer, text)))
    assert "".join(chunk.text for chunk in chunks) == STORY and len(chunks) > len(STORY) // 1000
    assert sum(encode_chunks(tokenizer, chunks), []) == tokenizer(STORY, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama2", "metaspace", "unigram"])
def test_a_document_of_megabytes_is_cut(tmp_path, kind):
    tokenizer, text = make(kind, STORY), STORY * 400
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    chunks = list(stable_chunks(text_module._read_blocks(file), lambda part: encode(tokenizer, part)))
    longest = max(len(chunk.text) for chunk in chunks)
    assert len(text) > 2_500_000 and longest < 600_000
    prepare_text(file, tokenizer, directory=tmp_path / "out", eval_fraction=0)
    ids = stored(tmp_path / "out", "train").tolist()
    assert ids[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_a_cut_is_tried_on_more_than_the_longest_token():
    """Merges that are longer than the usual context."""
    backend = Tokenizer(models.BPE())
    text = "one two three four five\n" * 400
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert context_of(tokenizer) > 2 * CONTEXT
    blocks = [text[i : i + 501] for i in range(0, len(text), 501)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunks = list(stable_chunks(blocks, partial(encode, tokenizer), context=context_of(tokenizer)))
    assert sum(encode_chunks(tokenizer, chunks), []) == encode(tokenizer, text)


def test_text_without_spaces_is_cut_behind_punctuation(tokenizer):
    text = "東京は、日本の首都です。大阪は、西にあります。" * 60
    blocks = [text[i : i + 300] for i in range(0, len(text), 300)]
    chunks = list(stable_chunks(blocks, lambda part: encode(tokenizer, part)))
    assert len(chunks) > 3 and sum(encode_chunks(tokenizer, chunks), []) == encode(tokenizer, text)


def test_text_that_cannot_be_cut_is_held_with_a_warning():
    blocks = [STORY[i : i + 500] for i in range(0, len(STORY), 500)]
    with pytest.warns(UserWarning, match="found no place to cut .* characters of text") as caught:
        chunks = list(stable_chunks(blocks, lambda text: [len(text), hash(text)], warn_chars=1000))
    assert chunks == [("", STORY)] and len(caught) == 1


# ---- preparing


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, True), (False, False)])
def test_shards_hold_the_whole_text_split_at_the_end(tmp_path, story, monkeypatch, bos, eos):
    monkeypatch.setattr(text_module, "_BLOCK_BYTES", 401)  # cuts characters in two, too
    tokenizer = byte_level(bos=bos, eos=eos)
    meta = prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1, shard_tokens=500)
    ids = [tokenizer.bos_token_id] * bos + encode(tokenizer, STORY) + [tokenizer.eos_token_id] * eos
    train, validation = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "validation")
    assert np.concatenate([train, validation]).tolist() == ids
    assert train.dtype == np.uint16 and meta["dtype"] == "uint16"
    assert len(validation) == round(len(ids) / 10) == meta["tokens"]["validation"]
    assert meta["shards"]["train"][:-1] == [500] * (len(train) // 500) and sum(meta["shards"]["train"]) == len(train)
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta
    assert not list((tmp_path / "out").glob(".partial*"))
    assert str(tmp_path) not in json.dumps(meta)


def test_each_file_is_a_document(tmp_path, tokenizer):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    contents = {"b.txt": "two cats", "a.txt": "one dog", "deep/c.txt": "\ufeffthree" + EOT}
    for name, content in contents.items():
        (tmp_path / "texts" / name).write_text(content, encoding="utf-8")
    (tmp_path / "texts" / "notes.md").write_text("not this")
    with pytest.warns(UserWarning, match=r"only the `\.txt` files are text; left out: notes\.md"):
        meta = prepare_text(tmp_path / "texts", tokenizer, directory=tmp_path / "out", eval_fraction=0.0)
    expected = [
        i for text in ("one dog", "two cats", "three") for i in [*encode(tokenizer, text), tokenizer.eos_token_id]
    ]
    assert stored(tmp_path / "out", "train").tolist() == expected
    assert meta["documents"] == 3 and meta["tokens"]["validation"] == 0
    files = [tmp_path / "texts" / name for name in ("a.txt", "b.txt", "deep/c.txt")]
    prepare_text(files, tokenizer, directory=tmp_path / "list", eval_fraction=0.0)
    assert stored(tmp_path / "list", "train").tolist() == expected


def test_wide_ids_for_a_large_vocabulary(tmp_path, story, monkeypatch, tokenizer):
    monkeypatch.setattr(text_module, "largest_id", lambda tokenizer: 1 << 16)
    assert prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)["dtype"] == "uint32"
    data = TextDataset(tmp_path / "out", "train", length=16, pad_id=0)
    assert data.row(0).input_ids.dtype == np.int32
    assert data.row(0).input_ids.tolist() == encode(tokenizer, STORY)[:16]


def test_reused_exactly_when_nothing_changed(tmp_path, story, tokenizer):
    out = tmp_path / "out"
    arguments = {"directory": out, "eval_fraction": 0.1, "shard_tokens": 500}
    made = prepare_text(story, tokenizer, **arguments)

    def rebuilt(source=story, tok=tokenizer, **changes):
        before = (out / "meta.json").stat().st_ino, (out / "train-00000.npy").stat().st_mtime_ns
        prepare_text(source, tok, **arguments | changes)
        return ((out / "meta.json").stat().st_ino, (out / "train-00000.npy").stat().st_mtime_ns) != before

    (out / "mine.npy").write_bytes(b"kept")
    assert not rebuilt()
    moved = tmp_path / "elsewhere" / "story.txt"
    moved.parent.mkdir()
    shutil.copy(story, moved)
    assert not rebuilt(moved), "the same bytes at another place"
    assert rebuilt(eval_fraction=0.2) and not rebuilt(eval_fraction=0.2)
    assert rebuilt(shard_tokens=100_000) and len(list(out.glob("train-*.npy"))) == 1, "stale shards are gone"
    assert rebuilt() and prepare_text(story, tokenizer, **arguments) == made
    assert rebuilt(tok=byte_level("llama3")) and rebuilt()
    story.write_text(STORY[:-1], newline="")
    assert rebuilt() and not rebuilt()
    assert (out / "mine.npy").read_bytes() == b"kept"


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "shard cut short": ("train-00000.npy", lambda file: np.save(file, np.zeros(3, np.uint16))),
    "shard of other tokens": ("train-00001.npy", lambda file: np.save(file, np.load(file)[::-1])),
    "shard of ids beyond the vocabulary": (
        "train-00000.npy",
        lambda file: np.save(file, np.full(500, 60000, np.uint16)),
    ),
    "shard with a bit flipped": ("validation-00000.npy", lambda file: flip(file, -1)),
    "shard with a bit of its header flipped": ("train-00000.npy", lambda file: flip(file, 30)),
    "shard empty": ("train-00000.npy", lambda file: file.write_bytes(b"")),
    "shard lost": ("train-00001.npy", lambda file: file.unlink()),
    "shard of another type": ("train-00000.npy", lambda file: np.save(file, np.load(file).astype(np.int64))),
    "meta empty": ("meta.json", lambda file: file.write_bytes(b"")),
    "meta cut": ("meta.json", lambda file: file.write_text(file.read_text()[:100])),
    "meta a list": ("meta.json", lambda file: file.write_text("[]")),
    "meta binary": ("meta.json", lambda file: file.write_bytes(b"\xff\x00")),
    "meta without shards": ("meta.json", lambda file: change(file, shards=None)),
    "meta of an older version": ("meta.json", lambda file: change(file, sha256=None)),
    "meta with another count": ("meta.json", lambda file: change(file, tokens={"train": 9, "validation": 3})),
    "meta with other counts that agree": (
        "meta.json",
        lambda file: change(file, tokens={"train": 9, "validation": 3}, shards={"train": [9], "validation": [3]}),
    ),
    "meta with another type": ("meta.json", lambda file: change(file, dtype="uint99")),
    "meta with text for counts": ("meta.json", lambda file: change(file, shards={"train": ["5"], "validation": []})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_and_made_again(tmp_path, story, tokenizer, damage):
    out = tmp_path / "out"
    made = prepare_text(story, tokenizer, directory=out, eval_fraction=0.1, shard_tokens=500)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    name, how = DAMAGES[damage]
    how(out / name)
    with pytest.warns(UserWarning, match=rf"{name} is not what was written; the text is tokenized again"):
        assert prepare_text(story, tokenizer, directory=out, eval_fraction=0.1, shard_tokens=500) == made
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("damage", ["shard cut short", "shard empty", "shard lost", "shard of another type"])
def test_a_damaged_shard_is_not_opened(tmp_path, story, tokenizer, damage):
    prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1, shard_tokens=500)
    name, how = DAMAGES[damage]
    how(tmp_path / "out" / name)
    with pytest.raises(
        ValueError, match=rf"{name} (is no shard|must hold 500 tokens of uint16).* Prepare the text again"
    ):
        TextDataset(tmp_path / "out", "train", length=8, pad_id=0)


def test_what_a_killed_process_left_is_removed(tmp_path, story, tokenizer):
    out = tmp_path / "out"
    for name in (".partial-1234", ".partial-abc", ".meta.json.partial-x"):
        (out / name).mkdir(parents=True)
        (out / name / "tokens.bin").write_bytes(b"\0\1")
    (out / ".lock").write_text("1234 elsewhere")
    prepare_text(story, tokenizer, directory=out, eval_fraction=0.0)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train-00000.npy"]


def test_one_writer(tmp_path, story, tokenizer):
    prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    with only_writer(tmp_path / "out", "prepared"):
        prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)  # there is nothing to write
        with pytest.raises(InUse, match=rf"out' is being prepared by process {os.getpid()} on"):
            prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.2)


@pytest.mark.parametrize("tokens", [1, 7, 500, 100_000])
def test_shards_are_the_bytes_of_numpy(tmp_path, story, tokenizer, tokens):
    prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.0, shard_tokens=max(tokens, 100))
    for file in (tmp_path / "out").glob("*.npy"):
        np.save(tmp_path / "theirs.npy", np.load(file))
        assert (tmp_path / "theirs.npy").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("write", ["tokens.bin", "train-00000.npy", "meta.json"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, story, tokenizer, monkeypatch, write):
    """The error of the last bytes too, which numpy's own writers lose."""

    class Full(io.FileIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    plain = io.open

    def opened(file, mode="r", *args, **kwargs):
        if write.split(".")[0] in str(file) and "w" in mode:
            raw = io.BufferedWriter(Full(file, "w"), buffer_size=1 << 16)
            return raw if "b" in mode else io.TextIOWrapper(raw)
        return plain(file, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        with pytest.raises(NoSpace, match=r"no space left on /\S* for '.*out': needs about \d+ KiB, .* free"):
            prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix != ".npy"]
    prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)


RUN = ("config.yaml", "run.json")


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (("run/config.yaml", "run/run.json", "run/checkpoints/2/x.txt"), ["run"]),
        (("run/config.yaml", "run/.lock", "run/x.txt"), ["run"]),
        (("a/b/run/config.yaml", "a/b/run/run.json", "a/b/run/x.txt", "a/b/y.txt"), ["a/b/run"]),
        (("r1/config.yaml", "r1/run.json", "r1/x.txt", "r2/config.yaml", "r2/run.json", "r2/adapter/x.txt"), ["r1", "r2"]),
        (("run/config.yaml", "run/run.json", "run/data/meta.json"), []),
        (("project/config.yaml", "project/x.txt"), []),
        (("project/run.json", "project/x.txt"), []),
        (("config.yaml", "x.txt"), []),
    ],
)  # fmt: skip
def test_files_of_runs_are_no_documents(tmp_path, story, tokenizer, files, left_out):
    folder = tmp_path / "texts"
    for name in ("story.txt", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a text of its own")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meta = prepare_text(folder, tokenizer, directory=tmp_path / "out", eval_fraction=0.0)
    names = [source["name"] for source in meta["request"]["sources"]]
    texts = ["story.txt", *(name for name in files if name.endswith(".txt"))]
    assert names == sorted(n for n in texts if not any(n.startswith(run + "/") for run in left_out))
    said = [said for warning in caught if "files of runs" in (said := str(warning.message))]
    assert len(said) == bool(left_out) and all(str(folder / run) in said[0] for run in left_out)


def test_a_run_for_a_folder_of_text(tmp_path, tokenizer):
    for name in (*RUN, "x.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has only 1 `\.txt` files of runs .*Give the text's own folder"):
        prepare_text(tmp_path, tokenizer, directory=tmp_path / "out", eval_fraction=0.0)


def test_a_failed_build_leaves_the_old_one(tmp_path, story, tokenizer):
    made = prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    before = stored(tmp_path / "out", "train")
    story.write_bytes(STORY.encode() + b"\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == made
    assert (stored(tmp_path / "out", "train") == before).all() and not list((tmp_path / "out").glob(".partial*"))


def test_a_crash_while_swapping_shards_leaves_an_unprepared_folder(tmp_path, story, tokenizer, monkeypatch):
    prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    moved = []

    def replace_one(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(source.rename(target))

    with monkeypatch.context() as patch:
        patch.setattr(text_module.os, "replace", replace_one)
        with pytest.raises(KeyboardInterrupt):
            prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.2)
    with pytest.raises(FileNotFoundError, match="holds no prepared text"):
        TextDataset(tmp_path / "out", "train", length=8, pad_id=0)
    prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.2)
    assert TextDataset(tmp_path / "out", "validation", length=8, pad_id=0).stats.tokens > 2


def test_fingerprint_is_of_the_encoding_not_of_the_last_call():
    tokenizer = byte_level()
    before = fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=2)
    assert fingerprint(tokenizer) == before == fingerprint(byte_level())
    assert fingerprint(byte_level(bos=True)) != before != fingerprint(byte_level("llama3"))


@pytest.mark.parametrize("block", [4, 7, 1 << 18])
def test_bytes_that_are_not_utf8_are_placed(tmp_path, monkeypatch, tokenizer, block):
    monkeypatch.setattr(text_module, "_BLOCK_BYTES", block)
    file = tmp_path / "bad.txt"
    file.write_bytes("é one\n東京 two\nthree ".encode() + b"\xe9 four\n")
    with pytest.raises(ValueError, match=r"bad\.txt:3: text must be UTF-8; got byte 0xe9 at offset 24 .*iconv"):
        prepare_text(file, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    file.write_bytes(b"fine\n\xe6\x9d")
    with pytest.raises(ValueError, match=r"bad\.txt:2: .* byte 0xe6 at offset 5 \(unexpected end of data\)"):
        prepare_text(file, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)


def test_what_prepare_text_refuses(tmp_path, story, tokenizer):
    def refused(error, message, source=story, tok=tokenizer, **changes):
        with pytest.raises(error, match=message):
            prepare_text(source, tok, **{"directory": tmp_path / "out", "eval_fraction": 0.1} | changes)

    refused(ValueError, r"`eval_fraction` must be in \[0, 1\); got 1", eval_fraction=1)
    refused(ValueError, r"`shard_tokens` must be >= 1; got 0", shard_tokens=0)
    refused(FileNotFoundError, r"no such text file: .*gone\.txt", tmp_path / "gone.txt")
    refused(FileNotFoundError, r"no such text file: \(an empty list\)", [])
    (tmp_path / "none").mkdir()
    refused(FileNotFoundError, r"needs `\.txt` files; .* has none", tmp_path / "none")
    for i in range(12):
        (tmp_path / "none" / f"{i:02d}.txt").touch()
    refused(ValueError, r"must not be empty; got 0 bytes in .*09\.txt and 2 more", tmp_path / "none")
    short = tmp_path / "short.txt"
    short.write_text("cat")
    refused(ValueError, r"at least 2 tokens; the text has \d+, of which eval_fraction=0.1 gives [01] to vali", short)
    short.write_text("\ufeff", encoding="utf-8")
    refused(ValueError, r"the text has 0, of which eval_fraction=0", short, byte_level(eos=False), eval_fraction=0)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "meta.json").write_text("{}")
    refused(ValueError, r"meta\.json was not written by `prepare_text`", directory=tmp_path / "theirs")


# ---- windows


@pytest.mark.parametrize("length", [2, 3, 16, 499, 500, 501, 100_000])
def test_every_token_but_the_first_is_a_target_once(tmp_path, story, tokenizer, length):
    prepare_text(story, tokenizer, directory=tmp_path, eval_fraction=0.1, shard_tokens=37)
    for split in ("train", "validation"):
        data = TextDataset(tmp_path, split, length=length, pad_id=0)
        tokens = stored(tmp_path, split)
        targets, positions = [], 0
        for index in range(len(data)):
            row = data.row(index)
            assert 2 <= len(row.input_ids) <= length and (len(row.input_ids) == length or index == len(data) - 1)
            assert row.labels[0] == IGNORED and (row.labels[1:] == row.input_ids[1:]).all()
            targets += row.labels[1:].tolist()
            positions += len(row.input_ids)
        assert targets == tokens[1:].tolist()
        assert data.stats.supervised_tokens == len(targets) and data.stats.tokens == len(tokens)
        assert data.stats.padding_efficiency == pytest.approx(positions / (len(data) * length))


def test_what_text_data_set_refuses(tmp_path, story, tokenizer):
    with pytest.raises(FileNotFoundError, match="holds no prepared text"):
        TextDataset(tmp_path, "train", length=8, pad_id=0)
    prepare_text(story, tokenizer, directory=tmp_path, eval_fraction=0)
    with pytest.raises(ValueError, match="`length` must be >= 2"):
        TextDataset(tmp_path, "train", length=1, pad_id=0)
    with pytest.raises(ValueError, match="`split` must be one of train, validation; got 'test'"):
        TextDataset(tmp_path, "test", length=8, pad_id=0)
    with pytest.raises(ValueError, match=r"'validation' in .* has 0.*another `eval_fraction` \(it was 0.0\)"):
        TextDataset(tmp_path, "validation", length=8, pad_id=0)
    data = TextDataset(tmp_path, "train", length=8, pad_id=0)
    for index in (-1, len(data)):
        with pytest.raises(IndexError, match="`index` must be in 0.."):
            data.row(index)


# ---- load_data


def test_load_data_of_text(tmp_path, story, tokenizer):
    arguments = {"max_length": 32, "seed": 0, "directory": tmp_path / "out"}
    train, evaluation = load_data(story, tokenizer, **arguments)
    n_tokens = train.stats.tokens + evaluation.stats.tokens
    assert evaluation.stats.tokens == round(n_tokens / 10)
    assert (train.length, train.pad_id) == (32, pad_id(tokenizer)) == (32, tokenizer.eos_token_id)
    train, evaluation = load_data(str(story), tokenizer, eval_fraction=0, **arguments)
    assert train.stats.tokens == n_tokens and evaluation is None
    other = tmp_path / "other.txt"
    other.write_text("other text\n" * 9)
    train, evaluation = load_data([story], tokenizer, eval_data=other, **arguments)
    assert train.stats.tokens == n_tokens
    assert evaluation.stats.tokens == len(encode(tokenizer, "other text\n" * 9)) + 1
    shown = [preview(data, tokenizer, rows=1)[0] for data in (train, evaluation)]
    assert [[flag for _, flag in runs] for runs in shown] == [[False, True]] * 2
    assert STORY.startswith("".join(text for text, _ in shown[0]))
    assert summary(train)["supervised_share"] == pytest.approx((n_tokens - 1) / n_tokens)


def test_preparing_a_long_text_gives_no_warning(tmp_path, story, tokenizer, caplog):
    tokenizer = byte_level()
    tokenizer.model_max_length = 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_text(story, tokenizer, directory=tmp_path / "out", eval_fraction=0.1)
    assert not caplog.records


def test_kind_of_a_source(tmp_path, story):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.csv").touch()
    assert kind_of(story) == kind_of(tmp_path) == kind_of([story, str(story)]) == "text"
    assert kind_of(tmp_path / "a.jsonl") == kind_of("tatsu-lab/alpaca") == kind_of("owner/name-v1.0") == "records"
    (tmp_path / "a.xml").touch()
    for wrong in (tmp_path / "a.xml", "notes.zip"):
        with pytest.raises(ValueError, match=r"data must be a \.txt, \.jsonl, \.json, .* file.* got '.*(xml|zip)'"):
            kind_of(wrong)
    for gone in ("gone.txt", "gone.json", "./gone", "/a/b/c", "../x"):
        with pytest.raises(FileNotFoundError, match=f"no such data file: {gone}"):
            kind_of(gone)
    with pytest.raises(ValueError, match=r"a list of data files must be `\.txt` files; got .*a\.jsonl"):
        kind_of([story, tmp_path / "a.jsonl"])
