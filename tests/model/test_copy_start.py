"""The start that copies: what the first velocity is made of, and that it points from noise to the source."""

import dataclasses

import pytest
import torch

from loomvideo.model.copy_start import start_as_copy
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flow import noised_and_target
from loomvideo.model.packing import DiTSample, pack
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError

SMALL = dataclasses.replace(
    model_size("tiny").dit,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    ffn_dim=64,
    in_channels=6,
    out_channels=6,
)


def made(config, copies):
    torch.manual_seed(0)
    model = LoomVideoDiT(config).eval()
    if copies:
        start_as_copy(model, torch.Generator().manual_seed(1))
    return model


def error(model, t, other=0.0, source=True):
    """Mean squared error of the velocity of an unchanged source, or of one with a share of other latents."""
    config, random = model.config, torch.Generator().manual_seed(2)
    clean, noise, change = (torch.randn(config.in_channels, 2, 4, 6, generator=random) for _ in range(3))
    noised, target = noised_and_target(clean + other * change, noise, t)
    states = torch.randn(config.num_layers, 5, config.mllm_dim, generator=random)
    batch = pack([DiTSample(noised, 1000 * t, states, clean if source else None, t)], config.patch_size)
    with torch.no_grad():
        return (model(batch) - batch.pack_targets([target])).square().mean().item()


@pytest.mark.parametrize("config", [SMALL, model_size("tiny").dit], ids=["small", "tiny"])
def test_the_first_velocity_copies_the_source(config):
    start, random = made(config, copies=True), made(config, copies=False)
    for t, share in ((0.5, 0.7), (0.8, 0.15), (0.95, 0.05)):
        assert error(start, t) < share * error(random, t)
    # Under much noise next to nothing of it stays, whatever the timestep: gains do not tremble.
    for t in (0.85, 0.9, 0.951, 0.977, 0.999):
        assert error(start, t) < 0.01
    assert error(start, 0.8) < error(start, 0.8, source=False)


def test_every_weight_gets_a_gradient_soon():
    model = made(SMALL, copies=True).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        latents, source = (torch.randn(6, 1, 4, 4, generator=generator) for _ in range(2))
        reference = torch.randn(6, 1, 2, 2, generator=generator)
        states = torch.randn(2, 5, SMALL.mllm_dim, generator=generator)
        batch = pack([DiTSample(latents, 500.0, states, source, 0.5, (reference,))], SMALL.patch_size)
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_a_model_without_room_for_a_source_is_refused():
    narrow = dataclasses.replace(SMALL, in_channels=64, out_channels=64)
    with pytest.raises(UserError, match="no room for two patches of 64"):
        start_as_copy(LoomVideoDiT(narrow))
