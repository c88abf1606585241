"""From text to blocks of tokens: a tokenizer, and rows packed end to end into contexts of one length.

Rows are lines or paragraphs of running text, so nothing but a line break is put between them. Whitespace words are
counted on the way: perplexity per word, unlike perplexity per token, can be compared between tokenizers.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# The first label must be marked as not counted: for models such as GPT-2 the Trainer (transformers 5.23) divides the
# loss by the number of labels without leaving out the one that shifting drops, so its eval_loss would be 1/context low.
_IGNORED = -100
_ROWS = 2000  # rows a worker packs at a time; what is left over of them, less than one context, is dropped


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can write any text, with one special token: the end of text.

    Args:
        texts: what it learns from.
        vocab_size: entries, the 256 bytes and the special token included; a small text yields fewer.
        lowercase: drop the case of all text, as the paper's recipe does. It cannot be had back in what is generated.

    Returns:
        A tokenizer that ``save_pretrained`` saves with the model.

    Raises:
        ValueError: if ``vocab_size`` cannot even hold the bytes.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: expected at least {smallest}, for the bytes and {END_OF_TEXT}.")
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenize(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str = "text",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Turn each row of text into tokens, and count its tokens and whitespace words.

    A row that does not end in a line break gets one; an empty row, or a null, adds nothing. No special tokens
    are added.

    Args:
        rows: rows with text in ``column``.
        tokenizer: any.
        column: the column of the text.
        num_proc: worker processes; the result is cached on disk where ``rows`` came from disk. Not for a stream.

    Returns:
        The rows with the columns ``input_ids``, ``tokens`` and ``words``, and no others.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [text + "\n" if text and not text.endswith("\n") else text or "" for text in batch[column]]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": ids, "tokens": [len(i) for i in ids], "words": [len(text.split()) for text in texts]}

    return _map(rows, encode, num_proc, "Tokenising")


def count_text(tokenized: Dataset) -> tuple[int, int]:
    """Count what ``tokenize`` returned: all its tokens, and all its whitespace words."""
    return sum(tokenized["tokens"]), sum(tokenized["words"])


def pack(
    tokenized: Dataset | IterableDataset,
    context: int,
    num_proc: int | None = None,
    what: str = "the text",
    rows: int = _ROWS,
) -> Dataset | IterableDataset:
    """Pack tokenised rows end to end into blocks of ``context`` tokens.

    Each ``rows`` rows are packed by themselves, and what they leave over, less than one context, is dropped.

    Args:
        tokenized: rows with ``input_ids``, as ``tokenize`` makes them.
        context: tokens in a block; the model predicts all of them but the first.
        num_proc: worker processes. Not for a stream.
        what: name of the text, for the error.
        rows: how many rows are packed together. Data that is to be block for block that of an earlier run needs its
            number.

    Returns:
        Blocks with ``input_ids`` and ``labels``, both of ``context`` tokens and equal (the models shift them) but for
        the first label, -100: nothing predicts it.

    Raises:
        ValueError: if the text does not fill a single block, or a block is too short to predict anything.
    """
    if context < 2:
        raise ValueError(f"context={context}: expected at least 2 tokens, one to read and one to predict.")

    def concatenate(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        blocks = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
        return {"input_ids": blocks, "labels": [[_IGNORED, *block[1:]] for block in blocks]}

    blocks = _map(tokenized, concatenate, num_proc, f"Packing into blocks of {context} tokens", rows)
    if next(iter(blocks), None) is None:
        found = f"{count_text(tokenized)[0]:,} tokens" if isinstance(tokenized, Dataset) else "less"
        raise ValueError(
            f"{what} is shorter than one context: expected at least {context:,} tokens, got {found}. Give more text, "
            "or set a smaller context."
        )
    if isinstance(blocks, Dataset):
        tokens = count_text(tokenized)[0]
        dropped = tokens - len(blocks) * context
        logger.info(
            "%s: %s blocks of %s tokens, %s of %s tokens left over", what, len(blocks), context, dropped, tokens
        )
    return blocks


def iterate_texts(rows: Dataset | IterableDataset, column: str = "text", limit: int | None = None) -> Iterator[str]:
    """Iterate over the text of the first ``limit`` rows (default: all), to train a tokenizer on."""
    if isinstance(rows, Dataset) and limit is not None:
        limit = min(limit, len(rows))  # datasets 4.7 takes no more rows than there are
    for batch in (rows if limit is None else rows.take(limit)).iter(_ROWS):
        yield from batch[column]


def _map(
    rows: Dataset | IterableDataset, function: Any, num_proc: int | None, desc: str, batch_size: int = _ROWS
) -> Dataset | IterableDataset:
    if isinstance(rows, IterableDataset):
        # What a stream's columns are is not always known before its first row.
        return rows.map(function, batched=True, batch_size=batch_size, remove_columns=list(next(iter(rows))))
    # More workers than batches would only cut the rows into shorter pieces, each with a remainder to drop.
    workers = min(num_proc or 1, max(1, len(rows) // batch_size))
    return rows.map(
        function,
        batched=True,
        batch_size=batch_size,
        num_proc=workers if workers > 1 else None,
        remove_columns=rows.column_names,
        desc=desc,
    )
