"""Text as blocks of tokens in ``.npy`` files, so that whoever trains on them needs no tokenizer and no `datasets`.

``prepare`` trains a byte-level BPE on the training split, packs each split into blocks and writes ``<split>.npy``,
``(blocks, context)`` of uint16, into a folder under ``outputs/study_data``, which git ignores. ``load`` reads it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import TOP
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "validation", "test")
_MOST = 2**15
_ROWS = 10_000  # rows that are packed together: as the cells of November 2026 had them


class TokenBlocks(Dataset):
    """Blocks of tokens, ``(blocks, context)``, on the device that they are used on: a batch costs one look-up."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        """Return one block."""
        return self.tokens[index].long()

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a batch of blocks, ``(batch, context)``."""
        chosen = torch.tensor(indices).to(self.tokens.device, non_blocking=True)  # else it waits for the step before
        return self.tokens[chosen].long()


def folder_of(data: dict[str, Any]) -> Path:
    """Return where the blocks of a study's ``data`` lie."""
    return TOP / "outputs" / "study_data" / f"{Path(data['data_dir']).name}-{data['vocab_size']}-{data['context']}"


def prepare(data: dict[str, Any]) -> Path:
    """Tokenise and pack the text, if that has not been done; return the folder.

    Raises:
        ValueError: if the vocabulary is too large for the files.
    """
    folder = folder_of(data)
    if all((folder / f"{split}.npy").exists() for split in SPLITS):
        return folder
    if data["vocab_size"] > _MOST:
        raise ValueError(f"vocab_size={data['vocab_size']}: expected at most {_MOST:,}, as tokens are kept in 16 bits.")
    from datasets import load_dataset  # only here: where the cells are run it may be missing

    from grape_hf.text import iterate_texts, pack, tokenize, train_tokenizer

    texts = load_dataset("parquet", data_dir=str((TOP / data["data_dir"]).resolve()))
    tokenizer = train_tokenizer(iterate_texts(texts["train"]), data["vocab_size"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    for split in SPLITS:
        # Paragraphs end in a line break already; an empty line between them is what the cells of November 2026 had.
        lines = texts[split].map(lambda row: {"text": row["text"] + "\n"})
        blocks = pack(tokenize(lines, tokenizer), data["context"], what=split, rows=_ROWS)
        tokens = np.concatenate([np.array(rows["input_ids"], dtype=np.uint16) for rows in blocks.iter(20_000)])
        part = folder / f"{split}.part.npy"
        np.save(part, tokens)
        part.replace(folder / f"{split}.npy")
        print(f"{folder / split}.npy: {len(tokens):,} blocks of {data['context']} tokens", flush=True)
    return folder


def load(data: dict[str, Any], device: torch.device) -> dict[str, TokenBlocks]:
    """Read the blocks of each split.

    Raises:
        FileNotFoundError: if they have not been prepared.
    """
    folder = folder_of(data)
    if missing := [split for split in SPLITS if not (folder / f"{split}.npy").exists()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(f'{split}.npy' for split in missing)}. Make it where `datasets` is installed: "
            "python recipes/studies/language_model.py STUDY.yaml --prepare"
        )
    # torch can index uint16 on few devices
    arrays = {split: np.load(folder / f"{split}.npy").astype(np.int16) for split in SPLITS}
    return {split: TokenBlocks(torch.from_numpy(array).to(device)) for split, array in arrays.items()}
