"""Model cards: figures against those of the run, metadata read back by huggingface_hub, the stock card as the oracle.

Every card here is of a real run of a few steps. That the words read well is not tested.
"""

import dataclasses
import json
import re
import socket
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from helpers import LEARNED, OnEvent, arguments, make_trainer
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from problems import DROPOUT, GPT2, PLAIN, Problem
from transformers import Trainer

from grape_hf import GrapeArgumentsMixin, GrapeTrainer
from grape_hf.cli import main
from grape_hf.metrics import perplexity_from_logits, token_nll
from grape_hf.reports.card_texts import METHOD_TEXTS
from grape_hf.reports.cards import MARKER, render_card, template_path, write_card
from grape_hf.reports.figures import final_results
from grape_hf.reports.markdown import code
from grape_hf.reports.run_records import read_record
from grape_hf.vision import image_classifier

TOP = Path(__file__).parents[2]
METHODS = set(get_args(get_type_hints(GrapeArgumentsMixin)["method"]))
RUN = LEARNED | {"max_steps": 4, "calibration_strategy": "steps", "calibration_interval": 2, "save_strategy": "steps"}


def prepare(folder: Path, kind: type[Trainer] = GrapeTrainer, problem: Problem = GPT2, **options: Any) -> Any:
    more = dict(
        eval_dataset=problem.samples(8),
        preprocess_logits_for_metrics=token_nll,
        compute_metrics=perplexity_from_logits(words_per_token=0.5),
    )
    return make_trainer(problem, folder, kind, samples=16, more=more, **(RUN | {"save_steps": 2} | options))


def finish(folder: Path, kind: type[Trainer] = GrapeTrainer, resume: str | None = None, **options: Any) -> Any:
    """Train, evaluate and save as the recipes do."""
    trainer = prepare(folder, kind, **options)
    trainer.save_metrics("train", trainer.train(resume_from_checkpoint=resume).metrics)
    trainer.save_metrics("eval", {"dataset": "Novels of 1900"} | trainer.evaluate())
    trainer.save_state()
    trainer.save_model()
    return trainer


def results(readme: Path) -> tuple[str, list[EvalResult]]:
    return model_index_to_eval_results(metadata_load(readme)["model-index"])


def section(text: str, heading: str) -> str:
    return re.split(r"\n#+ ", text.split(f"\n{heading}\n")[1])[0].strip()


def table(text: str, heading: str) -> list[list[str]]:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section(text, heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finish(
        tmp_path_factory.mktemp("cards") / "novelist", hub_token="hf_secret", jvp_fraction=0.5, weight_decay=0.1
    )


@pytest.fixture
def readme(run: Any) -> Path:
    """The card of the run, as if no other had been made of it."""
    path = Path(run.args.output_dir) / "README.md"
    path.unlink(missing_ok=True)
    run._card_arguments.clear()
    run.create_model_card(dataset="Novels of 1900", dataset_tags="someone/novels", language="en", tags="books")
    return path


class TestMetadata:
    def test_figures_are_those_of_the_run(self, run: Any, readme: Path):
        name, found = results(readme)
        logged = run.state.log_history[-1]
        assert name == "novelist"
        assert [(r.metric_type, r.metric_name, r.metric_value) for r in found] == [
            ("perplexity", "Perplexity", logged["eval_perplexity"]),
            ("perplexity", "Word perplexity", logged["eval_word_perplexity"]),
        ]
        for result in found:
            assert (result.dataset_name, result.dataset_type) == ("Novels of 1900", "someone/novels")
            assert (result.task_type, result.task_name) == ("text-generation", "Causal Language Modeling")

    def test_tags_and_what_was_said(self, readme: Path):
        data = metadata_load(readme)
        assert data["tags"] == ["books", "generated_from_trainer", "grape", "direct-feedback-alignment"]
        assert (data["language"], data["datasets"], data["metrics"]) == (["en"], ["someone/novels"], ["perplexity"])
        assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
        assert "license" not in data

    def test_it_is_written_as_huggingface_hub_reads_it(self, readme: Path):
        card = ModelCard.load(readme)
        assert card.content == readme.read_text()
        assert not [line for line in readme.read_text().splitlines() if "{{" in line or "{%" in line]

    def test_a_figure_that_is_not_finite_stays_out(self, run: Any):
        record = dataclasses.replace(
            read_record(run.args.output_dir), results={"eval_perplexity": float("inf"), "eval_loss": 800.0}
        )
        card = render_card(record)
        assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 800.0)]
        assert table(card.text, "## Results")[1:] == [["Loss", "800"], ["Perplexity", "inf"]]


