"""A small text that needs no file and no network: the language reference that every Python carries.

``pydoc_data.topics`` holds what ``help("assert")`` and its like print: about 65,000 words of English prose and
examples, in some 80 topics. A fifth of it stands in several topics, so a split by topic alone would put training text
into validation. Here no 13 words in a row (split at whitespace, case ignored) stand in both splits, by construction.
"""

import re
import sys
from collections.abc import Iterable

from datasets import Dataset, DatasetDict

RUN = 13  # so many words in a row are taken to be a quotation, not a coincidence
_EVERY = 8  # one topic in so many is for validation


def embedded_sample() -> DatasetDict:
    """Make the embedded sample: paragraphs of Python's own documentation, split by topic.

    Of paragraphs that stand in several topics the first is kept. Every eighth topic, in alphabetical order, is
    validation. A training paragraph that would share a run of 13 words with validation, alone or together with the
    paragraph before it, is left out.

    Returns:
        Splits ``train`` (about 49,000 words) and ``validation`` (about 3,800), with the column ``text``: a paragraph
        each, in the order of the topics, ending in an empty line. The numbers differ a little between versions of
        Python, the text is the same in every run of one.

    Raises:
        RuntimeError: if this Python has been stripped of ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            f"The embedded sample is the prose in pydoc_data.topics, and {sys.executable} has none. Install the full "
            "standard library of Python (on Debian: libpython3-stdlib), or name a text with --train_file."
        ) from error
    names = sorted(topics)
    paragraphs = dict(zip(names, _first_appearances(topics[name] for name in names), strict=True))
    validation_topics = names[::_EVERY]
    validation = [text for name in validation_topics for text in paragraphs[name]]
    candidates = [text for name in names if name not in validation_topics for text in paragraphs[name]]
    return DatasetDict(
        train=Dataset.from_dict({"text": _without_runs_of(validation, candidates)}),
        validation=Dataset.from_dict({"text": validation}),
    )


def _first_appearances(texts: Iterable[str]) -> list[list[str]]:
    """Cut each text into paragraphs; drop those seen before, whatever their line breaks."""
    seen: set[str] = set()
    kept: list[list[str]] = []
    for text in texts:
        kept.append([])
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept[-1].append(paragraph.strip("\n") + "\n\n")
    return kept


def _without_runs_of(held_out: list[str], candidates: list[str]) -> list[str]:
    """Keep the candidates that, one after the other, share no run of words with ``held_out``."""
    forbidden = set(_runs([word for text in held_out for word in _words(text)]))
    kept: list[str] = []
    before: list[str] = []  # the last words kept: a run may reach over the end of a paragraph
    for text in candidates:
        words = before + _words(text)
        if forbidden.isdisjoint(_runs(words)):
            kept.append(text)
            before = words[-(RUN - 1) :]
    return kept


def _words(text: str) -> list[str]:
    return text.lower().split()


def _runs(words: list[str]) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
