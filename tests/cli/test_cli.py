"""The command ``grape-hf`` as a user types it: what each subcommand leaves behind, and what it says to mistakes."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from problems import transformer
from transformers.utils.logging import get_verbosity as verbosity

from grape_hf.cli import EXAMPLES, main, make_parser, recipes
from grape_hf.recipes.compare import Run, make_table
from grape_hf.reports.cards import write_card
from grape_hf.reports.plots import read_history

TOP = Path(__file__).parents[2]
TEXT: dict[str, Any] = {
    "dataset_name": "embedded-sample",
    "context": 16,
    "validation_rows": 10,
    "tokenizer_vocab_size": 300,
    "tokenizer_rows": 200,
    "preprocessing_workers": 1,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "learning_rate": 0.01,
    "logging_steps": 2,
    "calibration_strategy": "steps",
    "calibration_interval": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "text.yaml"
    path.write_text(yaml.safe_dump(TEXT))
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """A run by ``grape-hf train``, whose recipe is told from the file, with an option over it."""
    folder = config.parent / "grape"
    assert main(["train", str(config), "--output_dir", str(folder), "--max_steps", "10", "--seed", "3"]) == 0
    return folder


@pytest.fixture(scope="module")
def comparison(config: Path) -> tuple[Path, str]:
    """A comparison in processes, as a user starts it."""
    output = config.parent / "compared"
    command = [sys.executable, "-m", "grape_hf.cli", "compare", config, "--methods", "bp", "grape"]
    command += ["--learning_rates", "grape=0.02", "--output", output]
    environment = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=config.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


class TestHelp:
    def test_every_command_has_examples_and_all_of_them_parse(self):
        parser, seen = make_parser(), set()
        for name, text in EXAMPLES.items():
            lines = [line for line in text.splitlines() if line.startswith("  grape-hf")]
            assert len(lines) >= 2
            for line in lines:
                words = shlex.split(line.strip().split("   ")[0])[1:]
                options, rest = parser.parse_known_args(words)
                assert options.command == name
                assert not rest or name == "train"
                seen.add(name)
        assert seen == {"inspect", "train", "compare", "plot", "card"}

    def test_the_examples_name_files_that_are_there(self):
        assert {"demo.yaml", "image_classification/digits.yaml", "wikitext103.yaml"} <= set(recipes.shipped_configs())

    @pytest.mark.parametrize("command", EXAMPLES)
    def test_it_is_shown(self, command: str, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert EXAMPLES[command].strip() in shown
        assert ("--jvp_steps" in shown) == (command == "inspect")

    def test_the_wheel_installs_the_command_and_the_recipes_it_needs(self):
        project = tomllib.loads((TOP / "pyproject.toml").read_text())
        module, _, function = project["project"]["scripts"]["grape-hf"].partition(":")
        assert getattr(importlib.import_module(module), function) is main
        carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
        assert all(target == f"grape_hf/{source}" for source, target in carried.items())
        assert not [source for source in carried if source.endswith(".py")]
        for name in recipes.shipped_configs():
            assert {f"recipes/{name}", f"recipes/{Path(name).parent}"} & carried.keys()


class TestInspect:
    def test_a_folder_with_a_configuration_is_enough(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        transformer("gpt2").config.save_pretrained(tmp_path)
        before = os.environ.copy(), verbosity()
        assert main(["inspect", str(tmp_path), "--batch_size", "4", "--jvp_steps", "2", "--feedback_rule", "lms"]) == 0
        assert (os.environ, verbosity()) == before  # a recipe in this process says what it has to say
        shown = capsys.readouterr().out
        assert "3 blocks, 2 feedback points" in shown
        assert "transformer.h.1  GPT2Block  4 x 8 x 16  16 x 16" in shown
        assert "dual numbers: the blocks hold no convolution" in shown
        assert "every 2 steps, on 1 of 4 samples" in shown

    @pytest.mark.parametrize(("limit", "refused"), [("1e-6", True), ("1", False)])
    def test_matrices_above_the_limit_are_shown_and_what_follows_is_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, refused: bool
    ):
        transformer("gpt2").config.save_pretrained(tmp_path)
        assert main(["inspect", str(tmp_path), "--feedback_size_limit", limit]) == 0
        shown = capsys.readouterr().out
        assert f"B_l and the maps together: 4.0 KiB (feedback_size_limit={float(limit):g} GiB)" in shown
        assert ("training is refused" in shown) is refused

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (
                "timm:resnet10t --image_size 32 --overrides num_classes=10 --feedback_rule lms",
                "finite differences: the blocks hold conv",
            ),
            (
                "timm:resnet10t --image_size 32 --overrides num_classes=10",
                'Settings: grape_preset="resnet", as there are convolutions and shortcut connections in the blocks.',
            ),
            (
                "timm:resnet10t --image_size 32 --overrides num_classes=10",
                "  the error takes the shortcut connections of the blocks, and B_l adds to it\n"
                "  the errors of all blocks are corrected once before they are used\n",
            ),
            ("timm:cifar_cnn --overrides num_classes=10", "Batch: 8 images of 3 x 32 x 32"),
            ("timm:mnist_cnn", 'Settings: grape_preset="convnet", as there are convolutions in the blocks.'),
            ("timm:mnist_cnn --grape_preset paper", 'Settings: grape_preset="paper", as asked for.'),
            ("type:bert --overrides num_hidden_layers=3,hidden_size=48", "BertForMaskedLM"),
            ("type:vit --overrides num_hidden_layers=2 --method dfa --image_size 32", "2 blocks, 1 feedback points"),
            ("type:gpt2 --overrides n_layer=20,n_embd=24", "  ...\n"),
        ],
    )
    def test_names(self, words: str, expected: str, capsys: pytest.CaptureFixture[str]):
        if "vit" in words:
            words = words.replace("--image_size 32", "").replace("=2", "=2,image_size=32,hidden_size=48")
        assert main(["inspect", *words.split()]) == 0
        assert expected in capsys.readouterr().out


class TestTrain:
    def test_it_is_the_recipe_with_the_options_given(self, run: Path):
        state = json.loads((run / "trainer_state.json").read_text())
        assert state["global_step"] == 10
        results = json.loads((run / "all_results.json").read_text())
        assert results["method"] == "grape"
        assert "eval_perplexity" in results
        assert all((run / name).is_file() for name in ("model.safetensors", "README.md", "sample.txt"))

    def test_pictures_are_kept_current(self, run: Path):
        for picture in ("curves.png", "alignment.png"):
            assert (run / picture).read_bytes().startswith(b"\x89PNG")

    def test_the_recipe_of_every_file_that_comes_with_it_is_told_from_its_options(self):
        for name in recipes.shipped_configs():
            images = name.startswith("image_classification")
            assert recipes.recipe_of(recipes.configs_folder() / name) == ("images" if images else "text"), name

    def test_a_users_file_goes_before_one_that_comes_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        assert recipes.find_config("demo.yaml") == recipes.configs_folder() / "demo.yaml"
        (tmp_path / "demo.yaml").write_text("context: 8")
        assert recipes.find_config("demo.yaml") == Path("demo.yaml")


class TestCompare:
    def test_the_report_has_the_figures_of_the_runs(self, comparison: tuple[Path, str]):
        output, shown = comparison
        report = (output / "report.md").read_text()
        rows = {cells[1].strip(): cells for line in report.splitlines() if len(cells := line.split("|")) > 3}
        header = [cell.strip() for cell in rows["method"]]
        assert {"bp", "grape"} <= rows.keys()
        for method, rate in (("bp", "0.01"), ("grape", "0.02")):
            results = json.loads((output / method / "all_results.json").read_text())
            assert rows[method][2].strip() == rate
            column = header.index("validation perplexity")
            assert rows[method][column].strip() == f"{results['eval_perplexity']:.4g}"
        assert rows["grape"][header.index("share of BP steps")].strip() == "0.25"
        assert "| grape | 0.02 |" in shown
        for picture in ("curves.png", "alignment.png"):
            assert f"]({picture})" in report
            assert (output / picture).is_file()

    def test_budgets_and_beginnings_are_the_same(self, comparison: tuple[Path, str]):
        histories = {method: read_history(comparison[0] / method) for method in ("bp", "grape")}
        steps = [[entry["step"] for entry in history if "loss" in entry] for history in histories.values()]
        assert steps[0] == steps[1] == [2, 4, 6, 8]
        options = [yaml.safe_load((comparison[0] / m / "options.yaml").read_text()) for m in ("bp", "grape")]
        differing = {name for name in options[0] if options[0][name] != options[1][name]}
        assert differing == {"method", "learning_rate", "output_dir"}

    def test_the_card_has_backpropagation_beside_it(self, comparison: tuple[Path, str]):
        bp = json.loads((comparison[0] / "bp" / "all_results.json").read_text())
        card = (comparison[0] / "grape" / "README.md").read_text()
        assert f"{bp['eval_perplexity']:,.6g}" in card
        assert "stock Trainer" in card

    def test_runs_that_are_done_are_kept_and_other_options_refused(
        self, config: Path, comparison: tuple[Path, str], capsys: pytest.CaptureFixture[str]
    ):
        words = ["compare", str(config), "--methods", "bp", "grape", "--output", str(comparison[0])]
        before = (comparison[0] / "grape" / "model.safetensors").stat().st_mtime_ns
        assert main([*words, "--learning_rates", "grape=0.02"]) == 0
        assert (comparison[0] / "grape" / "model.safetensors").stat().st_mtime_ns == before
        assert main([*words, "--learning_rates", "grape=0.03"]) == 2
        assert "was run with other options" in capsys.readouterr().err

    def test_several_seeds_are_a_mean_and_a_range(self):
        runs = [Run("bp", seed, Path(f"bp-seed{seed}"), {}) for seed in (0, 1)]
        results = {
            run.folder: {
                "options": {"learning_rate": "1e-3"},
                "results": {"eval_loss": 2.0 + run.seed, "train_steps_per_second": 4.0},
                "logged": {},
            }
            for run in runs
        }
        assert make_table(runs, results).splitlines()[-1] == "| bp | 0.001 | 2.5 (2 to 3) | 0.25 |"

    def test_a_fixed_identity_is_compared_and_named_so(self, config: Path, tmp_path: Path):
        words = ["compare", str(config), "--methods", "dfa_identity", "--output", str(tmp_path)]
        assert main(words) == 0
        options = yaml.safe_load((tmp_path / "dfa_identity" / "options.yaml").read_text())
        assert (options["method"], options["feedback_init"]) == ("dfa", "identity")
        assert "| DFA, fixed identity | " in (tmp_path / "report.md").read_text()
        assert Run("dfa", 0, tmp_path, {"method": "dfa"}).label == "DFA, fixed random"


class TestPlotAndCard:
    def test_one_run_is_drawn_into_its_folder(self, run: Path, capsys: pytest.CaptureFixture[str]):
        pictures = {name: (run / name).read_bytes() for name in ("curves.png", "alignment.png")}
        for name in pictures:
            (run / name).unlink()
        assert main(["plot", str(run)]) == 0
        assert capsys.readouterr().out.split() == [str(run / name) for name in pictures]
        for name, before in pictures.items():  # as during training
            assert (run / name).read_bytes() == before

    def test_several_are_drawn_together(self, run: Path, comparison: tuple[Path, str], tmp_path: Path):
        picture = tmp_path / "both.png"
        assert main(["plot", str(run), str(comparison[0] / "grape"), "--output", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_card(self, run: Path, comparison: tuple[Path, str], tmp_path: Path):
        bp = comparison[0] / "bp"
        assert main(["card", str(run), "--bp", str(bp), "--output", str(tmp_path / "a.md")]) == 0
        write_card(run, tmp_path / "b.md", bp)
        assert (tmp_path / "a.md").read_text() == (tmp_path / "b.md").read_text().replace("b_", "a_")


WRONG = {
    "inspect type:gpt3": "knows no model type 'gpt3'; is ",
    "inspect timm:resnet81": "knows no architecture 'resnet81'",
    "inspect {tmp}": "expected a folder with a config.json",
    "inspect type:gpt2 --sequence_length 5000": "type:gpt2 has 1024 positions",
    "inspect type:gpt2 --method bp": "method='bp' has no feedback points",
    "inspect type:gpt2 --blocks nothing": "blocks='nothing' does not exist in GPT2LMHeadModel",
    "inspect type:gpt2 --overrides n_layers=2": "GPT2Config has no n_layers; is n_layer meant?",
    "inspect type:gpt2 --jvp_steps 0": "jvp_steps=0: expected a whole number, at least 1",
    "inspect type:gpt2 --batch_size 0": "expected a whole number, at least 1, got '0'",
    "inspect type:gpt2 --nonsense": "inspect knows no --nonsense",
    "inspect": "the following arguments are required: model",
    "train nothing.yaml": "nothing.yaml: expected a file of options, or one of those that come with grape_hf: demo",
    "train {tmp}/vague.yaml": "Name one: --recipe text or images",
    "train {tmp}/list.yaml": "expected `option: value` pairs, got list",
    "train {tmp}/broken.yaml": "broken.yaml: expected YAML or JSON, and it cannot be read",
    "compare {tmp}/broken.yaml": "broken.yaml: expected YAML or JSON, and it cannot be read",
    "plot {tmp}/cut": "cut/trainer_state.json cannot be read, it may be cut off",
    "train demo.yaml --learning_ratte 1": "there is no option --learning_ratte; is --learning_rate meant?",
    "train demo.yaml --recip text": "there is no option --recip",
    "compare demo.yaml --learning_rates grape": "expected METHOD=RATE",
    "compare demo.yaml --learning_rates fa=1": "a learning rate for fa, which does not run",
    "plot {tmp}": "expected the trainer_state.json",
    "plot {tmp} {tmp}": "named twice",
    "card {tmp}": "found no trainer_state.json",
    "teach": "invalid choice: 'teach'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_told_in_one_line(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "vague.yaml").write_text("learning_rate: 1.0")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "trainer_state.json").write_text("{")
    try:
        status = main(words.format(tmp=tmp_path).split())
    except SystemExit as stopped:
        status = stopped.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert status == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("grape-hf")
    assert WRONG[words] in shown.err


def test_traceback_on_demand(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        main(["--traceback", "plot", str(tmp_path)])