class TestBody:
    def test_results_and_the_stock_figures_beside_them(self, run: Any, readme: Path):
        logged = run.state.log_history[-1]
        run.create_model_card(bp_results={"eval_perplexity": 12.5, "accuracy": 0.25, "eval_runtime": 3.0})
        rows = dict((row[0], row[1:]) for row in table(readme.read_text(), "## Results"))
        assert rows["Perplexity"] == [f"{logged['eval_perplexity']:.6g}", "12.5"]
        assert rows["Loss"] == [f"{logged['eval_loss']:.6g}", ""]
        assert rows["Accuracy"] == ["", "0.25"]
        assert "Runtime" not in rows

    def test_share_of_backpropagation(self, run: Any, readme: Path):
        assert run.state.log_history[-3]["grape/calibration/steps"] == 2
        assert "2 of 4 optimiser steps, 50 %." in readme.read_text()

    def test_alignment_is_the_last_that_was_logged(self, run: Any, readme: Path):
        def last(kind: str, i: int) -> float:
            name = f"grape/alignment/{kind}/h_{i}"
            return next(entry[name] for entry in reversed(run.state.log_history) if name in entry)

        rows = table(readme.read_text(), "### Alignment at the end")
        assert rows[0] == ["boundary", "output of", "cos(B, Ĵ)", "cos(B e, δ)"]
        assert rows[1:] == [
            [f"h_{i}", f"`transformer.h.{i - 1}`", f"{last('estimate', i):.3f}", f"{last('exact', i):.3f}"]
            for i in (1, 2)
        ]

    def test_options_that_were_changed_and_no_others(self, readme: Path):
        rows = table(readme.read_text(), "### GrAPE")
        assert {row[0]: (row[1], row[2]) for row in rows[1:]} == {
            "`feedback_lr`": ("`0.1`", "`0.02`"),
            "`feedback_rule`": ("`lms`", "`local`"),  # as jvp_fraction asks for an estimate
            "`jvp_fraction`": ("`0.5`", "`0.25`"),
            "`calibration_strategy`": ("`steps`", "`no`"),
            "`calibration_interval`": ("`2.0`", "`1.0`"),
        }

    def test_options_of_the_trainer_that_its_own_card_leaves_out(self, readme: Path):
        lines = section(readme.read_text(), "### Training hyperparameters").splitlines()
        assert lines[-2:] == ["- training_steps: 4", "- weight_decay: 0.1"]

    def test_the_python_in_it_opens_the_model(self, run: Any, readme: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(readme.parent.parent)
        names: dict[str, Any] = {}
        exec(re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[1], names)  # type: ignore[index]
        tokens = GPT2.samples(1)[0]["input_ids"][None]
        with torch.no_grad():
            assert torch.equal(names["model"](tokens).logits, run.model.eval()(tokens).logits)

    def test_no_secret_and_no_path(self, run: Any, readme: Path):
        assert run.args.hub_token == "hf_secret"
        assert "hf_secret" not in readme.read_text()
        assert str(readme.parent.parent) not in readme.read_text()

    def test_pictures_that_are_there(self, run: Any, readme: Path):
        picture = readme.parent / "alignment.png"
        assert "alignment.png" not in readme.read_text()
        picture.touch()
        run.create_model_card()
        picture.unlink()
        assert "](alignment.png)" in readme.read_text()
        assert "loss.png" not in readme.read_text()


class TestTheStockCard:
    def test_what_it_says_is_kept(self, run: Any, readme: Path):
        said = dict(language="de", license="mit", model_name="reader", finetuned_from="gpt2", dataset_tags="a/b")
        Trainer.create_model_card(run, **said)
        theirs, text = metadata_load(readme), readme.read_text()
        run.create_model_card(**said)
        ours = metadata_load(readme)
        assert {"language", "license", "base_model", "datasets"} < theirs.keys()
        for name in theirs.keys() - {"tags", "model-index"}:
            assert ours[name] == theirs[name], name
        assert set(theirs["tags"]) < set(ours["tags"])
        for heading in ("### Training hyperparameters", "### Framework versions"):
            assert section(text, heading) in section(readme.read_text(), heading)
        assert "`gpt2`" in readme.read_text()

    def test_with_bp_it_is_the_card(self, tmp_path: Path):
        ours = finish(tmp_path / "ours" / "model", method="bp")
        ours.create_model_card("en", "mit", dataset="Novels", bp_results={"eval_loss": 1.0})
        stock = finish(tmp_path / "stock" / "model", Trainer)
        stock.create_model_card("en", "mit", dataset="Novels")
        assert (tmp_path / "ours/model/README.md").read_bytes() == (tmp_path / "stock/model/README.md").read_bytes()
        written = write_card(tmp_path / "ours" / "model", tmp_path / "again.md").read_text()
        assert section(written, "### Training hyperparameters") in (tmp_path / "ours/model/README.md").read_text()
        assert MARKER not in written

    def test_of_another_trainer_stays_before_ours(self, tmp_path: Path):
        """As trl's: other arguments, no model-index, a text of its own."""

        class Other(Trainer):
            def create_model_card(self, model_name=None, dataset_name=None, tags=None):
                text = "---\ntags: [other]\nmodel_name: mine\n---\n# Mine\n\n## Quick start\n\nNow.\n"
                (Path(self.args.output_dir) / "README.md").write_text(text)

        class Ours(GrapeTrainer, Other):  # Other comes between the mixin and the stock Trainer
            pass

        trainer = finish(tmp_path, Ours)
        for _ in range(2):
            trainer.create_model_card(dataset_name="Novels")
            text = (tmp_path / "README.md").read_text()
            assert text.index("## Quick start") < text.index(MARKER) < text.index("### Training hyperparameters")
            assert text.count(MARKER) == text.count("# Mine") == 1
            assert "`Novels`" in text
            assert metadata_load(tmp_path / "README.md")["tags"] == ["other", "grape", "direct-feedback-alignment"]
        assert write_card(tmp_path).read_text().count(MARKER) == 1


class TestWhenItIsWritten:
    def test_at_each_checkpoint_that_is_pushed_with_what_was_said_before(self, tmp_path: Path):
        cards: list[str] = []
        read = OnEvent("save", lambda state, **_: cards.append((tmp_path / "README.md").read_text()))
        trainer = prepare(tmp_path, max_steps=2, save_steps=1, calibration_interval=1, hub_strategy="end")
        trainer.add_callback(read)
        trainer.args.push_to_hub = True  # to a strategy that uploads nothing before the end
        trainer.create_model_card(dataset="Novels of 1900", license="mit")
        trainer.train()
        assert len(cards) == 2
        for step, card in enumerate(cards, 1):
            assert f"{step} of {step} optimiser steps" in card
            assert "The model has not been evaluated." in card
            assert "`Novels of 1900`" in card
            assert "license: mit" in card

    def test_a_model_without_a_configuration_is_saved_without_one(self, tmp_path: Path):
        trainer = make_trainer(PLAIN, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, hub_strategy="end")
        trainer.args.push_to_hub = True
        trainer.train()
        assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()
        assert not (tmp_path / "README.md").exists()

    def test_before_training_it_is_the_stock_card(self, tmp_path: Path):
        trainer = prepare(tmp_path)  # as a script that only evaluates has it
        (tmp_path / "all_results.json").write_text('{"eval_loss": 1.0}')  # of an earlier run
        trainer.create_model_card(tasks="text-generation")
        written = (tmp_path / "README.md").read_bytes()
        Trainer.create_model_card(trainer, tasks="text-generation")
        assert (tmp_path / "README.md").read_bytes() == written

    def test_what_was_measured_since_the_last_log_counts(self, tmp_path: Path):
        trainer = prepare(tmp_path, max_steps=3, logging_steps=100)
        trainer.train()
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert not any("grape/alignment/estimate/h_1" in entry for entry in trainer.state.log_history)
        assert len(table(text, "### Alignment at the end")) == 3
        assert "1 of 3 optimiser steps, 33.3 %." in text

    def test_of_a_resumed_run_as_of_the_uninterrupted_one(self, tmp_path: Path):
        for name in ("straight", "resumed"):
            resume = {"resumed": str(tmp_path / "straight" / "model" / "checkpoint-2")}.get(name)
            finish(tmp_path / name / "model", resume=resume, problem=DROPOUT).create_model_card(dataset="Novels")
        cards = [(tmp_path / name / "model" / "README.md").read_text() for name in ("straight", "resumed")]
        assert cards[0] == cards[1]
        assert "2 of 4 optimiser steps" in cards[0]

    def test_the_hub_is_asked_no_more_often_than_by_the_stock_card(
        self, run: Any, readme: Path, monkeypatch: pytest.MonkeyPatch
    ):
        asked: list[str] = []

        def refuse(host: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(host)
            raise socket.gaierror("no network here")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        Trainer.create_model_card(run, finetuned_from="gpt2")
        asked.clear()  # the first of all may ask more
        Trainer.create_model_card(run, finetuned_from="gpt2")
        stock = len(asked)
        assert stock > 0
        run.create_model_card(finetuned_from="gpt2")
        assert len(asked) == 2 * stock
        write_card(run.args.output_dir)
        assert len(asked) == 2 * stock


class TestFromAFolder:
    def test_it_is_the_card_that_the_trainer_wrote(self, run: Any, readme: Path, tmp_path: Path):
        run.create_model_card()
        written = write_card(readme.parent, tmp_path / "card.md")
        assert written.read_text() == readme.read_text()
        assert write_card(readme.parent).read_text() == written.read_text()

    def test_without_a_card_in_it(self, run: Any, readme: Path, tmp_path: Path):
        moved = tmp_path / "novelist"
        moved.mkdir()
        for file in readme.parent.iterdir():
            if file.is_file() and file.name != "README.md":
                (moved / file.name).write_bytes(file.read_bytes())
        card = ModelCard.load(write_card(moved))
        assert card.data.eval_results[0].dataset_name == "Novels of 1900"  # from all_results.json
        assert card.data.eval_results[0].metric_value == run.state.log_history[-1]["eval_perplexity"]
        assert card.data.get("license") is None
        assert section(card.text, "### Framework versions").startswith("- grape_hf ")
        # The folder does not hold the names of the blocks.
        assert table(card.text, "### Alignment at the end")[0] == ["boundary", "cos(B, Ĵ)", "cos(B e, δ)"]

    def test_the_command(self, readme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        (readme.parent / "loss.png").write_bytes(b"a picture")
        (tmp_path / "all_results.json").write_text(json.dumps({"eval_perplexity": 7.25, "train_loss": 1.0}))
        assert (
            main(
                ["card", str(readme.parent), "--output", str(tmp_path / "cards" / "novelist.md"), "--bp", str(tmp_path)]
            )
            == 0
        )
        (readme.parent / "loss.png").unlink()
        written = Path(capsys.readouterr().out.strip())
        assert written == tmp_path / "cards" / "novelist.md"
        assert "](novelist_loss.png)" in written.read_text()
        assert (written.parent / "novelist_loss.png").read_bytes() == b"a picture"
        assert {row[0]: row[2:] for row in table(written.read_text(), "## Results")}["Perplexity"] == ["7.25"]

    def test_figures_that_a_script_saved_later(self, run: Any, readme: Path):
        """As run_clm.py does: a perplexity that the Trainer never logged."""
        saved = readme.parent / "all_results.json"
        before = saved.read_text()
        try:
            saved.write_text(json.dumps(json.loads(before) | {"perplexity": 3.5}))
            run.create_model_card()
            assert ["Perplexity", "3.5"] in table(readme.read_text(), "## Results")
            saved.write_text(json.dumps({"eval_loss": 1.0, "perplexity": 3.5}))  # of another evaluation
            run.create_model_card()
            assert ["Perplexity", "3.5"] not in table(readme.read_text(), "## Results")
        finally:
            saved.write_text(before)

    def test_what_cannot_be_one_is_refused(self, run: Any, readme: Path, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"found no trainer_state\.json, no training_args\.bin"):
            write_card(tmp_path)
        with pytest.raises(FileNotFoundError, match="found neither all_results.json nor"):
            write_card(readme.parent, tmp_path / "card.md", bp_results=tmp_path)
        finish(tmp_path, Trainer)
        with pytest.raises(ValueError, match="expected a run of GrapeTrainer, found TrainingArguments without"):
            write_card(tmp_path)


ODD = [
    "it's",
    '"quoted"',
    "a/b/c",
    "名前 ñ 🦜",
    "two\nlines\n---\n# heading",
    "`code` ``",
    "a|b",
    "{{ 1/0 }}",
    "- x: y",
    "#",
]


class TestOddNames:
    @pytest.mark.parametrize("name", ODD)
    def test_through_the_trainer(self, run: Any, readme: Path, name: str):
        run.create_model_card(dataset=name, dataset_tags=name)
        _, found = results(readme)
        assert {result.dataset_name for result in found} == {name}
        assert {result.dataset_type for result in found} == {"unknown"}
        assert "datasets" not in metadata_load(readme)

    @example("\x85")  # the one that PyYAML does not bring back by itself
    @example("a\x85\r\nb…")
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
    def test_any_text(self, run: Any, readme: Path, tmp_path: Path, name: str):
        record = read_record(run.args.output_dir)
        plain = render_card(record).text
        record.summary.dataset = name
        card = render_card(record)
        card.save(tmp_path / "README.md")
        assert {result.dataset_name for result in results(tmp_path / "README.md")[1]} == {name}
        # The name stays within its line.
        assert len(card.text.splitlines()) == len(plain.splitlines()) or set(name) & set("\x1c\x1d\x1e\x85\u2028\u2029")
        assert code(name) in card.text


def test_final_results_by_hand():
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 1.0, "eval_runtime": 9.0, "epoch": 1.0},
        {"step": 4, "eval_loss": 2.0, "eval_runtime": 9.0, "epoch": 2.0},
        {"step": 4, "train_loss": 2.5, "train_runtime": 9.0, "total_flos": 9.0},
    ]
    assert final_results(history) == ({"eval_loss": 2.0}, 4)
    assert final_results(history, best=2) == ({"eval_loss": 1.0}, 2)
    tested = {"step": 4, "test_accuracy": 0.5, "test_samples_per_second": 9.0, "test_runtime": 9.0}
    assert final_results([*history, tested]) == ({"eval_loss": 2.0, "test_accuracy": 0.5}, 4)
    assert final_results([*history, tested], best=2) == ({"eval_loss": 2.0, "test_accuracy": 0.5}, 4)
    assert final_results(history[:1]) == ({}, None)


def test_every_method_has_its_words():
    assert METHOD_TEXTS.keys() == METHODS - {"bp"}
    for method, text in METHOD_TEXTS.items():
        assert 1 <= len(re.findall(r"\.(?=\s|$)", text.about)) <= 3, method


@pytest.mark.parametrize("method", sorted(METHODS - {"bp", "grape", "pepita"}))
def test_other_methods_do_not_claim_to_be_grape(method: str, tmp_path: Path):
    options = {"calibration_strategy": None, "calibration_interval": None, "jvp_steps": None, "jvp_fraction": None}
    trainer = prepare(tmp_path, method=method, max_steps=2, feedback_lr=None, **options)
    trainer.train()
    trainer.create_model_card()
    tags = metadata_load(tmp_path / "README.md")["tags"]
    assert set(METHOD_TEXTS[method].tags) < set(tags)
    assert "grape" not in tags
    text = (tmp_path / "README.md").read_text()
    assert ("none of 2 optimiser steps" in text) != ("No step was ordinary backpropagation" in text)
    assert "no option differs" in text


def test_the_template_is_where_the_wheel_puts_it():
    """``template_path`` looks in the package first; the wheel must carry it there."""
    config = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    source = template_path().relative_to(TOP)
    assert config["packages"] == ["grape_hf"]
    assert config["force-include"][str(source)] == f"grape_hf/{source}"


def test_the_cards_in_the_repository_are_cards():
    cards = sorted(path for path in (TOP / "model_cards").glob("*.md") if path.name not in ("README.md", "template.md"))
    index = (TOP / "model_cards" / "README.md").read_text()
    assert cards
    for path in cards:
        assert f"({path.name})" in index
        assert MARKER in path.read_text()
        assert results(path)[1]
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text()):
            assert (path.parent / picture).is_file()


