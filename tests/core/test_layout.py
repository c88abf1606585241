"""How activations become vectors, against plain indexing."""

import pytest
import torch

from grape_hf.core.layout import Layout, Pairing, align_positions

SHAPES = [(2, 3), (2, 4, 3), (2, 3, 8, 6)]
VOLUME = (2, 3, 4, 8, 6)


@pytest.mark.parametrize("sharing", ["auto", "none", "position", "grid"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, VOLUME])
def test_restore_is_the_inverse(sharing, channels_last, shape):
    h = torch.randn(shape)
    layout = Layout(sharing, channels_last)
    assert torch.equal(layout.restore(layout.vectors(h), h.shape), h)
    assert layout.width(h.shape) == layout.vectors(h).shape[-1]


def test_shapes():
    rows, tokens, maps = (torch.zeros(shape) for shape in SHAPES)
    for sharing in ("auto", "none", "position", "grid"):
        assert Layout(sharing).vectors(rows).shape == (2, 1, 3)
        assert Layout(sharing).vectors(tokens).shape == ((2, 1, 12) if sharing == "none" else (2, 4, 3))
    assert Layout("auto").vectors(maps).shape == Layout("none").vectors(maps).shape == (2, 1, 3 * 8 * 6)
    assert Layout("position").vectors(maps).shape == (2, 8 * 6, 3)
    assert Layout("grid").vectors(maps).shape == (2, 4, 3 * 4 * 3)  # cells of 2 x 2: 3 divides 6, 4 does not


def test_a_position_is_the_vector_of_its_channels():
    maps = torch.randn(2, 3, 4, 5)
    vectors = Layout("position").vectors(maps)
    assert torch.equal(vectors[1, 2 * 5 + 3], maps[1, :, 2, 3])
    assert torch.equal(Layout("position", channels_last=True).vectors(maps.permute(0, 2, 3, 1)), vectors)


def test_a_volume_is_a_stack_of_maps():
    h = torch.randn(VOLUME)
    vectors = Layout("position").vectors(h)
    assert torch.equal(vectors[1, (3 * 8 + 5) * 6 + 2], h[1, :, 3, 5, 2])
    assert torch.equal(Layout("position", channels_last=True).vectors(h.movedim(1, -1)), vectors)
    # Cells of 1 x 2 x 2: one slice, and of each slice the cells of the map.
    grid = Layout("grid").vectors(h)
    assert grid.shape == (2, 4, 3 * 4 * 4 * 3)
    of_maps = torch.stack([Layout("grid").vectors(h[:, :, k]).unflatten(2, (3, 4 * 3)) for k in range(4)], dim=3)
    assert torch.equal(grid.unflatten(2, (3, 4, 4 * 3)), of_maps)


def test_positions_of_one_cell_share_and_cells_do_not():
    rows = torch.arange(8).view(1, 1, 8, 1).expand(1, 1, 8, 8) // 2
    index = rows * 4 + torch.arange(8) // 2  # the cell that a position lies in
    vectors = Layout("grid").vectors(index)
    assert vectors.shape == (1, 4, 16)
    assert torch.equal(vectors, torch.arange(16).expand(1, 4, 16))


def test_an_odd_map_has_the_largest_grid_that_fits():
    assert Layout("grid").vectors(torch.zeros(1, 2, 7, 9)).shape == (1, 7 * 3, 2 * 3)


def test_errors_are_summed_where_positions_differ():
    e = torch.randn(2, 4, 3)
    assert align_positions(e, 4) is e
    assert torch.equal(align_positions(e, 9), e.sum(1, keepdim=True))


def test_an_error_at_one_position_goes_to_the_others_as_a_mean_over_what_is_no_padding():
    e = torch.zeros(2, 4, 3)
    e[:, 1] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    padding = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    sent = Pairing(spread=True, padding=padding).align(e, 4)
    assert torch.equal(sent[0], torch.stack([e[0, 1] / 2, 1.5 * e[0, 1], 0 * e[0, 1], 0 * e[0, 1]]))
    assert torch.equal(sent[1], torch.stack([e[1, 1] / 4, 1.25 * e[1, 1], e[1, 1] / 4, e[1, 1] / 4]))
    assert torch.equal(Pairing(spread=True).align(e, 4)[0, 0], e[0, 1] / 4)
    assert torch.equal(Pairing(spread=True).align(e[:, :1], 4), e[:, :1])  # logits of a sample
