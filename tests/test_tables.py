"""Tables: which cells run, when, and what is made of them; by a recipe of a few lines, and once by the real one."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

TOP = Path(__file__).parents[1]
# Accuracy falls with the distance of the rate from the method's best one, and rises with the seed; the test's is 10
# points less. It writes each run into a list, and one may be told to fail, or to wait.
RECIPE = """
import json, os, sys, time
from pathlib import Path
import yaml
options = yaml.safe_load(Path(sys.argv[1]).read_text())
out = Path(options["output_dir"])
with open(options["log"], "a") as log:
    print(out.name, "again" if options.get("evaluate_only") else "trained", file=log)
if options.get("fail") and not Path(options["fail"]).exists():
    print("some output")
    raise ValueError("it was told to fail")
while options.get("wait") and not Path(options["wait"]).exists():
    time.sleep(0.05)
if options.get("evaluate_only"):
    options |= yaml.safe_load((Path(options["model_name_or_path"]) / "options.yaml").read_text())
    options["evaluate_test"] = True
accuracy = 0.8 - abs(options["learning_rate"] - options["best"]) + 0.01 * options["seed"]
results = {"eval_accuracy": accuracy, "train_runtime": 60.0, "train_loading_share": 0.01, "dataset": "some data"}
if options.get("evaluate_test"):
    results["test_accuracy"] = accuracy - 0.1
