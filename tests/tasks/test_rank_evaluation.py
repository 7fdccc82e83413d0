"""An evaluation shared out over ranks gives what one rank gives, sample by sample."""

from __future__ import annotations

from rank_runs import evaluations, run_ranks

TASKS = ["retrieval", "embedding", "entailment", "nlvr", "vqa", "grounding", "nlvr_pretrain"]


def test_ranks_merge_unequal_parts_to_the_numbers_of_one() -> None:
    alone = run_ranks(1, evaluations, TASKS)[0]
    assert alone["retrieval"]["sizes"]["images"] == 7 and "reranked" in alone["retrieval"]["metrics"]
    for together in run_ranks(2, evaluations, TASKS):
        for task in TASKS:
            assert together[task] == alone[task], task
