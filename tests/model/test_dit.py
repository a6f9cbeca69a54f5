"""The packed transformer against diffusers' Wan and a dense reimplementation, its counts and its modes."""

import dataclasses

import diffusers
import pytest
import torch
from fixtures.dense_dit import dense_loss, dense_velocity
from fixtures.dit_samples import random_model, random_sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loomvideo.model import kernels
from loomvideo.model.config import DiTConfig
from loomvideo.model.dit import CHECKPOINTING, LoomVideoDiT
from loomvideo.model.flops import pack_flops, sequence_flops
from loomvideo.model.kernels import cpp_build
from loomvideo.model.packing import pack
from loomvideo.model.sizes import SIZES, model_size
from loomvideo.platform.errors import UserError

needs_compiler = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=20, ffn_dim=48, in_channels=4, mllm_dim=12, freq_dim=16
)


@pytest.fixture(autouse=True)
def eager_kernels():
    """The definition, whatever back end a job's test has left chosen."""
    with kernels.use_backend("eager"):
        yield


def mixed_samples(config=CONFIG, dtype=torch.float32):
    """Text to video, image edit, edit with references of other sizes, images to video."""
    return [
        random_sample(config, (3, 4, 6), 5, seed=1, dtype=dtype),
        random_sample(config, (1, 6, 4), 9, source=True, seed=2, dtype=dtype),
        random_sample(config, (2, 4, 4), 7, references=[(2, 6)], source=True, seed=3, dtype=dtype),
        random_sample(config, (2, 2, 2), 1, references=[(2, 4), (4, 2), (2, 2)], seed=4, dtype=dtype),
    ]


@pytest.mark.parametrize("use_source_embedding", [True, False])
def test_packed_velocities_equal_dense_ones(use_source_embedding):
    config = dataclasses.replace(CONFIG, use_source_embedding=use_source_embedding)
    model, samples = random_model(config), mixed_samples()
    batch = pack(samples)
    with torch.no_grad():
        velocities = batch.unpack(model(batch))
        for velocity, sample in zip(velocities, samples, strict=True):
            expected = dense_velocity(model.state_dict(), config, sample)
            torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_source_embedding", [True, False])
def test_gradients_equal_dense_ones_in_float64(use_source_embedding):
    config = dataclasses.replace(CONFIG, use_source_embedding=use_source_embedding)
    model, samples = random_model(config, torch.float64), mixed_samples(dtype=torch.float64)
    targets = [torch.randn_like(sample.latents) for sample in samples]
    batch = pack(samples)
    batch.source_scale = batch.source_scale.double()
    with torch.no_grad():  # scales and timesteps are fp32 in a pack: compare at the values they have there
        for sample, t, scale in zip(samples, batch.timesteps.tolist(), batch.source_scale.tolist(), strict=True):
            sample.timestep, sample.source_scale = t, scale
    loss = (model(batch) - batch.pack_targets(targets)).square().sum()
    loss.backward()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = dense_loss(weights, config, samples, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: n + m
        )


def test_blocks_agree_with_wan():
    """Without Scale-and-Add and with the text cross-attention fed alike, the function is Wan's."""
    config = dataclasses.replace(CONFIG, attention_head_dim=24, use_source_embedding=False)
    torch.manual_seed(0)
    wan = diffusers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.mllm_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()
    model = LoomVideoDiT(config)
    missing = model.load_state_dict(wan.state_dict(), strict=False).missing_keys
    assert all(name.startswith("mllm_embedder.") for name in missing)
    # Both embedders pass the context through: Wan's is replaced, ours is fed by every layer alike.
    wan.condition_embedder.text_embedder = torch.nn.Identity()
    model.mllm_embedder = torch.nn.Identity()
    context = torch.randn(9, config.inner_dim)
    sample = random_sample(config, (3, 6, 4), 9)
    sample.mllm_states = context.expand(config.num_layers, -1, -1)
    batch = pack([sample])
    with torch.no_grad():
        (velocity,) = batch.unpack(model(batch))
        expected = wan(sample.latents[None], torch.tensor([sample.timestep]), context[None], return_dict=False)[0][0]
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


def test_samples_do_not_see_each_other():
    model, samples = random_model(CONFIG), mixed_samples()
    batch = pack(samples)
    with torch.no_grad():
        together = batch.unpack(model(batch))
        samples[1] = random_sample(CONFIG, (1, 6, 4), 9, source=True, seed=99)
        changed = pack(samples).unpack(model(pack(samples)))
    for index, (first, second) in enumerate(zip(together, changed, strict=True)):
        assert torch.allclose(first, second, atol=1e-5) == (index != 1)


def test_source_bias_counts_without_a_source():
    model = random_model(CONFIG)
    sample = mixed_samples()[0]
    with torch.no_grad():
        batch = pack([sample])
        before = model(batch)
        model.source_patch_embedding.bias.zero_()
        assert not torch.allclose(model(batch), before, atol=1e-4)


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_activation_checkpointing_keeps_gradients(mode):
    model, batch = random_model(CONFIG), pack(mixed_samples())
    gradients = []
    for chosen in ("none", mode):
        model.set_activation_checkpointing(chosen)
        model.zero_grad()
        model(batch).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, gradient in zip(*gradients, strict=True):
        assert torch.equal(expected, gradient)