history = [{"epoch": e, "eval_accuracy": accuracy * e / 2} for e in (1.0, 2.0)]
(out / "all_results.json").write_text(json.dumps(results))
(out / "trainer_state.json").write_text(json.dumps({"log_history": history}))
(out / "config.json").touch()
"""


class Table:
    """A table in a folder of its own, and the processes that fill it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipes").mkdir()
        for name in ("grid.py", "tables.py", "tables_report.py"):  # the copy takes its folder for the project's
            (folder / "recipes" / name).write_text((TOP / "recipes" / name).read_text())
        (folder / "recipes" / "little.py").write_text(RECIPE)
        (folder / "base.yaml").write_text(yaml.safe_dump({"log": str(folder / "log"), "best": 0.2}))
        self.settings: dict[str, Any] = {
            "output_dir": "results",
            "recipe": "recipes/little.py",
            "settings": "base.yaml",
            "learning_rates": [0.1, 0.2],
            "seeds": [0, 1],
            "methods": {"bp": {"method": "bp"}, "dfa": {"method": "dfa", "best": 0.1}},
            "paper": {"bp": 68.72},
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        (self.folder / "table.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False))
        return subprocess.Popen(
            [sys.executable, self.folder / "recipes" / "tables.py", self.folder / "table.yaml", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == status, output
        return output

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def cells(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "results" / "cells").glob("*.json"))

    def wait_for(self, line: str) -> None:
        for _ in range(600):
            if line in self.log():
                return
            time.sleep(0.05)
        pytest.fail(f"{line!r} did not come, only {self.log()}")


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


ALL = [
    f"{method}-{cell}"
    for method, best in (("bp", "0.2"), ("dfa", "0.1"))
    for cell in ("lr0.1-seed0", "lr0.2-seed0", f"lr{best}-seed0-test", f"lr{best}-seed1-test")
]


class TestFilling:
    def test_each_method_at_its_best_rate_with_all_seeds_and_the_first_is_not_trained_twice(self, table: Table):
        table.run()
        assert [line.split()[0] for line in table.log()] == ALL
        assert [line for line in table.log() if line.endswith("again")] == [f"{ALL[2]} again", f"{ALL[6]} again"]
        cells = table.folder / "results" / "cells"
        choice, final = (json.loads((cells / f"{name}.json").read_text()) for name in (ALL[1], ALL[2]))
        assert "test" not in choice
        assert final == choice | {"test": pytest.approx(choice["validation"] - 0.1)}
        assert choice["options"] == {
            "log": str(table.folder / "log"),
            "best": 0.2,
            "method": "bp",
            "learning_rate": 0.2,
            "seed": 0,
            "disable_tqdm": True,
        }

    def test_a_run_whose_launcher_was_killed_keeps_its_cell_until_it_ends(self, table: Table):
        gate = table.folder / "gate"
        table.settings["methods"] = {"bp": {"method": "bp", "wait": str(gate)}}
        first = table.start()
        table.wait_for(f"{ALL[0]} trained")
        os.kill(first.pid, signal.SIGKILL)  # the launcher alone: its recipe goes on waiting
        first.wait(timeout=60)
        assert first.stdout is not None
        first.stdout.close()
        second = table.start()
        try:
            table.wait_for(f"{ALL[1]} trained")
            assert table.log().count(f"{ALL[0]} trained") == 1
        finally:
            gate.touch()
        assert second.communicate(timeout=120)[0] is not None
        assert second.returncode == 0
        assert table.log().count(f"{ALL[0]} trained") == 2  # nobody was left to write down what came of it

    def test_the_report(self, table: Table):
        table.run()
        rows = list(csv.DictReader((table.folder / "results" / "table.csv").read_text().splitlines()))
        assert [row["method"] for row in rows] == ["bp", "dfa"]
        assert float(rows[0]["test"]) == pytest.approx(70.5)  # of 70 and 71
        assert float(rows[0]["test_std"]) == pytest.approx(0.5**0.5)
        assert (float(rows[0]["paper"]), rows[1]["paper"], rows[0]["seeds"]) == (68.72, "nan", "2")
        text = (table.folder / "results" / "table.md").read_text()
        assert (
            "| bp | - | 0.2 | 2 | 70.50 ± 0.71 | 70.00 to 71.00 | 68.72 | 80.50 | 0.1: 70.0, 0.2: 80.0 | 1.0 |" in text
        )
        assert (table.folder / "results" / "epochs.png").read_bytes().startswith(b"\x89PNG")
        before = table.log()
        assert "70.50 ± 0.71" in table.run("--report")
        assert table.log() == before

    def test_the_report_is_of_the_rates_that_are_listed(self, table: Table):
        """One that did well with the first seed alone is taken off by hand; its cells stay as a record."""
        table.settings["seeds"] = [0]
        table.run("--methods", "bp")
        table.settings["methods"]["bp"] |= {"learning_rates": [0.1]}
        assert "| bp | - | 0.1 | 0 | - | - | 68.72 | 70.00 | 0.1: 70.0 | 1.0 |" in table.run("--report")
        assert "bp-lr0.2-seed0" in table.cells()

    def test_a_picture_over_T(self, table: Table):
        table.settings["methods"] = {
            "bp": {"method": "bp"},
            **{f"grape_T{t}": {"calibration_strategy": "epoch", "calibration_interval": t} for t in (1, 5)},
            "grape": {"calibration_strategy": "no"},
        }
        table.settings |= {"seeds": [0], "learning_rates": [0.2]}
        table.run()
        assert (table.folder / "results" / "calibration.png").read_bytes().startswith(b"\x89PNG")
        text = (table.folder / "results" / "table.md").read_text()
        assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")][2:] == ["-", "1", "5", "-"]

    def test_a_failing_cell_is_reported_and_the_rest_go_on_and_only_it_is_run_again(self, table: Table):
        cure = table.folder / "cure"
        table.settings["methods"]["bp"] |= {"fail": str(cure)}
        output = table.run(status=1)
        assert "bp-lr0.1-seed0 FAILED: ValueError: it was told to fail" in output
        assert table.cells() == sorted(name for name in ALL if name.startswith("dfa"))
        report = (table.folder / "results" / "cells" / "bp-lr0.1-seed0.error.txt").read_text()
        assert report.startswith("RuntimeError: exit status 1")
        assert "some output\nTraceback" in report
        table_text = (table.folder / "results" / "table.md").read_text()
        assert "- bp-lr0.1-seed0: ValueError: it was told to fail" in table_text
        assert "| dfa |" in table_text
        cure.touch()
        before = len(table.log())
        assert "Failed" not in table.run()
        assert [line.split()[0] for line in table.log()[before:]] == [name for name in ALL if name.startswith("bp")]
        assert not list((table.folder / "results" / "cells").glob("*.error.txt"))

    def test_two_workers_share_the_cells(self, table: Table):
        workers = [table.start(), table.start()]
        for worker in workers:
            output = worker.communicate(timeout=120)[0]
            assert worker.returncode == 0, output
        assert sorted(line.split()[0] for line in table.log()) == sorted(ALL)

    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
    def test_a_killed_workers_cell_is_taken_over(self, table: Table, how: signal.Signals):
        """By SIGTERM to the worker alone, which ends the recipe too; by SIGKILL to both."""
        gate = table.folder / "gate"
        table.settings["methods"] = {"bp": {"method": "bp", "wait": str(gate)}}
        table.settings |= {"seeds": [0], "learning_rates": [0.2]}
        first = table.start()
        table.wait_for("bp-lr0.2-seed0 trained")
        second = table.start()
        time.sleep(1)
        assert table.log() == ["bp-lr0.2-seed0 trained"]  # the second waits
        (os.kill if how == signal.SIGTERM else os.killpg)(first.pid, how)
        first.communicate(timeout=20)
        for _ in range(400):
            if len(table.log()) == 2:
                break
            time.sleep(0.05)
        assert table.log() == ["bp-lr0.2-seed0 trained"] * 2
        gate.touch()
        output = second.communicate(timeout=60)[0]
        assert second.returncode == 0, output
        assert table.cells() == ["bp-lr0.2-seed0", "bp-lr0.2-seed0-test"]


class TestBadInput:
    def test_options_that_have_changed(self, table: Table):
        table.run("--methods", "bp")
        assert len(table.log()) == 4
        table.settings["methods"]["bp"] |= {"weight_decay": 0.1}
        output = table.run(status=1)
        assert "bp-lr0.1-seed0.json was run with other options: weight_decay: None, now 0.1. Give the method" in output
        assert len(table.log()) == 4

    def test_unknown_names(self, table: Table):
        assert "no method nothing in" in table.run("--methods", "nothing", status=2)
        table.settings["metod"] = {}
        assert "unknown: metod, missing: none" in table.run(status=1)

    def test_a_model_that_is_not_the_cells(self, table: Table):
        table.run("--methods", "bp")
        cell = table.folder / "results" / "cells" / "bp-lr0.2-seed0.json"
        cell.write_text(json.dumps(json.loads(cell.read_text()) | {"validation": 0.9}))
        (table.folder / "results" / "cells" / "bp-lr0.2-seed0-test.json").unlink()
        table.run("--methods", "bp", status=1)
        report = (table.folder / "results" / "cells" / "bp-lr0.2-seed0-test.error.txt").read_text()
        assert "it is another model. Delete its folder" in report


@pytest.mark.parametrize("file", sorted((TOP / "recipes" / "studies" / "images").glob("*.yaml")), ids=lambda p: p.stem)
def test_our_tables_are_complete(file: Path):
    table = yaml.safe_load(file.read_text())
    assert (TOP / table["settings"]).is_file()
    assert set(table["paper"]) <= set(table["methods"])
    assert table["methods"]
    assert all(options["method"] for options in table["methods"].values())


def test_the_real_recipe(tmp_path: Path):
    """One cell of the digits; its options, its curve and its time arrive."""
    output = Path("outputs") / "tests" / tmp_path.name / str(os.getpid())
    settings = {
        "output_dir": str(tmp_path),
        "settings": "recipes/image_classification/digits.yaml",
        "options": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True},
        "learning_rates": [0.05],
        "seeds": [3],
        "methods": {"bp": {"method": "bp"}},
    }
    file = tmp_path / f"real-{output.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, TOP / "recipes" / "tables.py", file]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    choice, final = (
        json.loads((tmp_path / "cells" / f"bp-lr0.05-seed3{end}.json").read_text()) for end in ("", "-test")
    )
    assert choice["dataset"] == "embedded sample (scikit-learn's digits, 8 x 8)"
    assert (choice["options"]["max_steps"], choice["options"]["optim_args"]) == (4, "momentum=0.9")
    assert [entry["step"] for entry in choice["log_history"] if "eval_accuracy" in entry] == [2, 4, 4]
    assert final["validation"] == choice["validation"]
    assert 0 <= final["test"] <= 1
