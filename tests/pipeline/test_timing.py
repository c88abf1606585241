"""Reckoned times: the simulation against formulas in closed form, and what ``grape-hf inspect`` shows of stages."""

import pytest
from benchmarks import pipeline_simulator

from grape_hf.cli import main
from grape_hf.pipeline.timing import METHODS, Stages, time_per_batch


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_equal_stages_take_what_the_formulas_say(count, micro_batches):
    """F = 1, B = 2. One batch after the other: a chain fills and drains; a star fills only."""
    stages = Stages([1.0] * count, [2.0] * count)
    K, M = count, micro_batches

    def took(method: str, together: bool = False) -> float:
        return time_per_batch(method, stages, M, together)

    assert took("gpipe", together=True) == took("1f1b", together=True) == 3 * (M + K - 1)
    assert took("star", together=True) == K - 1 + 3 * M
    assert took("delayed") == 3 * M
    assert took("zero-bubble") == 3 * M + K - 1
    if M == 1:
        assert took("star") == K + 2
    if M >= K:  # in a run of many batches the next one's forwards fill what is left
        assert took("star") == 3 * M
    assert 3 * M <= took("star") <= took("star", together=True)
    assert took("star+sweep", together=True) >= took("star", together=True)


def test_the_papers_third_is_one_micro_batch_and_many_stages():
    many = Stages([1.0] * 64, [2.0] * 64)
    assert time_per_batch("gpipe", many, 1) / time_per_batch("star", many, 1) == pytest.approx(3, rel=0.04)
    assert time_per_batch("gpipe", many, 512) / time_per_batch("star", many, 512) == pytest.approx(1, rel=0.15)


def test_transfers_and_an_uneven_head_by_hand():
    """Two stages, one micro-batch, a hop of 0.5; of the last stage's backward of 3 the head takes 1."""
    stages = Stages([1.0, 1.0], [2.0, 3.0], head=1.0, hop=0.5)
    # F 1, hop, F 1, B 3, hop, B 2; in a star F 1, hop, F 1, head 1, then both: 2, and 0.5 + 2 below.
    assert time_per_batch("gpipe", stages, 1, together=True) == 8.0
    assert time_per_batch("star", stages, 1, together=True) == 6.0
    assert {method for method in METHODS if time_per_batch(method, stages, 2) <= 0} == set()


def test_inspect_shows_which_blocks_go_where(capsys):
    sizes = "num_hidden_layers=6,hidden_size=32,intermediate_size=64,num_attention_heads=2,num_key_value_heads=2"
    words = ["inspect", "type:llama", "--overrides", f"{sizes},head_dim=16,vocab_size=8192", "--batch_size", "2"]
    assert main([*words, "--pipeline_stages", "2", "--method", "bp"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0 .. model.layers.2" in shown
    assert "model.layers.3 .. model.layers.5" in shown
    # The head of 8,192 tokens weighs as much as several of these blocks: the last stage should have one.
    assert "--pipeline_split 5,1" in shown
    assert main([*words, "--pipeline_stages", "7", "--method", "bp"]) == 2
    assert "pipeline_stages=7: the model has 6 blocks" in capsys.readouterr().err


def test_the_simulator_says_how_far_off_it_is():
    """Two stages of two blocks with F = 1, B = 2 and no head take 2 (2 + 4) for one micro-batch; 24 were measured."""
    ones = {way: {"1": value} for way, value in (("forward", 1.0), ("backward", 2.0))}
    nothing = {way: {"1": 0.0} for way in ("head_forward", "head_backward", "hop")}
    setting = {"stages": 2, "layers": 4}
    result = {"setting": setting, "parts": ones | nothing | {"update": 0.0}, "seconds": {"bare gpipe/1": [24.0, 24.0]}}
    (row,) = pipeline_simulator.compared(result)
    assert row["reckoned"] == 12.0
    assert row["error"] == -0.5
    rows = pipeline_simulator.reckoned(result, blocks=0, hop=0.0)
    assert {row["ratio"] for row in rows if row["method"] == "1f1b"} == {1.0}
    text = pipeline_simulator.report([row], rows)
    assert "| 2 | bare gpipe | 1 | 24.0000 | 12.0000 | -50.0% |" in text
    assert "Error over 2 stages, without its sign: median 50.0%, largest 50.0%." in text
    text = pipeline_simulator.report([row, row | {"error": 0.1}], rows)
    assert "Error over 2 stages, without its sign: median 30.0%, largest 50.0%." in text
    text = pipeline_simulator.report([row, row | {"asleep": True, "error": 0.1, "stages": 6}], rows)
    assert "| 6, asleep | bare gpipe | 1 | 24.0000 | 12.0000 | +10.0% |" in text
    assert "Error over 6 stages that sleep, without its sign: median 10.0%, largest 10.0%." in text
    assert "| 64 | 1 | 1.00 | 1.00 |" in text
