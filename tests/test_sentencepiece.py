"""Scores that make llama.cpp merge as a tokenizer.json does; tests/test_llama_cpp.py compares the tokens themselves."""

import json

import gguf
import jax
import jax.numpy as jnp
import pytest
import tiny
from tokenizer_kinds import make, sentencepiece

import jlora
from jlora.files.sentencepiece import scores_of
from jlora.files.vocabulary import Vocabulary
from jlora.models import model_from_config

USERS = ("▁▁", "\n\n")


def vocabulary(tokenizer):
    fields = tiny.LLAMA | {"vocab_size": len(tokenizer) + 2, "eos_token_id": 1}
    return Vocabulary.of(tokenizer, model_from_config(fields, dtype=jnp.float32).config)


def test_what_the_file_says(tmp_path):
    tokenizer = sentencepiece(tiny.text(), before=False, users=USERS)
    model = model_from_config(tiny.LLAMA | {"vocab_size": len(tokenizer) + 2}, dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    assert (said["model"], said["pre"], said["add_space_prefix"]) == ("llama", "default", False)
    assert "merges" not in said and len(said["scores"]) == len(said["tokens"]) == len(tokenizer) + 2
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(said["tokens"], said["token_type"], strict=True)}
    assert kinds["<0x0A>"] == "BYTE" and kinds["</s>"] == "CONTROL" and kinds["▁the"] == "NORMAL"
    assert kinds["  "] == kinds["\n\n"] == "USER_DEFINED", "as they are in a text"
    scores = dict(zip(said["tokens"], said["scores"], strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = [left + right for left, right in merges if left + right not in USERS]
    assert [scores[token] for token in made] == sorted((scores[token] for token in made), reverse=True)
    assert scores["a"] < min(scores[token] for token in made)


def test_a_space_before_the_text_is_said():
    assert vocabulary(sentencepiece(tiny.text(), before=True)).space_before
    assert not vocabulary(sentencepiece(tiny.text(), before=False)).space_before


@pytest.mark.parametrize(
    ("tokens", "merges", "says"),
    [
        (["a", "b", "ab", "abb", "bb"], [("a", "b"), ("ab", "b"), ("b", "b")], "no merge makes 'abb' of them"),
        (
            ["a", "b", "aa", "aab", "ab"],
            [("aa", "b"), ("a", "a"), ("a", "ab")],
            "'aab' is made by merges of different ranks",
        ),
    ],
)
def test_merges_that_no_scores_give_are_refused(tokens, merges, says):
    with pytest.raises(ValueError, match=says):
        scores_of(tokens, merges, ())
    assert scores_of(["a", "b", "ab"], [("a", "b")], ()) == [-1e6, -1e6, 0.0]
    assert scores_of(["a", "b", "ab"], [("a", "b")], {"ab"}) == [-1e6, -1e6, -1e6], "found before the merges"


@pytest.mark.parametrize("kind", ["metaspace", "metaspace_always", "llama2"])
def test_other_tokenizers_with_bytes_are_refused(kind):
    """Trained merges, of which there is one a token, are not SentencePiece's; a Metaspace is not its normalizer."""
    with pytest.raises(ValueError, match="Metaspace|no scores give the merges"):
        vocabulary(make(kind, tiny.text()))