def test_a_network_of_ours_says_what_must_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = image_classifier("mnist_cnn", ["even", "odd"])
    images = [{"pixel_values": torch.rand(1, 28, 28), "labels": torch.tensor(i % 2)} for i in range(8)]
    trainer = GrapeTrainer(model=model, args=arguments(tmp_path / "digits", max_steps=2), train_dataset=images)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    monkeypatch.chdir(tmp_path)
    python = re.search(r"```python\n(.*?)```", (tmp_path / "digits" / "README.md").read_text(), re.DOTALL)
    assert python is not None
    assert python[1].startswith("import grape_hf.vision\n")
    names: dict[str, Any] = {}
    exec(python[1], names)
    pixels = images[0]["pixel_values"][None]
    with torch.no_grad():
        assert torch.equal(names["model"](pixels).logits, model.eval()(pixels).logits)
    assert "image_processor" in names


def test_settings_that_auto_chose_from_memory_and_from_the_folder_alone(tmp_path: Path):
    images = [{"pixel_values": torch.rand(1, 28, 28), "labels": torch.tensor(i % 2)} for i in range(8)]
    args = arguments(tmp_path, max_steps=1, grape_preset="auto", jvp_steps=2)
    trainer = GrapeTrainer(model=image_classifier("mnist_cnn", ["even", "odd"]), args=args, train_dataset=images)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    line = "Method `grape`, preset `convnet`, which `auto` chose by the model's blocks; what differs"
    written = (tmp_path / "README.md").read_text()
    assert line in written
    assert "| `jvp_steps` | `2` | `1` |" in written
    points = "| `feedback_points` | `2` | `3` |"  # between three blocks there is room for two
    assert points in written
    assert "| `feedback_sweeps` |" not in written
    (tmp_path / "README.md").unlink()
    assert line in write_card(tmp_path).read_text()
    assert points in write_card(tmp_path).read_text()


