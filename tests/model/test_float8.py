import torch
from fixtures.dit_samples import random_model, random_sample
from torch import nn

from loomvideo.model.config import DiTConfig
from loomvideo.model.float8 import Float8Linear, float8_blocks
from loomvideo.model.packing import pack

CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, in_channels=4, mllm_dim=12, freq_dim=16
)


@torch.no_grad()
def test_a_layer_is_near_its_exact_one():
    torch.manual_seed(0)
    linear = nn.Linear(96, 48)
    linear.weight *= torch.logspace(-3, 3, 48)[:, None]  # channels of very different size keep their own scale
    x = torch.randn(20, 96) * torch.logspace(-3, 3, 20)[:, None]
    exact, got = linear(x), Float8Linear(linear)(x)
    assert got.dtype == x.dtype
    sizes = x.norm(dim=1)[:, None] * linear.weight.norm(dim=1)
    assert ((got - exact) / sizes).abs().max() < 0.02
    zero = Float8Linear(linear)(torch.zeros(3, 96))
    torch.testing.assert_close(zero, linear.bias.expand(3, -1))


@torch.no_grad()
def test_a_model_of_them_shares_the_rest_and_leaves_the_exact_one():
    model = random_model(CONFIG)
    batch = pack([random_sample(CONFIG, (2, 4, 6), 7, references=((2, 4),), source=True)])
    before = model(batch)
    twin = float8_blocks(model)
    got = twin(batch)
    assert 0 < (got - before).square().mean() / before.square().mean() < 0.01
    torch.testing.assert_close(model(batch), before)
    assert twin.patch_embedding.weight is model.patch_embedding.weight
    linears = [module for module in twin.blocks.modules() if isinstance(module, nn.Linear)]
    assert not linears
    exact = sum(parameter.nbytes for parameter in model.blocks.parameters())
    stored = [*twin.blocks.parameters(), *twin.blocks.buffers()]
    assert sum(tensor.nbytes for tensor in stored) < 0.4 * exact
