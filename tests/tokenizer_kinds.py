"""Small tokenizers of every kind, trained where they are asked for."""

import collections
import json
import random
import re

import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jlora.storage.pre_tokenizers import PRE_TOKENIZERS

MARKS = ["<|im_start|>", "<|im_end|>"]
SPECIAL = ["<unk>", "<s>", "</s>", *MARKS]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bpe(text, *, normalizer=None, pre=None, decoder=None, alphabet=(), special=SPECIAL, words=False, **model):
    backend = Tokenizer(models.BPE(unk_token="<unk>", **model))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    if decoder is not None:
        backend.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), initial_alphabet=list(alphabet), show_progress=False
    )
    # By words, as SentencePiece does: where a tokenizer does not split, a trainer would learn whole lines.
    backend.train_from_iterator(re.split(r"(?= )|\n", text) if words else [text], trainer)
    return backend


def _byte_level(text, prefix, pattern=None):
    byte = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    pre = byte if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte])
    return _bpe(text, pre=pre, decoder=decoders.ByteLevel(), alphabet=pre_tokenizers.ByteLevel.alphabet())


def _llama2(text):
    """A normalizer that puts a space before every part between special tokens; unknown characters as bytes."""
    replace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _bpe(
        text,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(replace),
        special=[*SPECIAL, *_BYTES],
        words=True,
        byte_fallback=True,
        fuse_unk=True,
    )


def _metaspace(text, scheme, split):
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
    return _bpe(
        text,
        pre=metaspace,
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=scheme)]),
        special=[*SPECIAL, *_BYTES],
        words=True,
        byte_fallback=True,
    )


def _unigram(text):
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, initial_alphabet=list(set(text))
    )
    backend.train_from_iterator(text.split("\n"), trainer)
    return backend


def _wordpiece(text):
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([text], trainer)
    return backend


KINDS = {
    "gpt2": lambda text: _byte_level(text, False),
    "add_prefix_space": lambda text: _byte_level(text, True),
    "llama2": _llama2,
    "metaspace": lambda text: _metaspace(text, "first", False),
    "metaspace_always": lambda text: _metaspace(text, "always", True),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}


def sentencepiece(text: str, *, before: bool, users=()) -> PreTrainedTokenizerFast:
    """Gemma's kind of tokenizer and, with a space `before` the text, Mistral's, with all the merges that transformers makes of a
    SentencePiece model: by the score of the token that they make, whatever it is made of."""
    spaced = text.replace(" ", "▁")
    counts = collections.Counter(word[i:j] for word in re.findall("▁*[^▁\n]+", spaced) for i in range(len(word)) for j in
                                 range(i + 2, min(len(word), i + 8) + 1))  # fmt: skip
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:300]
    names = ["<pad>", "</s>", "<s>", "<unk>", *_BYTES, *users, *words, *sorted(set(spaced))]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = []
    for score, word in [*((1, user) for user in users), *((-i, word) for i, word in enumerate(words))]:
        splits = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in ids and word[i:] in ids]
        merges += [(score, len(left), len(right), left, right) for left, right in splits]
    merges = [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:3], reverse=True)]
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if before else replace
    if not before:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    end = [decoders.Strip(" ", 1, 0)] if before else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    backend.add_tokens([AddedToken(user, normalized=True, special=False) for user in users])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make(kind: str, text: str, *, chat: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, trained on `text`."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](text),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=MARKS,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = chat
    return made


PROBES = [
    "It's 2024: we've 123456 sheep, don't they'll WE'LL I'M 'sup'\n\n\n  Two  spaces\t\ttabs \r\n end  ",
    "Über naïve Ünïcöde — 灯台のランプ、東京。 Привет мир! مرحبا ١٢٣ ²½Ⅷ 한국어",
    '🙂👩‍🚀🇩🇪 ❤️ x=3.14*(y+2)//z; print("a_b")\n\tif (a!=b) {\n\n}',
    "a\u00a0b\u3000c\u200bd e\u0301 é ’s “quote” …\x1c\x00\u2028\u0085",
    "<|im_start|>user\nWho keeps the <tool call> 12?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>keeper the keeper keeper",
    " leading", "trailing \n", "\n", " ", "",
]  # fmt: skip
ALPHABET = [
    *"aZé灯ñß'’\".,!?-_(){}/\\ \t\n\r\u00a0\u3000\u200b\u2028\u0085\x1c0159١²½Ⅷ🙂❤️👩\u200d🚀\u0301\u0300मि한Ж$€+=<|>"
]
ALPHABET += [" ", "  ", "\n\n", "'s", "'LL", "'ſ", "12345", " the", "<|im_end|>", "<tool call>"]


def texts_of(count, *, more=(), seed=0):
    """`PROBES`, and so many strings of random pieces."""
    draw, pieces = random.Random(seed), [*ALPHABET, *more]
    return [*PROBES, *("".join(draw.choices(pieces, k=draw.randint(1, 40))) for _ in range(count))]


def rebuilt(name):
    """A trained tokenizer with the pre-tokenizer of that name; a whole word of it is out of reach for the merges."""
    ((steps, whole_words),) = [rules for rules, known in PRE_TOKENIZERS.items() if known == name]
    makers = {
        "Split": lambda regex, behaviour, invert: pre_tokenizers.Split(Regex(regex), behaviour.lower(), invert),
        "ByteLevel": lambda space, regex: pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=regex),
        "Digits": lambda each: pre_tokenizers.Digits(individual_digits=each),
    }
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence([makers[kind](*rest) for kind, *rest in steps])
    backend.decoder = decoders.ByteLevel()
    marks = [tiny.EOT, "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([tiny.text(), *PROBES * 3], trainer)
    fields = json.loads(backend.to_str())
    fields["model"]["merges"] = [pair for pair in fields["model"]["merges"] if "".join(pair) != "Ġkeeper"]
    assert "Ġkeeper" in fields["model"]["vocab"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)), bos_token=tiny.EOT, eos_token=tiny.EOT
    )
    made.add_tokens(["<tool call>"])
    return made
