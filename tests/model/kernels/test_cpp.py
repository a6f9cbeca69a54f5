"""The C++ back end against the definition, forward and backward."""

import pytest
import torch
from fixtures.kernel_fuzz import random_calls
from torch.autograd import gradcheck

from loomvideo.model import kernels
from loomvideo.model.kernels import backends, cpp, eager
from loomvideo.model.kernels.fused import OPERATIONS
from loomvideo.model.kernels.selfcheck import (
    TOLERANCE,
    disagreement,
    example_arguments,
    relative_error,
    results_and_gradients,
)

pytestmark = pytest.mark.skipif(cpp.cpp_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def operations():
    return backends.load_operations("cpp")


@pytest.fixture(params=[2, 3, 4], ids=["baseline", "avx2", "avx512"])
def isa(request):
    if cpp.isa_level(4) < request.param:
        pytest.skip(f"this processor has no x86-64-v{request.param}")
    cpp.isa_level(request.param)
    yield request.param
    cpp.isa_level(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_with_the_definition_on_every_instruction_set(operations, isa, name, dtype):
    for width in (24, 30, 256):  # 30: the vector loops' remainders
        assert disagreement(getattr(operations, name), name, dtype, "cpu", width) is None


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_dtypes_strides_and_segments(operations, isa, seed):
    for case, name, arguments, keywords in random_calls(48, (torch.float32, torch.bfloat16), 90, 150, seed):
        values = results_and_gradients(getattr(operations, name), arguments, keywords)
        references = results_and_gradients(getattr(eager, name), arguments, keywords)
        for value, reference in zip(values, references, strict=True):
            assert relative_error(value, reference) <= TOLERANCE[arguments[0].dtype], case


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_in_float64(operations, name):
    arguments, keywords = example_arguments(name, 12, torch.float64, "cpu", tokens=5)
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*leaves):
        replaced = iter(leaves)
        merged = [next(replaced) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in arguments]
        return getattr(operations, name)(*merged, **keywords)

    assert gradcheck(function, inputs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_custom_ops_are_registered_soundly(operations, name):
    """Schema, shape function and autograd registration, by torch's own checker."""
    arguments, keywords = example_arguments(name, 24, torch.float32, "cpu")
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "loomvideo":
                calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Recorder():
        results_and_gradients(getattr(operations, name), arguments, keywords)
    assert calls
    for function, args, kwargs in calls:
        floats = [a.requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args]
        if "backward" in function._schema.name:  # the backward ops are not differentiated again
            torch.library.opcheck(function, args, kwargs, test_utils=("test_schema", "test_faketensor"))
        else:
            torch.library.opcheck(function, tuple(floats), kwargs, test_utils=("test_schema", "test_faketensor"))
            torch.library.opcheck(function, tuple(floats), kwargs, test_utils="test_autograd_registration")


@pytest.mark.parametrize("round_norm", [True, False])
def test_both_rounding_modes_of_the_norm(operations, round_norm):
    arguments, _ = example_arguments("qk_norm_rope", 768, torch.bfloat16, "cpu")
    got = operations.qk_norm_rope(*arguments, round_norm=round_norm)
    expected = eager.qk_norm_rope(*arguments, round_norm=round_norm)
    other = eager.qk_norm_rope(*arguments, round_norm=not round_norm)
    for one, two, three in zip(got, expected, other, strict=True):
        # Same mode: only the order of a sum differs, which flips few roundings. Other mode: many.
        flips, other_flips = (one != two).float().mean(), (one != three).float().mean()
        assert flips < 0.01 < 0.05 < other_flips


def test_rows_may_be_strided_and_columns_need_a_copy(operations):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(9, 3 * 24, generator=generator)
    q, k, _ = fused.chunk(3, dim=1)
    positions = torch.zeros(9, 3, dtype=torch.int32)
    arguments = (torch.ones(24), torch.ones(24), positions, 2, 1e-6)
    got = operations.qk_norm_rope(q, k, *arguments)
    transposed = [t.T.contiguous().T for t in (q, k)]
    assert transposed[0].stride() == (1, 9)
    again = operations.qk_norm_rope(*transposed, *arguments)
    for value, same, reference in zip(got, again, eager.qk_norm_rope(q, k, *arguments), strict=True):
        torch.testing.assert_close(value, reference)
        assert torch.equal(value, same)
    x = torch.randn(24, 9, generator=generator).T
    gate, rows = torch.randn(2, 24, generator=generator), torch.tensor([0, 1] * 4 + [1])
    expanded = torch.randn(1, 24, generator=generator).expand(9, 24)
    torch.testing.assert_close(
        operations.gated_residual(x, expanded, gate, rows), eager.gated_residual(x, expanded, gate, rows)
    )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "modulated"])
