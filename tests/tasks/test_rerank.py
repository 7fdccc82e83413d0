"""Captions are grouped so that padding and passes together cost least."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tercet.tasks.rerank import group_by_length


def cost(lengths: list[int], groups: list[list[int]], pass_cost: int) -> int:
    return sum(len(group) * max(lengths[index] for index in group) + pass_cost for group in groups)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(0, 30))
def test_no_other_cuts_cost_less(lengths: list[int], pass_cost: int) -> None:
    groups = group_by_length(lengths, pass_cost)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(lengths)))
    distinct = sorted(set(lengths))
    others = []
    for cuts in itertools.product([False, True], repeat=max(0, len(distinct) - 1)):
        edges = [length for length, cut in zip(distinct[1:], cuts, strict=True) if cut]
        bins: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            bins.setdefault(sum(length >= edge for edge in edges), []).append(index)
        others.append(cost(lengths, list(bins.values()), pass_cost))
    assert cost(lengths, groups, pass_cost) == min(others)