def test_what_auto_has_changed_of_a_preset_is_known_from_the_folder_alone(tmp_path: Path):
    """Compiled blocks cannot be swept, so that `auto` leaves the sweep of `convnet` out."""
    images = [{"pixel_values": torch.rand(1, 28, 28), "labels": torch.tensor(i % 2)} for i in range(8)]
    args = arguments(tmp_path, max_steps=1, grape_preset="auto", torch_compile=True, torch_compile_backend="eager")
    trainer = GrapeTrainer(model=image_classifier("mnist_cnn", ["even", "odd"]), args=args, train_dataset=images)
    assert trainer.grape_options.feedback_sweeps == 0
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    assert "| `feedback_sweeps` | `0` | `1` |" in write_card(tmp_path).read_text()


@pytest.mark.parametrize(("start", "name"), [(None, "random"), ("identity", "identity"), ("zero", "zero")])
def test_dfa_says_what_its_matrices_are(start: str | None, name: str, tmp_path: Path):
    trainer = prepare(tmp_path, method="dfa", max_steps=1, feedback_init=start)
    trainer.train()
    trainer.create_model_card()
    assert f"**direct feedback alignment (DFA) with fixed {name} feedback**" in (tmp_path / "README.md").read_text()


def test_a_model_that_transformers_does_not_know(tmp_path: Path):
    trainer = prepare(tmp_path, max_steps=1)
    trainer.train()
    trainer.model.__class__ = type("Mine", (type(trainer.model),), {})
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "`Mine` is not part of transformers." in text
    assert "```python" not in text


def test_a_card_says_what_learned_the_feedback_and_which_way_the_error_took(tmp_path: Path):
    """Not of forward-mode derivatives where there were none; and what the update has seen is in the table."""
    options = {"feedback_rule": "local", "feedback_path": "shortcut", "feedback_sweeps": 1, "alignment_steps": 5}
    run = make_trainer(GPT2, tmp_path, method="grape", jvp_steps=1, **options)
    run.train()
    run.create_model_card(dataset="random tokens")
    card = (tmp_path / "README.md").read_text()
    assert "maps, one for each block above, that the block learns from its own backward" in card
    assert "forward-mode" not in card
    assert "shortcut connections of those blocks" in card
    assert "corrected once" in card
    assert "| boundary | output of | cos(G d, v) | cos(B e, δ) | cos(g, g*) | size of g / g* |" in card
    logged = next(e for e in reversed(run.state.log_history) if "grape/weight_gradient/cosine/h_1" in e)
    assert f"{logged['grape/weight_gradient/cosine/h_1']:.3f}" in card
    assert f"{logged['grape/weight_gradient/size/h_2']:.3f}" in card
