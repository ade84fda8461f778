"""Spatially aligned attention against its definition, on any grid, window and number of prefix tokens."""

import pytest
import torch

from prompttune.errors import UsageError
from prompttune.layers.aligned_attention import AlignedAttention, window_mask, window_neighbours
from tests.equations import aligned_attention_reference

GRIDS = [(1, 1), (4, 4), (3, 5), (7, 2)]


def heads(grid: tuple[int, int], prefix: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens = prefix + grid[0] * grid[1]
    return tuple(torch.randn(2, 3, tokens, 8, generator=generator) * 2 for _ in range(3))


@pytest.mark.parametrize("implementation", ["masked", "gathered"])
@pytest.mark.parametrize("window", [1, 3, 5, 9, None])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", GRIDS)
def test_matches_the_definition(grid, prefix, window, implementation):
    q, k, v = heads(grid, prefix)
    attention = AlignedAttention(grid, prefix, window, implementation)
    expected = aligned_attention_reference(q, k, v, grid, prefix, window)
    torch.testing.assert_close(attention(q, k, v), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["masked", "gathered"])
def test_hidden_patches_have_exactly_no_influence(implementation):
    grid, prefix = (5, 5), 1
    q, k, v = heads(grid, prefix)
    attention = AlignedAttention(grid, prefix, 3, implementation)
    before = attention(q, k, v)
    far = prefix + 24  # the last corner, outside the window of the first
    k, v = k.clone(), v.clone()
    k[:, :, far], v[:, :, far] = 50.0, 50.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :, prefix], after[:, :, prefix])
    assert not torch.equal(before[:, :, 0], after[:, :, 0]), "the prefix query sees every token"


def test_a_corner_sees_the_part_of_its_window_that_lies_inside():
    index, inside = window_neighbours((3, 4), 3)
    assert index[0][inside[0]].tolist() == [0, 1, 4, 5]
    assert index[11][inside[11]].tolist() == [6, 7, 10, 11]
    assert int(inside[5].sum()) == 9


def test_mask_is_finite_in_half_precision():
    assert torch.isfinite(window_mask((4, 4), 1, 3).half()).all()


@pytest.mark.parametrize(("side", "window", "masked"), [(24, 3, True), (27, 3, False), (27, 5, True), (37, 7, True)])
def test_the_way_follows_grid_and_window(side, window, masked):
    assert AlignedAttention((side, side), 1, window).masked is masked


@pytest.mark.parametrize("window", [0, 2, -3])
def test_a_window_without_a_centre_is_refused(window):
    with pytest.raises(UsageError, match="odd"):
        AlignedAttention((4, 4), 1, window)
