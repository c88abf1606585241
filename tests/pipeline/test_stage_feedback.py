"""What the feedback of a stage finds out about the loss, and forgets or keeps."""

import pytest
import torch
from torch import Tensor

from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.feedback import Feedback
from grape_hf.pipeline.feedback import StageFeedback
from grape_hf.pipeline.places import Places

ONE, ALL = torch.zeros(2, 6, 4), torch.ones(2, 6, 4)
ONE[:, 0] = 1


def feedback() -> StageFeedback:
    return StageFeedback({0: "a", 1: "b"}, [0, 1, 2], None, 4, torch.float32, torch.device("cpu"))


def sent(found: StageFeedback, e: Tensor) -> Tensor:
    """What goes up in a batch of its own."""
    found.begin([None])
    return found.spread(e, 0)


def test_a_task_that_reads_all_positions_is_noticed_behind_one_that_reads_one(caplog):
    """In batches 1, 2, 4 and so on; its errors go up as they are from the next batch on."""
    found = feedback()
    torch.testing.assert_close(sent(found, ONE), ONE + ALL / 6)  # all positions get the mean besides
    assert found.read_at == "first"
    torch.testing.assert_close(sent(found, ALL), 2 * ALL)  # the second batch: an error and the mean of six
    assert "several positions of a sample" not in caplog.text
    assert sent(found, ONE) is ONE
    assert found.read_at is None
    assert caplog.text.count("several positions of a sample") == 1


def test_an_error_at_all_positions_settles_it():
    found = feedback()
    assert sent(found, 0 * ALL).equal(0 * ALL)
    assert not found.settled
    assert sent(found, ALL) is ALL
    assert found.settled
    assert sent(found, ONE) is ONE


def test_maps_that_are_no_chain_are_refused(tmp_path):
    """As of a model that pools, in one process: over stages each map takes what the next one makes."""
    path, found = tmp_path / "feedback.safetensors", feedback()
    found.learn(None, Places(1, 1, 0, 0, *[None] * 7), 0.1, False)
    G = [torch.full((4, 4), float(i)) for i in (2, 3)]

    def load(sources: list[int | None]) -> None:
        maps = BlockMaps(G, sources)
        Feedback(maps.product(), maps=maps).save(path, ["a", "b"])
        found.load(path, None, False)

    load([1, None])
    assert found.B[0].equal(G[0] @ G[1])
    with pytest.raises(ValueError, match=r"from the one behind the next block, \[1, None\].* found \[None, None\]"):
        load([None, None])
