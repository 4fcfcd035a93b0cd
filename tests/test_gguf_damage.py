"""Broken and hostile GGUF files: each is refused with one clear error, quickly, or is harmless and loads with the right values."""

import random
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from damage import refused
from gguf_files import ARRAY, I32, STRING, U16, U32, RawFile, value

import jlora
from jlora.models import model_from_config
from jlora.storage.gguf import GGUFFile

FILE = "model.gguf"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small model with a vocabulary."""
    tokenizer = tiny.tokenizer(tiny.CHATML)
    model = model_from_config(tiny.LLAMA | {"vocab_size": len(tokenizer)}, dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("whole") / FILE
    jlora.save_gguf(path, model, params, tokenizer=tokenizer, dtype="f32")
    return path


# Parts


def split(source, directory, cuts, **changes):
    """The file in parts, as llama.cpp's gguf-split makes them: the metadata are in the first, which may hold no tensors."""
    raw, names = RawFile.read(source), list(RawFile.read(source).tensors)
    paths = []
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(names)], strict=True)):
        fields = dict(raw.fields) if number == 0 else {}
        fields |= {"split.no": value(U16, number), "split.count": value(U16, len(cuts) + 1)}
        fields |= {"split.tensors.count": value(I32, len(names))}
        fields |= changes.get(f"part{number}", {})
        path = directory / f"m-{number + 1:05}-of-{len(cuts) + 1:05}.gguf"
        paths.append(RawFile(fields, {name: raw.tensors[name] for name in names[start:end]}).write(path))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[0, 5], [1, 20], [7]])
def test_all_parts_are_read(cuts, whole, tmp_path):
    paths = split(whole, tmp_path, cuts)
    expected, params = (jlora.load(path, dtype="float32")[1] for path in (whole, paths[0]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, params))
    assert (
        jlora.load_tokenizer(paths[0])("The keeper")["input_ids"]
        == jlora.load_tokenizer(whole)("The keeper")["input_ids"]
    )


@pytest.mark.slow
def test_parts_that_do_not_belong_together_are_refused(whole, tmp_path):
    first, second, third = split(whole, tmp_path, [4, 9])
    assert "give the first, …-00001-of-00003.gguf" in refused(lambda: jlora.load(second), tmp_path)
    kept = third.read_bytes()
    third.unlink()
    said = refused(lambda: jlora.load(first), tmp_path)
    assert "is the first of 3 parts of a model; missing: m-00003-of-00003.gguf. Download them" in said
    third.write_bytes(second.read_bytes())
    assert "says that it is part 1, counted from 0, and its name says 2" in refused(lambda: jlora.load(first), tmp_path)
    third.write_bytes(
        RawFile(RawFile.read(first).fields | {"split.no": value(U16, 2)}, RawFile.read(second).tensors).header()
    )
    assert "m-00003-of-00003.gguf' is not a valid GGUF file" in refused(lambda: jlora.load(first), tmp_path)
    third.write_bytes(kept)
    (tmp_path / "alone.gguf").write_bytes(first.read_bytes())
    assert "is one of 3 parts of a model" in refused(lambda: jlora.load(tmp_path / "alone.gguf"), tmp_path)
    raw = RawFile.read(third)
    raw.tensors |= {name: tensor for name, tensor in list(RawFile.read(second).tensors.items())[:1]}
    raw.write(third)
    assert "which another part of the model holds already" in refused(lambda: jlora.load(first), tmp_path)
    RawFile(raw.fields, dict(list(raw.tensors.items())[:2])).write(third)
    assert "says that the parts hold" in refused(lambda: jlora.load(first), tmp_path)
    huge = tmp_path / "h-00001-of-99999.gguf"
    huge.write_bytes(first.read_bytes())
    assert "h-00002-of-99999.gguf" in refused(lambda: jlora.load(huge), tmp_path)


# Damage by hand


def at(offset, data):
    """These bytes at that place."""
    return lambda whole: whole[:offset] + data + whole[offset + len(data) :]


def field(key, kind, data):
    def change(raw):
        raw.fields[key] = kind, data

    return change


def tensor(name="output_norm.weight", **changes):
    def change(raw):
        dims, kind, data = raw.tensors[name]
        found = {"dims": dims, "kind": kind, "data": data} | changes
        raw.tensors[name] = found["dims"], found["kind"], found["data"]

    return change


U64 = struct.Struct("<Q").pack
HUGE = (1 << 64) - 1

