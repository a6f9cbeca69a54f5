"""One generation on several ranks: branches spread over them, tokens divided between them, and both."""

import pytest
import torch
from helpers.parallel_generation import CASES, both_at_once, generate, generate_on_a_rank
from helpers.ranks import run_ranks


def test_two_ranks_give_what_one_gives():
    alone = [generate(**case) for case in CASES]
    for by_sequence in run_ranks(generate_on_a_rank, 2, (1, 2)):
        for results in by_sequence.values():
            for case, expected, got in zip(CASES, alone, results, strict=True):
                # A batched group is skipped or not as a whole; divided among ranks, each branch is judged alone.
                if case["batch_branches"] and case["shortcuts"].step_cache and results is by_sequence[1]:
                    continue
                torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4, msg=str(case))


@pytest.mark.slow
def test_branches_and_tokens_over_four_ranks():
    expected = generate(**CASES[0])
    for (got,) in run_ranks(both_at_once, 4):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)
