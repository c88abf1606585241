"""The main job: once as a user starts it, then by its ``main`` in this process; real files, tiny models."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from grape_hf import hub
from grape_hf.reports.cards import write_card
from grape_hf.text import train_tokenizer

TOP = Path(__file__).parents[1]
LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
LINES = [f"line {i} of a text about {('one', 'two', 'three')[i % 3]} things\n" for i in range(400)]
TINY: dict[str, Any] = {
    "context": 16,
    "tokenizer_vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "max_steps": 2,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def launch(*arguments: object) -> str:
    """Start the recipe as its first lines say, and return what it printed."""
    command = [sys.executable, *LAUNCH.split(), "recipes/wikitext103.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=TOP, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def options_file(folder: Path, name: str = "options.yaml", **options: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(TINY | options) if path.suffix == ".json" else yaml.safe_dump(TINY | options))
    return path


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "all_results.json").read_text())


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("grape_hf.recipes.wikitext103")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    (path / "train.txt").write_text("".join(LINES))
    (path / "valid.txt").write_text("".join(LINES[:100]))
    return path


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """A run from a YAML file with options on the command line over it: its folder, and what it printed."""
    options = options_file(
        folder,
        train_file=str(folder / "train.txt"),
        validation_file=str(folder / "valid.txt"),
        config_overrides={"resid_pdrop": 0.0, "n_inner": 24},
        calibration_strategy="steps",
        calibration_interval=4,
        learning_rate="1e-2",
    )
    run = folder / "run"
    return run, launch(options, "--max_steps", 12, "--output_dir", run)


class TestARun:
    def test_options_come_from_both(self, finished: tuple[Path, str]):
        state = json.loads((finished[0] / "trainer_state.json").read_text())
        config = json.loads((finished[0] / "config.json").read_text())
        assert state["max_steps"] == 12
        assert (config["model_type"], config["n_embd"], config["n_layer"]) == ("gpt2", 16, 3)
        assert (config["n_inner"], config["resid_pdrop"]) == (24, 0.0)

    def test_metrics_carry_the_name_of_the_data(self, finished: tuple[Path, str], folder: Path):
        metrics, name = results(finished[0]), f"{folder / 'train.txt'} / {folder / 'valid.txt'}"
        assert metrics["dataset"] == name
        assert metrics["method"] == "grape"
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-5)
        assert metrics["eval_word_perplexity"] > metrics["eval_perplexity"]
        assert name in finished[1]
        assert name in (finished[0] / "README.md").read_text()

    def test_it_learned(self, finished: tuple[Path, str]):
        assert results(finished[0])["eval_loss"] < math.log(300) - 0.2

    def test_alignment_is_there_as_data_and_as_a_picture(self, finished: tuple[Path, str]):
        history = json.loads((finished[0] / "alignment.json").read_text())
        assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10, 12]
        assert all(-1 <= entry["grape/alignment/estimate/h_2"] <= 1 for entry in history)
        assert any("grape/alignment/exact/mean" in entry for entry in history)
        assert history[-1]["grape/calibration/steps"] == 3
        for picture in ("alignment.png", "curves.png"):
            assert (finished[0] / picture).read_bytes().startswith(b"\x89PNG")

    def test_a_sample_is_printed_and_saved(self, finished: tuple[Path, str]):
        sample = (finished[0] / "sample.txt").read_text()
        assert sample.startswith("line 0")
        assert "***** sample *****\nline 0" in finished[1]

    def test_the_model_opens_without_grape_hf(self, finished: tuple[Path, str], folder: Path):
        """In a process where grape_hf cannot be imported; it gives the validation loss that training reported."""
        script = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "grape_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
try:
    import grape_hf
    sys.exit("grape_hf is not hidden")
except ModuleNotFoundError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer(open(sys.argv[2]).read(), return_tensors="pt")["input_ids"][0]
blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
with torch.no_grad():
    print(model(blocks, labels=blocks).loss.item())
"""
        command = [sys.executable, "-c", script, finished[0], folder / "valid.txt"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
        assert found.returncode == 0, found.stderr
        assert float(found.stdout) == pytest.approx(results(finished[0])["eval_loss"], rel=1e-4)


def test_fine_tuning_on_a_stream_with_a_json_file(recipe: ModuleType, folder: Path):
    model = folder / "pretrained"
    tokenizer = train_tokenizer(LINES, vocab_size=290)
    tokenizer.save_pretrained(model)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=290, n_positions=16)).save_pretrained(model)
    Dataset.from_dict({"body": LINES}).to_parquet(str(folder / "train.parquet"))
    options = options_file(
        folder,
        "options.json",
        model_name_or_path=str(model),
        train_file=str(folder / "train.parquet"),
        text_column="body",
        streaming=True,
        validation_rows=50,
        method="dfa",
        output_dir=str(folder / "tuned"),
    )
    recipe.main([str(options)])
    config = json.loads((folder / "tuned" / "config.json").read_text())
    assert (config["n_embd"], config["n_layer"], config["vocab_size"]) == (8, 2, 290)
    assert results(folder / "tuned")["method"] == "dfa"


