"""Generations to compare between one rank and several; ranks import this by name, as they cannot a test module."""

import pytest
from fixtures.dit_samples import random_model, random_sample

from loomvideo.model.config import DiTConfig
from loomvideo.model.guidance import FULL, UNCONDITIONAL, VISUAL, Guidance
from loomvideo.model.parallel import Ranks
from loomvideo.model.sampler import Branch, sample
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.platform.errors import UserError

CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=4, attention_head_dim=16, ffn_dim=48, in_channels=4, mllm_dim=12, freq_dim=16
)
GUIDANCE = Guidance(2.5, 1.5)
# References of 2 and 6 tokens beside 12 of the video: no sequence divides evenly, and one rank holds no video token
# of the last branch's end.
REFERENCES = ((2, 4), (4, 6))
CASES = [
    {"references": references, "batch_branches": batch, "shortcuts": shortcuts}
    for references in ((), REFERENCES)
    for batch in (False, True)
    for shortcuts in (Shortcuts(), Shortcuts(branch_refresh=2, step_cache=0.3, guidance_to=0.5))
]


def generate(references, batch_branches, shortcuts, ranks=None):
    full = random_sample(CONFIG, (2, 4, 6), 7, references=references, source=True, seed=1)
    visual, empty = (random_sample(CONFIG, (2, 4, 6), tokens, seed=tokens) for tokens in (5, 3))
    branches = {
        FULL: Branch(full.mllm_states, full.source, full.references),
        VISUAL: Branch(visual.mllm_states, full.source, full.references),
        UNCONDITIONAL: Branch(empty.mllm_states),
    }
    model = random_model(CONFIG)
    return sample(
        model,
        full.latents,
        branches,
        GUIDANCE,
        5,
        batch_branches=batch_branches,
        shortcuts=shortcuts,
        ranks=ranks,
    )


def generate_on_a_rank(rank, sequences):
    by_sequence = {}
    for sequence in sequences:
        ranks = Ranks.split(sequence)
        by_sequence[sequence] = [generate(**case, ranks=ranks).numpy() for case in CASES]
    with pytest.raises(UserError, match="must divide the 2 ranks"):
        Ranks.split(3)
    return by_sequence


def both_at_once(rank):
    return [generate(**case, ranks=Ranks.split(2)).numpy() for case in CASES[:1]]
