"""The wheel and the sdist as a user gets them: built from this checkout, installed into an empty virtual environment.

The environment sees the packages of the present one (by a .pth file), so that torch is not fetched again, but not this
checkout: grape_hf there is what the wheel holds.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

# Measures the import, then trains and writes a card, for which the template is needed.
USER = """
import json, sys, time

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

before, began = set(sys.modules), time.process_time()
import grape_hf
from grape_hf import GrapeTrainer

seconds, added = time.process_time() - began, sorted(set(sys.modules) - before)
import torch

rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=8, n_positions=8, bos_token_id=0, eos_token_id=0)
args = grape_hf.GrapeTrainingArguments(output_dir="out", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = grape_hf.GrapeTrainer(GPT2LMHeadModel(config), args, train_dataset=rows)
trainer.train()
trainer.create_model_card()
print(json.dumps({"file": grape_hf.__file__, "seconds": seconds, "added": added, "steps": trainer.state.global_step}))
"""

TYPED = """
from torch import Tensor, nn

from grape_hf import GrapeTrainer, GrapeTrainingArguments

args = GrapeTrainingArguments(output_dir="out", method="dfa", feedback_lr=0.1)
trainer = GrapeTrainer(model=nn.Linear(1, 1), args=args)
matrices: list[Tensor] = trainer.feedback
GrapeTrainingArguments(output_dir="out", method="gripe")  # error: arg-type
trainer.feedback.shape  # error: attr-defined
"""


def run(*command: object, cwd: Path, env: dict[str, str] = CLEAN) -> str:
    """Run a command, and return what it printed; show what it complained of if it fails."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # No isolation: hatchling is here (the extra "test"), and no index is asked.
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT, env=dict(os.environ))
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "present.pth").write_text(sysconfig.get_path("purelib"))
    install = ("install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", interpreter, *install, cwd=folder)
    return interpreter


@pytest.fixture(scope="module")
def used(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder in which a user's script ran, and what it printed."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.py").write_text(USER)
    env = CLEAN | {"HF_HUB_OFFLINE": "1"}
    return folder, json.loads(run(python, "user.py", cwd=folder, env=env).splitlines()[-1])


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_a_users_script_trains_with_the_wheel_and_writes_its_card(python: Path, used: tuple[Path, dict]):
    folder, said = used
    assert Path(said["file"]).is_relative_to(python.parents[1])
    assert said["steps"] == 2
    assert "with **GrAPE**" in (folder / "out" / "README.md").read_text()


def test_import_loads_nothing_that_the_trainer_has_not_loaded(used: tuple[Path, dict]):
    added = used[1]["added"]
    assert "grape_hf.trainer" in added
    assert [name for name in added if name.split(".")[0] != "grape_hf"] == []
    assert {"grape_hf.reports.cards", "grape_hf.reports.plots", "grape_hf.vision", "grape_hf.text"}.isdisjoint(added)


def test_import_adds_less_than_three_tenths_of_a_second(used: tuple[Path, dict]):
    assert 0 < used[1]["seconds"] < 0.3  # of the processor: other processes do not count


def test_a_users_script_is_type_checked(python: Path, tmp_path: Path):
    (tmp_path / "user.py").write_text(TYPED)
    # Of what is imported only grape_hf is read, and of torch what Tensor and Module are: the rest takes half a minute.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\n"
        "[mypy-grape_hf.*,torch,torch._tensor,torch.nn,torch.nn.modules,torch.nn.modules.*]\nfollow_imports = normal\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--cache-dir", "cache", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=CLEAN, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    expected = [(i, line.split()[-1]) for i, line in enumerate(TYPED.splitlines(), 1) if "# error" in line]
    assert [(int(line.split(":")[1]), line.split()[-1].strip("[]")) for line in errors] == expected, done.stdout


def test_the_wheel_holds_the_package_and_the_template_of_cards(wheel: Path):
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("grape_hf/**/*.py")}
    assert modules | {"grape_hf/py.typed", "grape_hf/model_cards/template.md"} <= names(wheel)
    assert all(name.startswith("grape_hf/") for name in names(wheel))


def test_the_sdist_carries_recipes_and_cards_and_makes_the_same_wheel(built: Path, wheel: Path, tmp_path: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    kinds = {".py", ".yaml", ".md", ".png", ".json"}
    for folder in ("recipes", "model_cards", "tests"):
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in kinds}
        assert here
        assert {str(path) for path in here if not (source / path).is_file()} == set()
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        tmp_path / "again",
        cwd=source,
        env=dict(os.environ),
    )
    (again,) = (tmp_path / "again").glob("*.whl")
    assert names(again) == names(wheel)


def test_the_lowest_versions_that_the_wheel_asks_for_are_those_tested(wheel: Path):
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    required = Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode()).get_all("Requires-Dist", [])
    pins = [line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "==" in line]
    lowest = {name: Version(version) for name, version in pins}
    bounds = {r.name: [s.version for s in r.specifier if s.operator == ">="] for r in map(Requirement, required)}
    asked = {name: Version(bound[0]) for name, bound in bounds.items() if bound and name in lowest}
    assert {"torch", "transformers", "accelerate"} <= asked.keys()
    assert asked == {name: lowest[name] for name in asked}
