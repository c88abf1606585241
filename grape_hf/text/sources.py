"""Where the text of a language model comes from: files, a data set on the Hub, or the embedded sample.

What is asked for by name is loaded or is an error. Only where nothing is asked for, WikiText-103 is tried and the
embedded sample takes its place if the Hub is out of reach; the name that travels with the data says which it was.
"""

import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset, load_dataset

from grape_hf import hub
from grape_hf.text.sample import embedded_sample

logger = logging.getLogger(__name__)

WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
EMBEDDED = "embedded-sample"
_HELD_OUT = 0.05  # share of the rows, from the end, that is validation where the data has no such split


@dataclass(frozen=True)
class TextData:
    """Text in two splits, and its true name.

    Attributes:
        name: what the text is, for metrics and model cards.
        train: rows with the column ``column``; an ``IterableDataset`` when streaming.
        validation: the same columns; always a whole ``Dataset``, since every evaluation reads all of it.
        column: the column that holds the text.
        hub_id: the name on the Hub, for the metadata of a model card; None for files and the embedded sample.
    """

    name: str
    train: Dataset | IterableDataset
    validation: Dataset
    column: str = "text"
    hub_id: str | None = None


def load_text(
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    streaming: bool = False,
    validation_rows: int | None = None,
    hub_timeout: float = 15.0,
) -> TextData:
    """Load text: from files, else from the Hub, else the embedded sample.

    Args:
        train_file: a ``.parquet`` file, or a text file, whose lines are the rows.
        validation_file: of either kind; without one, the last 5 % of the training rows are held out.
        dataset_name: a data set on the Hub or a local folder of one; ``embedded-sample`` for the sample that every
            Python carries. Default: WikiText-103 (raw), or the embedded sample if the Hub is not in reach.
        dataset_config: its configuration.
        text_column: the column that holds the text; text files have ``text``.
        streaming: read the training rows as they are needed, instead of all before the start.
        validation_rows: keep only the first rows of the validation split; when a stream has no such split, its first
            rows are validation and the rest is training.
        hub_timeout: seconds to wait for the Hub when no data is named.

    Returns:
        The two splits with their true name.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: an empty file or split, a column that is missing or holds no text, two sources at once, or a data
            set that cannot be loaded.
    """
    if train_file and (dataset_name or dataset_config):
        raise ValueError(
            f"Expected one source of text, got both train_file={train_file!r} and dataset_name={dataset_name!r}, "
            f"dataset_config={dataset_config!r}. Leave one out."
        )
    if validation_file and not train_file:
        raise ValueError(f"validation_file={validation_file!r} needs a train_file beside it, and none was given.")
    if train_file:
        name = " / ".join(hub.without_home(file) for file in (train_file, validation_file) if file)
        splits, hub_id = _load_files(train_file, validation_file, streaming), None
    elif dataset_name == EMBEDDED or (not dataset_name and not dataset_config and not _hub_in_reach(hub_timeout)):
        name, hub_id = f"embedded sample (pydoc_data.topics of Python {platform.python_version()})", None
        splits = dict(embedded_sample())
        if streaming:
            splits["train"] = splits["train"].to_iterable_dataset()
    else:
        source = dataset_name or WIKITEXT[0]
        config = dataset_config or (None if dataset_name else WIKITEXT[1])
        name, hub_id = hub.name_of(source, config)
        splits = _load_named(source, config, streaming)
    train, validation = _with_validation(splits, name, validation_rows)
    for split, rows in (("training", train), ("validation", validation)):
        _check_text(rows, text_column, f"the {split} split of {name}")
    return TextData(name, train, validation, text_column, hub_id)


def _hub_in_reach(timeout: float) -> bool:
    """Ask the Hub for WikiText-103, and say loudly what follows if it does not answer in time."""
    reason = hub.why_out_of_reach(WIKITEXT[0], timeout)
    if reason is None:
        return True
    logger.warning(
        "\n%s\nThis is NOT WikiText-103. The Hub is not in reach (%s), and no data was named, so the embedded sample\n"
        "is used: about 50,000 words of Python's own documentation. Its perplexities cannot be compared with any\n"
        "published figure. Name your text with --train_file, or a data set with --dataset_name.\n%s",
        "!" * 110,
        reason,
        "!" * 110,
    )
    return False


def _load_files(train_file: str, validation_file: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    splits = {}
    for split, file in (("train", train_file), ("validation", validation_file)):
        if file is None:
            continue
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(
                f"{split}_file={file!r}: expected a text or parquet file, found "
                f"{'a folder' if path.is_dir() else 'nothing'} there ({path.resolve()}). Check the path"
                f"{', or give a folder of a data set as dataset_name' if path.is_dir() else ''}."
            )
        if path.stat().st_size == 0:
            raise ValueError(f"{split}_file={file!r} is empty: expected text, got 0 bytes. Check what wrote it.")
        kind, options = ("parquet", {}) if path.suffix == ".parquet" else ("text", {"keep_linebreaks": True})
        try:
            splits[split] = load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **options)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(
                f"{split}_file={file!r} cannot be read as {kind}: {error.__cause__ or error}. Expected a .parquet "
                "file with rows, or text in UTF-8 under any other name."
            ) from error
    return splits


def _load_named(name: str, config: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    try:
        return dict(load_dataset(name, config, streaming=streaming))
    except Exception as error:
        raise ValueError(
            f"The data set {name!r}{f' ({config})' if config else ''} cannot be loaded: {type(error).__name__}: "
            f"{error}\nCheck its name and configuration and the way to the Hub, or give files with train_file and "
            f"validation_file, or dataset_name={EMBEDDED!r} for a small text that needs no network."
        ) from error


def _with_validation(
    splits: dict[str, Dataset | IterableDataset], name: str, rows: int | None
) -> tuple[Dataset | IterableDataset, Dataset]:
    """Make sure of a validation split that is a whole ``Dataset``."""
    if "train" not in splits:
        raise ValueError(f"{name} has no split `train`, only {', '.join(splits)}. Use a data set that has one.")
    train, validation = splits["train"], splits.get("validation")
    if validation is None:
        logger.warning(
            "%s has no validation split: %s of the training rows are held out.", name, "some" if rows else "5 %"
        )
        if isinstance(train, IterableDataset):
            if rows is None:
                raise ValueError(
                    f"{name} is streamed and has no validation split, and a stream's last rows are unknown. Set "
                    "validation_rows: that many of its first rows become validation."
                )
            validation, train = train.take(rows), train.skip(rows)
        else:
            kept = len(train) - max(1, rows or round(_HELD_OUT * len(train)))
            if kept < 1:
                raise ValueError(f"{name} has {len(train)} rows, too few to hold out some. Give a validation_file.")
            # The end, in one piece: a random choice would leave validation rows between their training neighbours.
            validation, train = train.select(range(kept, len(train))), train.select(range(kept))
    if isinstance(validation, IterableDataset):
        validation = Dataset.from_list(list(validation if rows is None else validation.take(rows)))
    elif rows is not None:
        validation = validation.select(range(min(rows, len(validation))))
    return train, validation


def _check_text(rows: Dataset | IterableDataset, column: str, what: str) -> None:
    """Refuse a split without rows, or whose ``column`` is not there or holds something else than text."""
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{what} is empty: expected rows of text, got none.")
    if column not in first:
        raise ValueError(f"{what} has no column {column!r}, only {', '.join(map(repr, first))}. Set text_column.")
    if not isinstance(first[column], str):
        raise ValueError(
            f"{what}: expected text in column {column!r}, got {type(first[column]).__name__}. Set text_column."
        )
