"""The script that runs the tests of another repository with our Trainer in place of the stock one."""

import transformers_tests
from transformers_tests import MODES, UNEXPLAINED, table

# A test module as one finds them there: imports by name, subclasses, arguments left out.
MODULE = """
import dataclasses
import torch
from transformers import NoLongerThere, Trainer, TrainingArguments


class Sub(Trainer):
    pass


@dataclasses.dataclass
class SubArguments(TrainingArguments):
    a: float = 0.0


def train():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))

        def forward(self, x, labels=None):
            y = self.blocks(x)
            return (((y - labels) ** 2).mean(), y)

    data = [{"x": torch.randn(3), "labels": torch.randn(3)} for _ in range(8)]
    arguments = SubArguments("out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Sub(Model(), arguments, train_dataset=data)
    trainer.train()
    return trainer


def test_trains():
    assert train().state.global_step == 2


def test_is_the_stock_trainer():
    assert Trainer.__name__ == "Trainer"


def test_fails_everywhere():
    assert NoLongerThere
"""


def test_each_mode_runs_its_trainer_and_differences_are_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_module.py").write_text(MODULE)
    found = {}
    for mode in MODES:
        by_id = transformers_tests.run(tmp_path / "test_module.py", mode, None, 60)
        found[mode] = {name.rsplit("::", 1)[1]: test for name, test in by_id.items()}
    trained = {mode: found[mode]["test_trains"]["runs"] for mode in MODES}
    for mode, ours, feedback_steps in (("stock", False, 0), ("bp", True, 0), ("recommended", True, 2)):
        assert found[mode]["test_trains"]["outcome"] == "passed"
        assert [(run["ours"], run["steps"], run["feedback_steps"]) for run in trained[mode]] == [
            (ours, 2, feedback_steps)
        ]
        assert found[mode]["test_is_the_stock_trainer"]["outcome"] == ("failed" if ours else "passed")
        assert found[mode]["test_fails_everywhere"]["outcome"] == "failed"
    assert trained["bp"][0]["digest"] == trained["stock"][0]["digest"] != trained["recommended"][0]["digest"]


def outcome(ended, reason="", digest="a", feedback_steps=0):
    training = {"ours": True, "steps": 1, "feedback_steps": feedback_steps, "digest": digest}
    return {"outcome": ended, "reason": reason, "runs": [training] if digest else []}


def test_the_table_explains_what_it_can_and_marks_the_rest():
    stock = {f"f.py::T::{name}": outcome("passed") for name in ("same", "bits", "broken", "refused")}
    stock["f.py::T::hub"] = outcome("failed", "cannot reach the Hub")
    recommended = stock | {
        "f.py::T::same": outcome("passed", digest="b", feedback_steps=1),
        "f.py::T::refused": outcome("failed", "found no blocks in Model"),
    }
    bp = stock | {"f.py::T::bits": outcome("passed", digest="b"), "f.py::T::broken": outcome("failed", "boom")}
    reasons = {"checkout": "here", "refused": "found no blocks", "stock": {"messages": {"the Hub": "needs the Hub"}}}
    reasons |= {"bp": {}, "bits": {}, "recommended": {}}
    text = table({"stock": stock, "bp": bp, "recommended": recommended}, reasons)
    assert "Of 5 tests 4 pass" in text
    assert "| pass | 3 | 3 |" in text
    assert "| are refused, the model having no blocks | - | 1 |" in text
    assert "| end otherwise | 1 | 0 |" in text
    assert "bit for bit | 4 of 5 | - |" in text
    assert "With direct feedback: `same`." in text
    assert "| 1 | needs the Hub |" in text
    assert text.count(UNEXPLAINED) == 2
    assert "`T.broken`: passed, now failed | **unexplained**: `'boom'` |" in text
    explained = reasons | {"bp": {"tests": {"broken": "known"}}, "bits": {"tests": {"bits": "chance"}}}
    text = table({"stock": stock, "bp": bp, "recommended": recommended}, explained)
    assert UNEXPLAINED not in text
    assert "| `T.broken`: passed, now failed | known |" in text


def test_a_test_that_was_not_run_is_a_difference():
    stock = {"f.py::T::lost": outcome("passed")}
    reasons = {"checkout": "", "refused": "found no blocks", "stock": {}, "bp": {}, "bits": {}, "recommended": {}}
    assert "passed, now not run" in table({"stock": stock, "bp": {}, "recommended": stock}, reasons)