def test_fine_tuning_adapters(recipe: ModuleType, folder: Path):
    """The folder holds an adapter, which peft puts on the base, and a card that names both."""
    base, run = folder / "base", folder / "adapter"
    train_tokenizer(LINES, vocab_size=290).save_pretrained(base)
    GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=290, n_positions=16)).save_pretrained(base)
    options = options_file(folder, "adapter.yaml", train_file=str(folder / "train.txt"), output_dir=str(run))
    lora = "--use_peft --lora_r 4 --lora_alpha 8 --lora_dropout 0 --lora_target_modules c_attn c_fc"
    more = f"--model_name_or_path {base} --max_steps 8 --learning_rate 0.02 {lora}"
    recipe.main([str(options), *more.split()])
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0)
    assert sorted(config["target_modules"]) == ["c_attn", "c_fc"]
    assert not (run / "model.safetensors").exists()
    plain = GPT2LMHeadModel.from_pretrained(base)
    adapted = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), run)
    assert len([name for name, p in adapted.named_parameters() if "lora_B" in name and p.any()]) == 6, "all learned"
    # As the recipe packs: the last 5 % of the rows are validation; the figure is that of base and adapter together.
    ids = AutoTokenizer.from_pretrained(run)("".join(LINES[380:]), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        losses = [model(blocks, labels=blocks).loss.item() for model in (plain, adapted)]
    assert losses[1] == pytest.approx(results(run)["eval_loss"], rel=1e-4)
    assert losses[1] < losses[0]
    card = (run / "README.md").read_text()
    assert "is a LoRA adapter of rank 4 on `base`, trained on" in card
    assert "an ordinary adapter for a `GPT2LMHeadModel`" in card
    assert "With transformers and peft;" in card
    assert str(base) not in card
    assert "library_name: peft" in card
    again = write_card(run, folder / "again.md").read_text()
    assert "is a LoRA adapter of rank 4 on `base`, trained on" in again


def test_without_the_hub_it_says_that_this_is_not_wikitext(
    recipe: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    options = options_file(folder, "hub.yaml", method="bp", tokenizer_vocab_size=400, validation_rows=20)
    run = folder / "no-hub"
    recipe.main([str(options), "--output_dir", str(run)])
    assert "This is NOT WikiText-103. The Hub is not in reach (ConnectError" in caplog.text
    assert results(run)["dataset"].startswith("embedded sample (pydoc_data.topics of Python")
    assert "embedded sample" in (run / "README.md").read_text()
    assert json.loads((run / "alignment.json").read_text()) == []
    assert not (run / "alignment.png").exists()


BAD = {
    "missing file": (["--train_file", "{}/none.txt"], "none.txt': expected a text or parquet file, found nothing"),
    "empty file": (["--train_file", "{}/empty.txt"], "empty.txt' is empty: expected text, got 0 bytes"),
    "short text": (["--train_file", "{}/short.txt", "--validation_file", "{}/short.txt"], "shorter than one context"),
    "named data set": (["--dataset_name", "no/such"], "data set 'no/such' cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_its_message(name: str, recipe: ModuleType, folder: Path):
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("too short\n")
    options = options_file(folder, "bad.yaml", output_dir=str(folder / "bad"))
    arguments, message = BAD[name]
    with pytest.raises((OSError, ValueError)) as refused:
        recipe.main([str(options), *(argument.format(folder) for argument in arguments)])
    assert message in str(refused.value)


class TestLoadModel:
    """In this process: the recipe's own function."""

    def load(self, recipe: ModuleType, **options: Any):
        arguments = recipe.ModelArguments(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **options)
        return recipe.load_model(arguments, train_tokenizer(LINES, vocab_size=300), context=16)

    def test_any_architecture(self, recipe: ModuleType):
        model = self.load(recipe, model_type="llama", config_overrides="num_key_value_heads=1,hidden_act=relu")
        config = model.config
        assert (config.model_type, config.hidden_size, config.intermediate_size) == ("llama", 16, 64)
        assert (config.num_key_value_heads, config.hidden_act, config.vocab_size) == (1, "relu", 300)

    def test_unknown_override(self, recipe: ModuleType):
        with pytest.raises(ValueError, match="GPT2Config has no n_head_; it has .*n_head"):
            self.load(recipe, config_overrides="n_head_=3")
        with pytest.raises(ValueError, match="expected name=value,name=value"):
            self.load(recipe, config_overrides="n_head")

    def test_a_loss_that_is_not_of_the_next_token(self, recipe: ModuleType):
        overrides = "decoder_layers=1,decoder_attention_heads=2,decoder_ffn_dim=16,decoder_start_token_id=0"
        with pytest.raises(ValueError, match="loss of BartForCausalLM is not that of the next token"):
            self.load(recipe, model_type="bart", config_overrides=overrides)

    def test_a_context_beyond_the_positions(self, recipe: ModuleType, tmp_path: Path):
        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300, n_positions=8)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"context=16: .* has 8 positions. Set --context 8"):
            self.load(recipe, model_name_or_path=str(tmp_path))

    def test_adapters_want_a_pretrained_model(self, recipe: ModuleType):
        with pytest.raises(ValueError, match="use_peft trains adapters on a pretrained model: name one by model_name"):
            self.load(recipe, use_peft=True)

    @pytest.mark.parametrize("name", ["wikitext103.yaml", "wikitext103_paper.yaml", "demo.yaml"])
    def test_every_option_of_our_files_exists(self, recipe: ModuleType, name: str):
        file, output = str(TOP / "recipes" / name), ["--output_dir", "unused", "--bf16", "false"]
        _, model_args, _ = recipe.parse_recipe(
            recipe.DataArguments, recipe.ModelArguments, recipe.GrapeTrainingArguments, argv=[file, *output]
        )
        model_args.num_hidden_layers, model_args.hidden_size = 2, 64
        recipe.load_model(model_args, train_tokenizer(LINES, vocab_size=300), context=16)

    def test_each_line_of_the_papers_settings_has_its_source(self):
        lines = (TOP / "recipes" / "wikitext103_paper.yaml").read_text().splitlines()
        settings = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        assert [line for line in settings if "# " not in line] == ["config_overrides:"]
