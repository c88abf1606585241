"""Train a language model: text, tokenizer, blocks of tokens, decoder, Trainer, and what a run leaves behind.

``recipes/wikitext103.py`` says how it is started and what to expect. ``main`` is the whole of it.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.metrics import perplexity_from_logits, token_nll
from grape_hf.recipes.common import (
    plot_callbacks,
    same_on_every_process,
    save_metrics,
    write_history,
    write_or_push_card,
)
from grape_hf.recipes.parsing import parse_overrides, parse_recipe
from grape_hf.text import TextData, count_text, iterate_texts, load_text, pack, tokenize, train_tokenizer


@dataclass
class DataArguments:
    """Which text, and how it becomes blocks of tokens."""

    train_file: str | None = field(default=None, metadata={"help": "A .parquet file, or text under any other name."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Of either kind. Default: the last 5 %% of the rows of train_file."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, or embedded-sample. Default: Salesforce/wikitext, wikitext-103-raw-v1; the "
            "embedded sample if the Hub is out of reach."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training text while training; needs --max_steps."}
    )
    validation_rows: int | None = field(default=None, metadata={"help": "Use only so many rows for validation."})
    hub_timeout: float = field(default=15.0, metadata={"help": "Seconds to wait for the Hub when no data is named."})
    context: int = field(default=128, metadata={"help": "Tokens in a block."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer to use. Default: the model's, or byte-level BPE trained on the text."},
    )
    tokenizer_vocab_size: int = field(default=8192, metadata={"help": "Size of a tokenizer that is trained."})
    tokenizer_lowercase: bool = field(default=False, metadata={"help": "Lower-case all text (trained tokenizers)."})
    tokenizer_rows: int = field(default=1_000_000, metadata={"help": "Train the tokenizer on at most so many rows."})
    preprocessing_workers: int = field(
        default_factory=lambda: os.cpu_count() or 1, metadata={"help": "Processes that tokenise. Default: one a core."}
    )


@dataclass
class ModelArguments:
    """Which decoder: a pretrained one, or a fresh one of a given shape."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this model; the options below are for one from scratch."}
    )
    model_type: str = field(default="gpt2", metadata={"help": "Architecture: any causal model type of transformers."})
    hidden_size: int = field(default=256, metadata={"help": "Width d."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Blocks L."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "More of the model's configuration, as `name=value,name=value` or, in a YAML file, a mapping; e.g. "
            "`resid_pdrop=0,tie_word_embeddings=false`."
        },
    )
    # As trl calls them.
    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters on model_name_or_path, and nothing else of it."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters' output is scaled by this over lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules that get an adapter, e.g. q_proj v_proj. Default: peft's for the model."
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Load, train, evaluate, and leave everything in the output folder."""
    data_args, model_args, training_args = parse_recipe(
        DataArguments, ModelArguments, GrapeTrainingArguments, argv=argv
    )
    logging.basicConfig(level=training_args.get_process_log_level(), format="%(levelname)s %(name)s: %(message)s")
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="loading and tokenising text"):
        data = load_data(data_args)
        tokenizer = load_tokenizer(data, data_args, model_args, training_args)
        columns = (data.column, data_args.preprocessing_workers)
        train_tokens = tokenize(data.train, tokenizer, *columns)
        validation_tokens = tokenize(data.validation, tokenizer, *columns)
        packing = (data_args.context, data_args.preprocessing_workers)
        train_blocks = pack(train_tokens, *packing, what=f"the training split of {data.name}")
        validation_blocks = pack(validation_tokens, *packing, what=f"the validation split of {data.name}")
    same_on_every_process(data.name)
    tokens, words = count_text(validation_tokens)

    trainer = GrapeTrainer(
        model=load_model(model_args, tokenizer, data_args.context),
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=validation_blocks,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=token_nll,
        compute_metrics=perplexity_from_logits(words_per_token=words / tokens),
        callbacks=plot_callbacks(),
    )
    card = {"dataset": data.name, "dataset_tags": data.hub_id, "tasks": "text-generation"}
    if training_args.push_to_hub:
        trainer.create_model_card(**card)  # what is pushed while training tells it too
    trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save_metrics(trainer, "train", {"dataset": data.name, "method": training_args.method} | trained.metrics)
    save_metrics(trainer, "eval", {"dataset": data.name, "method": training_args.method} | trainer.evaluate())
    trainer.save_state()
    trainer.save_model(_internal_call=True)  # else it would push now, before the rest is there
    if trainer.is_world_process_zero():
        output = Path(training_args.output_dir)
        prompt = torch.tensor(validation_blocks[0]["input_ids"][: data_args.context // 4])
        write_sample(output, prompt, data_args.context, training_args.seed)
        write_history(output, trainer.state.log_history)
    write_or_push_card(trainer, card)


def load_data(args: DataArguments) -> TextData:
    """Load the text that the options name."""
    return load_text(
        train_file=args.train_file,
        validation_file=args.validation_file,
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        text_column=args.text_column,
        streaming=args.streaming,
        validation_rows=args.validation_rows,
        hub_timeout=args.hub_timeout,
    )


def load_tokenizer(
    data: TextData, data_args: DataArguments, model_args: ModelArguments, training_args: GrapeTrainingArguments
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was named, or train one; the first process trains it and the others read its file."""
    named = data_args.tokenizer_name or model_args.model_name_or_path
    if named:
        return AutoTokenizer.from_pretrained(named)
    if training_args.local_process_index == 0:
        texts = iterate_texts(data.train, data.column, limit=data_args.tokenizer_rows)
        trained = train_tokenizer(texts, data_args.tokenizer_vocab_size, data_args.tokenizer_lowercase)
        trained.save_pretrained(training_args.output_dir)
    return AutoTokenizer.from_pretrained(training_args.output_dir)


