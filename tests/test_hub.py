"""Pushing to the Hub and loading from it: ``huggingface_hub``'s own client in real processes, over real HTTP.

The Hub is hub_server.py, on the loopback interface. Both recipes run from their command lines.
"""

import copy
import io
import itertools
import json
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hub_server import TOKEN, HubServer
from PIL import Image as Picture
from safetensors.torch import load
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from grape_hf import GrapeTrainer
from grape_hf.engine.pushes import HubToken
from grape_hf.hub import name_of, without_home

TOP = Path(__file__).parents[1]
CLIENT = Path(__file__).with_name("hub_client.py")
MODEL = {"config.json", "model.safetensors", "training_args.bin", "README.md", "alignment.png", "curves.png"}
TEXT = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
CHECKPOINT = {"grape_feedback.safetensors", "grape_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}


class Machine:
    """A user's machine: a folder, and processes that know one Hub."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TOP),
        }
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            self.environment.pop(name, None)

    def start(self, *words: object, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=TOP,
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: object, **more: str) -> str:
        return finish(self.start(*words, **more))

    def follow(self, note: str) -> str:
        """Run the command at the end of a note on a failed push, as a shell would, as the user that the token names.

        The client runs as it is installed, with Xet, and goes another way then; every file must go into the commit.
        """
        hf, *words = shlex.split(note.rpartition(": ")[2])
        return self.run(Path(sys.executable).with_name(hf), *words, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0")


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def nothing_secret(server: HubServer, folder: Path) -> None:
    """Neither the token nor, outside of the pickled arguments, a path of the user's machine was let out."""
    assert server.all_files()
    for path, content in server.all_files():
        assert TOKEN.encode() not in content, path
        if not content.startswith(b"PK"):  # what torch.save wrote: the arguments have output_dir as it was given
            assert str(folder).encode() not in content, path
    assert not any(TOKEN.encode() in sent for sent in server.sent)


class Pushed:
    """What the client's pushes left: the server, what the client printed, and what it kept."""

    def __init__(self, server: HubServer, machine: Machine) -> None:
        server.plan["create"] = iter([500])
        server.plan["upload"] = itertools.chain([None] * 20, [500], itertools.repeat(None))
        server.plan["commit someone/flaky"] = iter([500])
        server.plan["commit someone/down"] = iter(["drop"])
        server.plan["commit someone/small"] = itertools.repeat(500)
        self.server, self.machine, self.folder = server, machine, machine.folder
        self.printed = machine.run(CLIENT, "push", self.folder, TOKEN)
        self.uploads = server.requests["upload"], len(server.blobs)
        self.seen: dict[str, Any] = json.loads((self.folder / "seen.json").read_text())
        self.expected: dict[str, torch.Tensor] = torch.load(self.folder / "expected.pt")

        self._follow_the_note_on_small()

    def note(self, name: str) -> str:
        (note,) = self.seen[name][1:]
        return note

    def _follow_the_note_on_small(self) -> None:
        self.small_before = [commit.summary for commit in self.server.model("someone/small").commits]
        stray = self.folder / "small" / "checkpoint-1" / "model.safetensors"
        stray.parent.mkdir()
        stray.write_text("not to be uploaded")
        del self.server.plan["commit someone/small"]
        self.server.lfs = False
        self.machine.follow(self.note("small"))


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    with HubServer() as server:
        made = Pushed(server, Machine(tmp_path_factory.mktemp("pushed"), server.url))
        yield made
        assert server.unknown == []


class TestAPush:
    def test_holds_the_whole_run_at_the_end(self, pushed: Pushed):
        whole = pushed.server.model("someone/whole")
        top = {path for path in whole.files if "/" not in path}
        assert top == MODEL | TEXT | {".gitattributes"}
        assert whole.commits[-1].summary == "End of training"
        assert "`Novels of 1900`" in whole.files["README.md"].content.decode()
        assert whole.files["alignment.png"].content.startswith(b"\x89PNG")

    def test_is_private_if_that_was_asked_for(self, pushed: Pushed):
        assert pushed.server.model("someone/whole").private
        assert not pushed.server.model("someone/flaky").private

    def test_holds_the_feedback_if_checkpoints_were_asked_for_and_else_no_state_of_the_training(self, pushed: Pushed):
        files = pushed.server.model("someone/whole").files
        for step in (2, 4):
            assert {f"checkpoint-{step}/{name}" for name in CHECKPOINT | {"trainer_state.json"}} <= files.keys()
        for name in ("flaky", "down", "small"):
            other = pushed.server.model(f"someone/{name}").files
            assert not any(Path(path).name in CHECKPOINT or path.startswith("checkpoint-") for path in other)

    def test_is_made_at_every_save_with_a_card_of_that_step(self, pushed: Pushed):
        commits = pushed.server.model("someone/whole").commits
        steps = [f"Training in progress, step {step}{part}" for step in (2, 4) for part in ("", ", checkpoint")]
        assert [commit.summary for commit in commits] == ["initial commit", *steps, "End of training"]
        cards = [commit.files["README.md"].content.decode() for commit in (commits[1], commits[3])]
        for step, card in zip((2, 4), cards, strict=True):
            assert f"none of {step} optimiser steps" in card
            assert 'from_pretrained("someone/whole")' in card

    def test_lets_out_nothing_secret(self, pushed: Pushed):
        nothing_secret(pushed.server, pushed.folder)
        arguments = (
            file.content for path, file in pushed.server.model("someone/whole").files.items() if "_args" in path
        )
        tokens = [torch.load(io.BytesIO(content), weights_only=False).hub_token for content in arguments]
        assert tokens == [None] * 3


class TestAPushThatFails:
    def test_at_the_start_says_so_before_any_training(self, pushed: Pushed):
        assert "500" in pushed.seen["refused"][0]
        assert not (pushed.folder / "refused").exists() or not any((pushed.folder / "refused").iterdir())

    def test_while_training_is_announced_and_made_good_by_the_next_save(self, pushed: Pushed):
        (line,) = (line for line in pushed.printed.splitlines() if "the push of step" in line)
        assert "the push of step 2 failed (HfHubHTTPError: Server error '500" in line
        assert "The next save pushes again." in line
        flaky = pushed.server.model("someone/flaky")
        assert [commit.summary for commit in flaky.commits] == ["initial commit", "Training in progress, step 4"]
        assert flaky.files.keys() == MODEL | TEXT | {".gitattributes"}

    def test_for_a_moment_is_repeated_by_the_client_itself(self, pushed: Pushed):
        requests, files = pushed.uploads
        assert requests == files + 1

    def test_at_the_end_raises_with_all_files_in_place_and_a_second_push_gets_through(self, pushed: Pushed):
        assert str(pushed.folder / "down") in pushed.note("down")
        assert set(pushed.seen["down left"]) == MODEL | TEXT
        assert pushed.seen["down again"] == "End of training"
        down = pushed.server.model("someone/down")
        assert [commit.summary for commit in down.commits] == ["initial commit", "End of training"]

    def test_is_made_good_by_the_command_in_its_note(self, pushed: Pushed):
        assert pushed.small_before == ["initial commit"]
        assert pushed.server.model("someone/small").files.keys() == MODEL | {".gitattributes"}


def test_what_was_pushed_opens_as_its_card_says_with_the_same_logits(pushed: Pushed):
    """In a process without grape_hf, but for the network that needs it. A checkpoint goes on bit for bit."""
    assert "import grape_hf.vision" in pushed.server.model("someone/small").files["README.md"].content.decode()
    pushed.machine.run(CLIENT, "open", pushed.folder, HF_TOKEN=TOKEN)
    got = torch.load(pushed.folder / "got.pt")
    assert got.keys() == pushed.expected.keys() == {"whole", "flaky", "down", "small"}
    for name, logits in pushed.expected.items():
        assert torch.equal(got[name], logits), name


WIKITEXT, CIFAR100 = "Salesforce/wikitext", "uoft-cs/cifar100"
QUIET = "--report_to none --disable_tqdm true --use_cpu true --dataloader_pin_memory false --logging_steps 1"
WORDS = (
    f"recipes/wikitext103.py {QUIET} --context 16 --tokenizer_vocab_size 300 --hidden_size 16 --num_hidden_layers 3 "
    "--num_attention_heads 2 --per_device_train_batch_size 4 --max_steps 2 --validation_rows 20 "
    "--preprocessing_workers 1"
)
IMAGES = f"recipes/image_classification.py {QUIET} --architecture mnist_cnn --per_device_train_batch_size 16"
LAUNCH = "-m accelerate.commands.launch --main_process_port 0 --config_file recipes/accelerate/pipeline.yaml"
OVER_STAGES = "--pipeline_stages 2 --feedback_rule local --alignment_steps 1"
PUSH = "--push_to_hub --hub_private_repo true --hub_model_id"


def parquet(rows: Dataset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        rows.to_parquet(f"{folder}/rows.parquet")
        return Path(folder, "rows.parquet").read_bytes()


def card_of_data(config: str, splits: list[str]) -> bytes:
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n".encode()


def wikitext() -> dict[str, bytes]:
    """A few lines in the shape of WikiText-103."""
    config, sizes = "wikitext-103-raw-v1", {"test": 20, "train": 300, "validation": 50}
    lines = [f"line {i} of a text about {('one', 'two', 'three')[i % 3]} things\n" for i in range(300)]
    files = {
        f"{config}/{split}-00000-of-00001.parquet": parquet(Dataset.from_dict({"text": lines[:size]}))
        for split, size in sizes.items()
    }
    return files | {"README.md": card_of_data(config, list(sizes))}


def cifar100() -> dict[str, bytes]:
    """A few pictures in the shape of CIFAR-100, of the size that the network wants."""
    sizes, names = {"train": 64, "test": 16}, [f"class {i}" for i in range(4)]
    features = Features(
        {"img": Image(), "fine_label": ClassLabel(names=names), "coarse_label": ClassLabel(num_classes=2)}
    )
    files = {"README.md": card_of_data("cifar100", list(sizes))}
    for split, size in sizes.items():
        labels = np.arange(size) % 4
        pictures = [Picture.fromarray(np.full((28, 28, 3), 60 * label, np.uint8)) for label in labels]
        rows = {"img": pictures, "fine_label": labels, "coarse_label": labels // 2}
        files[f"cifar100/{split}-00000-of-00001.parquet"] = parquet(Dataset.from_dict(rows, features=features))
    return files


class Recipes:
    """Both recipes from the command line with their data on the Hub; that for text with a Hub that has none, too.

    The Hub that has none refuses the push of the run once. Without any Hub: test_recipe_images.py.
    """

    def __init__(self, folder: Path, full: HubServer, empty: HubServer) -> None:
        full.add("dataset", WIKITEXT, wikitext())
        full.add("dataset", CIFAR100, cifar100())
        self.full, self.empty, self.folder = full, empty, folder
        empty.plan["commit someone/sample"] = iter([500])
        empty.lfs = False
        self.printed = self._together(
            words=(full.url, f"{WORDS} {PUSH} someone/words --save_steps 1"),
            images=(full.url, f"{IMAGES} {PUSH} someone/images --method bp --max_steps 2"),
            stages=(full.url, f"{LAUNCH} {WORDS} {OVER_STAGES} {PUSH} someone/stages --save_steps 1"),
        ) | self._together(sample=(empty.url, f"{WORDS} {PUSH} someone/sample --save_strategy no"))

    def _together(self, **runs: tuple[str, str]) -> dict[str, str]:
        begun = {}
        for name, (url, words) in runs.items():
            (self.folder / name).mkdir()
            machine = Machine(self.folder / name, url)
            begun[name] = machine.start(*words.split(), "--output_dir", machine.folder / "run", HF_TOKEN=TOKEN)
        return {name: finish(process, code=int(name == "sample")) for name, process in begun.items()}

    def results(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "run" / "all_results.json").read_text())


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipes]:
    with HubServer() as full, HubServer() as empty:
        yield Recipes(tmp_path_factory.mktemp("recipes"), full, empty)
        assert full.unknown == empty.unknown == []


RECORDS = {"all_results.json", "train_results.json", "eval_results.json", "trainer_state.json", "alignment.json"}


class TestRecipes:
    def test_text_comes_from_the_hub_and_everything_goes_there(self, recipes: Recipes):
        assert recipes.results("words")["dataset"] == "Salesforce/wikitext (wikitext-103-raw-v1)"
        assert "NOT WikiText-103" not in recipes.printed["words"]
        words = recipes.full.model("someone/words")
        assert words.private
        everything = MODEL | TEXT | RECORDS | {"sample.txt"}
        assert words.files.keys() == everything | {".gitattributes"}
        assert len(words.commits) > 2
        for commit in words.commits[1:]:  # those while training too
            card = commit.files["README.md"].content.decode()
            assert "(https://huggingface.co/datasets/Salesforce/wikitext)" in card
            assert "datasets:\n- Salesforce/wikitext\n" in card
        summaries = [commit.summary for commit in words.commits]
        assert (summaries[1], summaries[-1]) == ("Training in progress, step 1", "End of training")
        assert "Model save" not in summaries

    def test_a_model_over_stages_goes_there_whole_and_once(self, recipes: Recipes):
        stages, words = (recipes.full.model(f"someone/{name}") for name in ("stages", "words"))
        assert stages.files.keys() == words.files.keys()
        summaries = [commit.summary for commit in stages.commits]
        assert summaries[-1] == "End of training"
        assert len(set(summaries)) == len(summaries)
        whole = load(words.files["model.safetensors"].content).keys()
        pushed = [c.files["model.safetensors"] for c in stages.commits if "model.safetensors" in c.files]
        assert pushed
        assert all(load(file.content).keys() == whole for file in pushed)
        card = stages.files["README.md"].content.decode()
        assert "| `pipeline_stages` | `2` | `1` |" in card
        assert "| h_2 |" in card

    def test_images_come_from_the_hub_and_the_stock_card_says_what_the_network_needs(self, recipes: Recipes):
        found = recipes.results("images")
        assert (found["dataset"], found["train_images"], found["method"]) == (CIFAR100, 58, "bp")
        images = recipes.full.model("someone/images")
        assert images.private
        assert images.files.keys() == MODEL - {"alignment.png"} | RECORDS | {".gitattributes"}
        card = images.files["README.md"].content.decode()
        assert card.count("import grape_hf.vision") == 1
        assert CIFAR100 in card
        saved = (recipes.folder / "images" / "run" / "model.safetensors").read_bytes()
        assert images.files["model.safetensors"].content == saved

    def test_a_hub_without_the_data_is_announced(self, recipes: Recipes):
        assert "This is NOT WikiText-103. The Hub is not in reach (RepositoryNotFoundError" in recipes.printed["sample"]
        assert recipes.results("sample")["dataset"].startswith("embedded sample (pydoc")

    def test_a_push_that_fails_leaves_everything_for_the_command_in_its_note(self, recipes: Recipes):
        run, sample = recipes.folder / "sample" / "run", recipes.empty.model("someone/sample")
        everything = MODEL | TEXT | RECORDS | {"sample.txt"}
        assert {path.name for path in run.iterdir()} == everything
        assert len(sample.commits) == 1
        (note,) = (
            line for line in recipes.printed["sample"].splitlines() if line.startswith("GrAPE: the push failed.")
        )
        Machine(recipes.folder / "sample", recipes.empty.url).follow(note)
        assert sample.private
        assert sample.files.keys() == everything | {".gitattributes"}
        card = sample.files["README.md"].content.decode()
        assert "embedded sample (pydoc" in card
        assert "Salesforce" not in card

    def test_nothing_secret_goes_out(self, recipes: Recipes):
        nothing_secret(recipes.full, recipes.folder)
        nothing_secret(recipes.empty, recipes.folder)


class TestATokenAmongTheArguments:
    def test_is_a_string_to_all_but_pickle(self):
        token = HubToken("hf_x")
        assert (token, f"Bearer {token}", json.dumps({"t": token})) == ("hf_x", "Bearer hf_x", '{"t": "hf_x"}')
        assert copy.deepcopy({"t": token}) == {"t": "hf_x"}
        assert pickle.loads(pickle.dumps({"t": token})) == {"t": None}

    @pytest.mark.parametrize("save", ["save_model", "checkpoint"])
    def test_is_not_saved_with_arguments_of_any_kind(self, tmp_path: Path, save: str):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=9))
        args = TrainingArguments(
            output_dir=str(tmp_path), hub_token=TOKEN, report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True
        )
        row = torch.arange(8)
        trainer = GrapeTrainer(model, args, train_dataset=[{"input_ids": row, "labels": row}] * 8)
        if save == "save_model":
            trainer.save_model()
        else:
            trainer.train()
        (kept,) = tmp_path.rglob("training_args.bin")
        assert trainer.args.hub_token == TOKEN
        assert torch.load(kept, weights_only=False).hub_token is None
        assert TOKEN.encode() not in kept.read_bytes()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/jane/novels/a.txt", "~/novels/a.txt"),
        ("/home/jane", "~"),
        ("/home/janet/a.txt", "/home/janet/a.txt"),
        ("novels/a.txt", "novels/a.txt"),
        ("jane/novels", "jane/novels"),
    ],
)
def test_names_of_data_do_not_tell_the_home(monkeypatch: pytest.MonkeyPatch, path: str, shown: str):
    monkeypatch.setenv("HOME", "/home/jane")
    assert without_home(path) == shown


def test_a_folder_given_as_a_data_set_has_no_id_on_the_hub(tmp_path: Path):
    assert name_of("someone/novels", None) == ("someone/novels", "someone/novels")
    assert name_of("someone/novels", "short") == ("someone/novels (short)", "someone/novels")
    assert name_of(str(tmp_path), None) == (str(tmp_path), None)
