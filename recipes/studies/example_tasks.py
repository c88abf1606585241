"""What ``example_scripts.py`` trains on and with: a tiny model, tokenizer and data set for each script, made there.

Each ``prepare_...`` writes them into a folder, the model as ``model``, and returns the arguments that name them there.
"""

import json
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from grape_hf.text.sample import embedded_sample

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def save_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE of 1,000 tokens on the spot."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        pad_token="<pad>",
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)


def texts(folder: Path) -> DatasetDict:
    """Make the tokenizer in ``model``, write the embedded text as train.txt and validation.txt."""
    data = embedded_sample()
    save_tokenizer(list(data["train"]["text"]), folder / "model")
    for split in ("train", "validation"):
        lines = [" ".join(text.split()) for text in data[split]["text"]]
        (folder / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    return data


def bert_config() -> BertConfig:
    """Four layers, width 64."""
    return BertConfig(
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=1000,
        max_position_embeddings=64,
        pad_token_id=0,
    )


def prepare_clm(folder: Path) -> str:
    """Make a small GPT-2 and the texts."""
    texts(folder)
    set_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, vocab_size=1000, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    return (
        "--model_name_or_path model --train_file train.txt --validation_file validation.txt --block_size 64 "
        "--learning_rate 3e-3"
    )


def prepare_mlm(folder: Path) -> str:
    """Make a small BERT and the texts."""
    texts(folder)
    set_seed(0)
    BertForMaskedLM(bert_config()).save_pretrained(folder / "model")
    return (
        "--model_name_or_path model --train_file train.txt --validation_file validation.txt --max_seq_length 64 "
        "--learning_rate 3e-3"
    )


def prepare_glue(folder: Path) -> str:
    """Make a small BERT and a task: tell paragraphs of prose from indented ones, which are code or grammar."""
    data = texts(folder)
    for split in ("train", "validation"):
        rows = [{"sentence1": " ".join(t.split()), "label": int(t.startswith(" "))} for t in data[split]["text"]]
        (folder / f"{split}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    set_seed(0)
    BertForSequenceClassification(bert_config()).save_pretrained(folder / "model")
    return (
        "--model_name_or_path model --train_file train.json --validation_file validation.json --max_seq_length 64 "
        "--learning_rate 3e-3"
    )


def prepare_images(folder: Path) -> str:
    """Make a small ViT, and folders of pictures that a crop or a flip leaves what they are: stripes and checks."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    for i in range(1200):
        a, b = ((z + draw.integers(4)) // 2 % 2 for z in (x, y))  # stripes of two pixels
        label, pattern = [("across", b), ("down", a), ("checks", a ^ b)][i % 3]
        pixels = 255 * (0.2 + 0.6 * pattern) + draw.normal(0, 20, pattern.shape)
        picture = folder / ("validation" if i < 240 else "train") / label / f"{i:04}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(picture)
    set_seed(0)
    config = ViTConfig(
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    ViTForImageClassification(config).save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    # Without the last option the Trainer takes the column away that the script makes the pixels of.
    return (
        "--model_name_or_path model --train_dir train --validation_dir validation --label_column_name label "
        "--remove_unused_columns False --learning_rate 1e-3"
    )