@needs_compiler
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_fused_kernels_are_checked_outside_activation_checkpointing(mode):
    """Their first call compares them with the definition, whose tensors are not the model's."""
    model, batch = random_model(CONFIG), pack(mixed_samples())
    model(batch).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_activation_checkpointing(mode)
    with kernels.use_backend("cpp"):
        model(batch).square().sum().backward()
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@needs_compiler
def test_fused_kernels_start_in_inference_mode():
    model, batch = random_model(CONFIG), pack(mixed_samples())
    with torch.inference_mode():
        expected = model(batch)
        with kernels.use_backend("cpp"):
            torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_orders_work():
    model, batch = random_model(CONFIG), pack(mixed_samples())
    operations = []
    for mode in CHECKPOINTING:
        model.set_activation_checkpointing(mode)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch).square().sum().backward()
        operations.append(counter.get_total_flops())
    assert operations[0] < operations[1] < operations[2]


def test_unknown_checkpointing_is_named():
    with pytest.raises(UserError, match="activation_checkpointing=some"):
        LoomVideoDiT(CONFIG).set_activation_checkpointing("some")


@pytest.mark.parametrize("use_source_embedding", [True, False])
def test_operations_are_counted_exactly(use_source_embedding):
    config = dataclasses.replace(CONFIG, use_source_embedding=use_source_embedding)
    model, batch = random_model(config), pack(mixed_samples())
    expected = pack_flops(config, batch)
    # The math kernel is the one whose backward recomputes nothing; the eager operations hide no matrix product.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(batch)
        assert counter.get_total_flops() == expected.forward
        output.sum().backward()
    assert counter.get_total_flops() == expected.total


def test_5b_operations_match_the_known_figure():
    """A 9,750-token edit with 780 MLLM tokens: 128 TFLOP forward."""
    assert sequence_flops(model_size("5b").dit, [9750], [780]).forward == pytest.approx(128e12, rel=0.02)


@pytest.mark.parametrize("use_source_embedding", [True, False])
def test_parameters_are_used_inside_their_own_module(use_source_embedding):
    """ZeRO-3's rule: with every parameter empty but while its module's ``forward`` runs, nothing changes."""
    model = random_model(dataclasses.replace(CONFIG, use_source_embedding=use_source_embedding))
    batch = pack(mixed_samples())
    whole = {parameter: parameter.data for parameter in model.parameters()}
    with torch.no_grad():
        expected = model(batch)

    def gather(module, _):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter].new_empty(0)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        assert torch.equal(model(batch), expected)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_blocks_compile_to_one_graph():
    """Blocks and the embedder: compiled once, and once more with dynamic lengths; never again, without a break."""
    model, num_compiled = random_model(dataclasses.replace(CONFIG, num_layers=10)), 0

    def count(graph, _):
        nonlocal num_compiled
        num_compiled += 1
        return graph

    batches = [
        pack([random_sample(model.config, (1 + n, 4, 6), 5 + n), random_sample(model.config, (1, 4, 4 + 2 * n), 2)])
        for n in range(3)
    ]
    expected = [model(batch) for batch in batches]
    model.set_activation_checkpointing("full")
    torch._dynamo.reset()
    model.compile_blocks(backend=count, fullgraph=True)
    for batch, velocity in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(batch), velocity)
    assert num_compiled == 4
    model.run_blocks_eagerly()
    torch.testing.assert_close(model(batches[0]), expected[0])
    assert num_compiled == 4


@pytest.mark.gpu
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_step_never_waits_for_the_device(mode):
    config = dataclasses.replace(CONFIG, attention_head_dim=32)  # flash attention takes multiples of 8
    model = random_model(config).to("cuda", torch.bfloat16)
    model.set_activation_checkpointing(mode)
    batch = pack(mixed_samples(config)).to("cuda", torch.bfloat16)
    model(batch).square().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_hoisted_conditioning_changes_nothing():
    model, batch = random_model(CONFIG), pack(mixed_samples())
    with torch.no_grad():
        contexts = model.keys_values(batch.mllm_states)
        time = model.embed_time(batch.timesteps, torch.float32)
        torch.testing.assert_close(model(batch, contexts=contexts, time=time), model(batch), rtol=1e-5, atol=1e-6)


def test_bfloat16_follows_float32():
    model, batch = random_model(CONFIG), pack(mixed_samples())
    with torch.no_grad():
        expected = model(batch)
        velocity = model.bfloat16()(batch.to(dtype=torch.bfloat16))
    assert velocity.dtype == torch.bfloat16
    error = (velocity.float() - expected).square().mean() / expected.square().mean()
    assert error < 2e-4


@pytest.mark.parametrize("name", SIZES)
def test_presets_fit_together(name):
    sizes = model_size(name)
    assert sizes.dit.num_layers <= sizes.mllm.num_hidden_layers
    assert sizes.dit.mllm_dim == sizes.mllm.hidden_size
    assert sizes.dit.in_channels == sizes.codec.latent_channels
    assert DiTConfig.from_dict(sizes.dit.to_dict()) == sizes.dit


def test_unknown_preset_is_named():
    with pytest.raises(UserError, match="model=huge"):
        model_size("huge")


def test_what_a_wan_checkpoint_lacks_starts_without_effect():
    """Neither the conditioning nor the source changes Wan's function before training."""
    model = LoomVideoDiT(CONFIG)
    model.init_weights([name for name, _ in model.named_parameters() if name.startswith(("source_", "mllm_"))])
    torch.nn.init.normal_(model.proj_out.weight)
    sample = mixed_samples()[1]
    with torch.no_grad():
        before = model(pack([sample]))
        changed = dataclasses.replace(sample, source=None, mllm_states=-sample.mllm_states)
        assert torch.equal(model(pack([changed])), before)
