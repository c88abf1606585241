"""Text for language models: where it comes from, and how it becomes blocks of tokens."""

from grape_hf.text.packing import count_text, iterate_texts, pack, tokenize, train_tokenizer
from grape_hf.text.sample import embedded_sample
from grape_hf.text.sources import EMBEDDED, WIKITEXT, TextData, load_text

__all__ = [
    "EMBEDDED",
    "WIKITEXT",
    "TextData",
    "count_text",
    "embedded_sample",
    "iterate_texts",
    "load_text",
    "pack",
    "tokenize",
    "train_tokenizer",
]