def load_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedModel | PeftModel:
    """Load the pretrained model that was named, with adapters if asked for, or make one of the shape asked for.

    Weights are float32.

    Raises:
        ValueError: an override that the configuration does not know, a context beyond the model's positions, a model
            that is not a language model, or adapters for a model that is not pretrained.
    """
    if args.use_peft and not args.model_name_or_path:
        raise ValueError("use_peft trains adapters on a pretrained model: name one by model_name_or_path.")
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and context > limit:
            raise ValueError(
                f"context={context}: {args.model_name_or_path} has {limit} positions. Set --context {limit}."
            )
        return with_adapters(model, args) if args.use_peft else model
    defaults = AutoConfig.for_model(args.model_type)
    shape: dict[str, Any] = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
        "max_position_embeddings": context,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if hasattr(defaults, "intermediate_size"):
        shape["intermediate_size"] = 4 * args.hidden_size  # GPT-2's rule; elsewhere the default is a large model's
    overrides = parse_overrides("config_overrides", args.config_overrides)
    if unknown := [name for name in overrides if not hasattr(defaults, name)]:
        raise ValueError(
            f"config_overrides: {type(defaults).__name__} has no {', '.join(unknown)}; it has "
            f"{', '.join(sorted(defaults.to_dict()))}."
        )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(args.model_type, **shape | overrides))
    check_predicts_next_token(model)
    return model


def with_adapters(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    """Put LoRA adapters on a model; all else of it is frozen."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        fan_in_fan_out=model.config.model_type == "gpt2",  # whose linear layers keep their weights transposed
    )
    return get_peft_model(model, config)


def check_predicts_next_token(model: PreTrainedModel) -> None:
    """Refuse decoders of translation models: their own loss asks for the token that they have just read.

    Raises:
        ValueError: if the model's loss is not that of the next token.
    """
    with torch.no_grad():
        tokens = torch.arange(1, 9)[None]  # 0 is padding in many vocabularies
        model.eval()
        output = model(input_ids=tokens, labels=tokens)
        model.train()
    nll, count = token_nll(output.logits, tokens)[0].tolist()
    if abs(output.loss.item() - nll / count) > 1e-3 * nll / count:
        raise ValueError(
            f"The loss of {type(model).__name__} is not that of the next token: expected {nll / count:.4f} on a probe, "
            f"got {output.loss.item():.4f}. Use another model_type, e.g. gpt2, llama or openai-gpt."
        )


def write_sample(output: Path, prompt: torch.Tensor, context: int, seed: int) -> None:
    """Continue the beginning of the validation text with the model as it was saved: opened as any user would."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    set_seed(seed)
    written = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=True,
        top_k=50,
        max_new_tokens=context - len(prompt),
    )[0]
    begin, rest = tokenizer.decode(prompt), tokenizer.decode(written[len(prompt) :], skip_special_tokens=True)
    (output / "sample.txt").write_text(begin + rest, encoding="utf-8")
    print(f"\n***** sample *****\n{begin}[...]{rest}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
