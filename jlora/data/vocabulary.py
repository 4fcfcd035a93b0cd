"""Whether a data set's tokens are a model's."""

from jlora._typing import PretrainedTokenizer
from jlora.data.rows import CountedDataset


def check_vocabulary(dataset: CountedDataset, tokenizer: PretrainedTokenizer, vocab_size: int) -> None:
    """Refuses a data set with an id that the model's embedding has no row for; what the tokenizer could give, and no text
    holds, does not matter. Pads with id 0 where the tokenizer's own padding is such an id.

    Raises:
        ValueError: with the token and the start of the row that holds it.
    """
    if dataset.largest_token >= vocab_size:
        rows = ((index, dataset.row(index).input_ids.tolist()) for index in range(len(dataset)))
        index, ids = next((index, ids) for index, ids in rows if max(ids) >= vocab_size)
        start = tokenizer.decode(ids[:24])[:60]
        raise ValueError(f"{beyond(max(ids), tokenizer, vocab_size)} (Row {index} of the data, {start!r} …)")
    if not 0 <= dataset.pad_id < vocab_size:
        dataset.pad_id = 0


def beyond(token_id: int, tokenizer: PretrainedTokenizer, vocab_size: int) -> str:
    """Says that an id has no row in the embedding, and what to do."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"Token id {token_id} ({token!r}) is outside the model's vocabulary 0..{vocab_size - 1}: tokenizer and model are not of "
        "the same checkpoint. Use the tokenizer files that came with the model."
    )
