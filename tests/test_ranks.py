"""What processes that train together tell one another."""

from __future__ import annotations

import torch

from rank_runs import gathered_rows, run_ranks
from tercet.ranks import Ranks, Spread


def test_rows_of_unequal_ranks_are_gathered_with_their_gradients() -> None:
    results = run_ranks(3, gathered_rows, [2, 0, 1])
    for rank, (result, own) in enumerate(zip(results, ([0, 1], [], [2]), strict=True)):
        assert result["everyone"] == [[1.0, 1.0], [1.0, 1.0], [3.0, 3.0]]
        # Row i counts i times the rank's number plus one on each of three ranks.
        assert result["gradient"] == [[6.0 * row, 6.0 * row] for row in own]
        assert result["flags"] == [[True] * 3] * 3
        assert (result["start"], result["mean"]) == ((0, 2, 2)[rank], 1.0)
        assert result["cards"] == ["0.0", "2.0", "0.1"]
        assert result["any"] == [True, False]


def test_one_process_alone_is_a_group_of_one() -> None:
    ranks, spread = Ranks(), Spread((4,))
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    rows = torch.randn(4, 3)
    assert spread.gather(rows) is rows and spread.rows == slice(0, 4) and spread.mean == spread.total == 4
    assert ranks.gather("here") == ["here"] and ranks.gather_in_turn([1, 2]) == [1, 2]
    assert ranks.by_first(lambda: 7) == 7 and ranks.any(True) and not ranks.any(False)
    assert torch.equal(ranks.gather_numbers(torch.tensor([5, 6])), torch.tensor([[5, 6]]))