def test_residual_norm_in_each_of_its_forms(operations, gated, affine):
    (x, y, gate, shift, scale, rows, eps), _ = example_arguments("residual_norm", 40, torch.float32, "cpu")
    if affine:
        shift, scale = shift[0].detach().requires_grad_(), scale[0].detach().requires_grad_()
    call = (x, y, gate if gated else None, shift, scale, rows, eps), {"affine": affine}
    values = results_and_gradients(operations.residual_norm, *call)
    for value, reference in zip(values, results_and_gradients(eager.residual_norm, *call), strict=True):
        assert relative_error(value, reference) < TOLERANCE[torch.float32]


def test_unsorted_rows_no_tokens_and_one_token(operations):
    generator = torch.Generator().manual_seed(0)
    shift, scale = (torch.randn(5, 16, generator=generator, requires_grad=True) for _ in range(2))
    for tokens in (0, 1, 200):
        x = torch.randn(tokens, 16, generator=generator, requires_grad=True)
        rows = torch.randint(0, 5, (tokens,), generator=generator).int()
        call = (x, shift, scale, rows, 1e-6), {}
        values = results_and_gradients(operations.layer_norm_modulate, *call)
        references = results_and_gradients(eager.layer_norm_modulate, *call)
        for value, reference in zip(values, references, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads(operations):
    arguments, keywords = example_arguments("residual_norm", 64, torch.float32, "cpu", tokens=500)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(results_and_gradients(operations.residual_norm, arguments, keywords))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_source_scale_keeps_more_than_bfloat16(operations):
    """t * bias alone (no source): with t cut to 8 bits the error would be 4e-3."""
    scale = torch.tensor([0.7531])
    weights = [torch.zeros(1, 8), torch.zeros(1), torch.zeros(1, 8), torch.full((1,), 128.0)]
    arguments = [torch.zeros(1, 8), torch.zeros(1, 8)], [w.bfloat16() for w in weights]
    rows = torch.zeros(1, dtype=torch.int32)
    out = operations.scale_and_add(*[a.bfloat16() for a in arguments[0]], scale, rows, *arguments[1])
    assert out.item() == torch.tensor(0.7531 * 128).bfloat16().item()


def test_nan_and_infinity_are_not_hidden(operations):
    x = torch.zeros(3, 16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        out = operations.layer_norm_modulate(
            x.to(dtype), torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(3, dtype=torch.int32), 1e-6
        )
        assert out[0].isnan().all()
        assert out[1].isnan().all()
        assert not out[2].isnan().any()
    big = torch.full((1, 16), torch.finfo(torch.float32).max)
    out = operations.gated_residual(big.bfloat16(), big.bfloat16(), torch.ones(1, 16), torch.zeros(1))
    assert out.isinf().all()


def test_bad_indices_raise(operations):
    x = torch.randn(2, 24)
    with pytest.raises(IndexError, match="row id"):
        operations.gated_residual(x, x, torch.ones(1, 24), torch.tensor([0, 1]))
    positions = torch.tensor([[0, 0, 0], [0, 1024, 0]])
    with pytest.raises(IndexError, match="limit 1023"):
        operations.qk_norm_rope(x, x, torch.ones(24), torch.ones(24), positions, 1, 1e-6)
    with pytest.raises(ValueError, match="position 1024"):
        kernels.check_positions(positions)


@pytest.mark.slow
def test_torch_compile_sees_one_graph(operations):
    """fullgraph: the custom ops cause no graph break, forward or backward."""
    (x, y, gate, shift, scale, rows, eps), _ = example_arguments("residual_norm", 64, torch.float32, "cpu")

    def block(x, y):
        hidden, normed = kernels.residual_norm(x, torch.tanh(y), gate, shift, scale, rows, eps)
        return (hidden * normed).sum()

    with kernels.use_backend("cpp"):
        expected = torch.autograd.grad(block(x, y), (x, y))
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(x, y), (x, y))
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_activation_checkpointing_recomputes_the_same_values(operations):
    (x, shift, scale, rows, eps), _ = example_arguments("layer_norm_modulate", 64, torch.float32, "cpu")
    with kernels.use_backend("cpp"):
        call = kernels.layer_norm_modulate
        plain = torch.autograd.grad(call(x, shift, scale, rows, eps).square().sum(), (x, shift, scale))
        kept = torch.utils.checkpoint.checkpoint(call, x, shift, scale, rows, eps, use_reentrant=False)
        recomputed = torch.autograd.grad(kept.square().sum(), (x, shift, scale))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