BYTES = {
    "empty": (lambda d: b"", "it is shorter than a header"),
    "the magic alone": (lambda d: d[:4], "it is shorter than a header"),
    "another magic": (at(0, b"GGML"), "it does not begin with 'GGUF'"),
    "version 1": (at(4, struct.pack("<I", 1)), "it is of version 1; read are versions 2 and 3, little-endian"),
    "big-endian": (at(4, struct.pack(">I", 3)), "it is big-endian; read are"),
    "2^64 - 1 tensors": (at(8, U64(HUGE)), f"it has {HUGE} tensors; read are at most 65536"),
    "2^64 - 1 keys": (at(16, U64(HUGE)), f"it has {HUGE} keys"),
    "more tensors than there are": (at(8, U64(65536)), "is not a valid GGUF file"),
    "more keys than there are": (at(16, U64(65536)), "is not a valid GGUF file"),
    "fewer keys than there are": (at(16, U64(3)), "is not a valid GGUF file"),
    "a key of 2^63 bytes": (at(24, U64(1 << 63)), f"a name of {1 << 63} bytes at byte 32"),
    "a key beyond the file": (at(24, U64(65536)), "the text at byte 32 is not UTF-8"),
    "a key that is no text": (at(32, b"\xff\xfe"), "the text at byte 32 is not UTF-8"),
    "cut by a byte": (lambda d: d[:-33], "of a file of"),
    "cut in half": (lambda d: d[: len(d) // 2], "of a file of"),
    "cut in the header": (lambda d: d[:1000], "is said to be a list of 400 texts, for which there is no room"),
}  # fmt: skip

FIELDS = {
    "an unknown type": (field("general.name", 13, b""), "the key 'general.name' is of type 13"),
    "a list of lists": (field("general.name", ARRAY, struct.pack("<IQ", ARRAY, 1)), "is a list of type 9; lists are of text or"),
    "a list of 2^40 numbers": (field("general.name", ARRAY, struct.pack("<IQ", U32, 1 << 40)), "bytes are announced at byte"),
    "a list of 2^60 texts": (field("general.name", ARRAY, struct.pack("<IQ", STRING, 1 << 60)), f"list of {1 << 60} texts"),
    "a text of 2^62 bytes": (field("general.name", STRING, U64(1 << 62)), f"{1 << 62} bytes are announced at byte"),
    "alignment of zero": (field("general.alignment", *value(U32, 0)), "must be a power of two from 8 up; got 0"),
    "alignment of 33": (field("general.alignment", *value(U32, 33)), "must be a power of two from 8 up; got 33"),
    "alignment of text": (field("general.alignment", *value(STRING, "32")), "must be a power of two from 8 up; got '32'"),
    "another alignment": (field("general.alignment", *value(U32, 4096)), "is said to be at"),
    "no architecture": (lambda raw: raw.fields.pop("general.architecture"), "has `general.architecture` None"),
    "architecture of a number": (field("general.architecture", *value(U32, 3)), "has `general.architecture` 3"),
    "five axes": (tensor(dims=[1, 1, 1, 1, 32]), "has 5 axes; there are 1 to 4"),
    "no axes": (tensor(dims=[]), "has 0 axes"),
    "an axis of zero": (tensor(dims=[0, 32]), "has the shape [32, 0]"),
    "axes that overflow": (tensor(dims=[1 << 33, 1 << 33]), "has the shape [8589934592, 8589934592]"),
    "axes of 2^64 - 1": (tensor(dims=[HUGE]), "has the shape ["),
    "larger than the file": (tensor("token_embd.weight", dims=[1 << 20, 1 << 20]), "ends at byte 4398"),
    "type 4, which was removed": (tensor(kind=4), "is of type 4, which is none that is known"),
    "type 2^32 - 1": (tensor(kind=(1 << 32) - 1), "is of type 4294967295"),
    "rows that do not divide into blocks": (
        tensor("token_embd.weight", kind=12), "rows of 32 of the tensor 'token_embd.weight' do not divide into Q4_K's blocks of 256"
    ),
    "a type of another size": (tensor("token_embd.weight", kind=1), "is said to be at"),
    "a tensor that is missing": (lambda raw: raw.tensors.pop("output_norm.weight"), "missing: output_norm.weight (32,)"),
    "a tensor too many": (
        lambda raw: raw.tensors.update({"blk.0.more.weight": ([8], 0, bytes(32))}), "unexpected: blk.0.more.weight (8,)"
    ),
    "integers": (tensor(kind=26), "dtype: output_norm.weight is I32, should be F64 or F32 or F16 or BF16"),
    "weights that are no numbers": (tensor(data=b"\xff" * 128), "are NaN or infinite: output_norm.weight"),
    "factors of the rotation of another shape": (
        lambda raw: raw.tensors.update({"rope_freqs.weight": ([9], 0, struct.pack("<9f", *range(1, 10)))}), "'rope_freqs.weight'"
    ),
    "factors that are no numbers": (
        lambda raw: raw.tensors.update({"rope_freqs.weight": ([4], 0, b"\xff" * 16)}), "'rope_freqs.weight'"
    ),
    "a vocabulary of one token less": (
        field("tokenizer.ggml.tokens", *value(ARRAY, (STRING, ["a"]))), "`tokenizer.ggml.token_type` must be"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes_are_refused(case, whole, tmp_path):
    change, says = BYTES[case]
    (tmp_path / FILE).write_bytes(change(whole.read_bytes()))
    said = refused(lambda: jlora.load(tmp_path / FILE), tmp_path)
    assert says in said and FILE in said and "\n" not in said


@pytest.mark.parametrize("case", FIELDS)
def test_damaged_fields_are_refused(case, whole, tmp_path):
    change, says = FIELDS[case]
    raw = RawFile.read(whole)
    change(raw)
    raw.write(tmp_path / FILE)
    said = refused(lambda: jlora.load(tmp_path / FILE), tmp_path)
    assert says in said and FILE in said


def test_keys_and_tensors_twice_are_refused(whole, tmp_path):
    data = whole.read_bytes()
    for name, other, says in (
        (b"general.name", b"general.type", "the key 'general.type' is there twice"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", "the tensor 'blk.0.attn_k.weight' is there twice"),
    ):
        (tmp_path / FILE).write_bytes(data.replace(name, other, 1))
        assert says in refused(lambda: jlora.load(tmp_path / FILE), tmp_path)


def test_the_commands_say_it_in_one_line(whole, tmp_path, fails):
    (tmp_path / FILE).write_bytes(whole.read_bytes()[:5000])
    for flags in (
        ["generate", "--prompts", "a"], ["memory"], ["inspect"], ["export", "--to", "gguf", "--output", str(tmp_path / "o.gguf")],
        ["quantize", "--output", str(tmp_path / "q")],
    ):  # fmt: skip
        said = fails(flags[0], "--model", str(tmp_path / FILE), *flags[1:])
        assert "is not a valid GGUF file" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# Damage by chance


def mutated(data, header, draw):
    """The file with its header damaged in one of several ways."""
    data = bytearray(data)
    kind = draw.choice(["byte", "bytes", "word", "cut", "insert", "remove", "swap", "tail"])
    place = draw.randrange(header)
    if kind == "byte":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        data[place : place + 8] = draw.randbytes(8)
    elif kind == "word":
        place -= place % 8
        data[place : place + 8] = U64(draw.choice([0, 1, 2**31, 2**32 - 1, 2**32, 2**63, HUGE, len(data)]))
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "insert":
        data[place:place] = draw.randbytes(draw.randint(1, 40))
    elif kind == "remove":
        del data[place : place + draw.randint(1, 40)]
    elif kind == "swap":
        other = draw.randrange(header)
        data[place : place + 16], data[other : other + 16] = data[other : other + 16], data[place : place + 16]
    else:
        data += draw.randbytes(draw.randint(1, 200))
    return bytes(data)


def as_gguf_reads(path):
    return {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_any_damage_to_the_header_is_an_error_or_harmless(seed, whole, tmp_path):
    """20 files a seed, the metadata of the model and the places of the tensors hit as often as the vocabulary, which is most of
    the header."""
    data, header = whole.read_bytes(), GGUFFile(whole).header_size
    vocabulary = data.index(b"tokenizer.ggml.tokens"), data.index(b"tokenizer.ggml.bos_token_id")
    draw = random.Random(seed)
    loaded, path = 0, tmp_path / FILE

    def load():
        return jlora.load(path, dtype="float32")[1], jlora.load_tokenizer(path)

    for _ in range(20):
        if draw.random() < 0.5:
            path.write_bytes(mutated(data, vocabulary[0], draw))
        else:
            path.write_bytes(mutated(data, header, draw))
        try:
            params, tokenizer = load()
        except (ValueError, FileNotFoundError):
            assert FILE in refused(load, tmp_path)
            continue
        loaded += 1
        tokenizer("The keeper <|im_end|> 12")
        theirs = as_gguf_reads(path)
        np.testing.assert_array_equal(params["model"]["embed_tokens"]["embedding"], theirs["token_embd.weight"])
        np.testing.assert_array_equal(
            params["model"]["layers"]["1"]["mlp"]["down_proj"]["kernel"].T, theirs["blk.1.ffn_down.weight"]
        )
    assert loaded < 20
