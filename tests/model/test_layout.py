"""Taking a module apart and building it again around a flat vector.

    n  trainable values      m  values of the buffers
"""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import blueprint, layout, read_buffers, write_buffers


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


class Tied(nn.Module):
    """The usual language model: one table for input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def build(module: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """The module rebuilt around a flat vector, the vector, and the flat gradient."""
    made, weights, buffers, constants = blueprint(module)
    gradient = torch.zeros_like(weights)
    new = made.build(weights, constants, gradient)
    write_buffers(new, made.layout, buffers)
    return new, weights, gradient


def inside(x: Tensor, flat: Tensor) -> bool:
    """Whether x lies in the memory of flat."""
    return flat.data_ptr() <= x.data_ptr() and x.data_ptr() + x.nbytes <= flat.data_ptr() + flat.nbytes


def test_parameters_and_gradients_are_views_into_the_flat_vectors() -> None:
    module, weights, gradient = build(net())
    for p in module.parameters():
        assert inside(p, weights) and inside(p.grad, gradient)
    weights.fill_(3.0)
    assert all(bool((p == 3.0).all()) for p in module.parameters())


def test_spans_tile_the_vector_in_the_order_of_the_parameters() -> None:
    module = net()
    found = layout(module)
    assert [span.name for span in found.parameters] == [name for name, _ in module.named_parameters()]
    edges = [(span.start, span.stop) for span in found.parameters]
    assert edges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(edges))
    assert found.n == edges[-1][1] == sum(p.numel() for p in module.parameters())
    assert found.m == 4 + 4 + 1


def test_a_rebuilt_module_computes_what_the_first_one_does() -> None:
    module = net()
    new, _, gradient = build(module)
    x = torch.randn(6, 3, 8, 8)
    module(x).square().sum().backward()
    found = new(x)
    found.square().sum().backward()
    torch.testing.assert_close(gradient, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))
    assert all(inside(p.grad, gradient) for p in new.parameters())  # backward did not put its own tensors there


def test_a_user_finds_his_module_as_he_left_it() -> None:
    module = net()
    module[4].bias.requires_grad_(False)
    before, state = list(module.parameters()), copy.deepcopy(module.state_dict())
    module[0].weight.grad = torch.ones_like(module[0].weight)
    module.eval()
    new, weights, _ = build(module)
    weights.zero_()
    new.train()(torch.randn(6, 3, 8, 8))
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert all(torch.equal(state[name], x) for name, x in module.state_dict().items())
    assert not module.training and module[0].weight.grad.sum() == module[0].weight.numel()


def test_a_blueprint_is_small_whatever_the_size_of_the_module() -> None:
    big = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000))
    big[1].weight.requires_grad_(False)
    made, weights, _, constants = blueprint(big)
    assert weights.numel() == 1_002_000 and constants["1.weight"].shape == (1000, 1000)
    assert len(pickle.dumps(made)) < 10_000
    assert sum(p.numel() for p in made.skeleton.parameters()) == 0


def test_a_blueprint_travels() -> None:
    made, weights, _, constants = blueprint(net())
    again = pickle.loads(pickle.dumps(made))
    assert again.layout == made.layout
    x = torch.randn(2, 3, 8, 8)
    one, other = made.build(weights, constants).eval(), again.build(weights, constants).eval()
    assert torch.equal(one(x), other(x))


def test_replicas_of_one_blueprint_share_weights_and_nothing_else() -> None:
    made, weights, _, constants = blueprint(net())
    one, other = made.build(weights, constants), made.build(weights, constants)
    one[1].running_mean.fill_(5.0)
    assert other[1].running_mean.sum() == 0 and one[0].weight.data_ptr() == other[0].weight.data_ptr()


def test_a_tied_weight_is_one_piece_and_stays_tied() -> None:
    module = Tied()
    new, weights, gradient = build(module)
    assert weights.numel() == 21 and new.head.weight is new.embed.weight
    x = torch.tensor([1, 4, 4])
    module(x).sum().backward()
    new(x).sum().backward()
    torch.testing.assert_close(gradient, module.embed.weight.grad.reshape(-1))


def test_frozen_parameters_are_constants_by_name_and_no_part_of_the_vector() -> None:
    module = net()
    for p in module[0].parameters():
        p.requires_grad_(False)
    made, weights, _, constants = blueprint(module)
    assert set(constants) == {"0.weight", "0.bias"} and weights.numel() == made.layout.n == 4 + 4 + 5 * 145
    new = made.build(weights, constants)
    assert torch.equal(new[0].weight, module[0].weight) and not new[0].weight.requires_grad
    assert new[0].weight.grad is None


def test_a_frozen_parameter_may_be_of_another_dtype() -> None:
    module = net()
    module[0].to(torch.float64)
    for p in module[0].parameters():
        p.requires_grad_(False)
    made, weights, _, constants = blueprint(module)
    assert made.build(weights, constants)[0].weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_vector_has_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    new, weights, gradient = build(net().to(dtype))
    assert weights.dtype == gradient.dtype == dtype == layout(new).dtype
    assert all(inside(p, weights) for p in new.parameters())


def test_parameters_of_two_dtypes_are_refused_with_both_and_the_way_out() -> None:
    module = net()
    module[4].to(torch.float64)
    with pytest.raises(RecipeError, match=r"torch\.float32 and torch\.float64.*module\.to\(dtype\)"):
        blueprint(module)


@pytest.mark.parametrize(
    "module",
    [nn.LazyLinear(3), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()), nn.Sequential(nn.LazyConv1d(3, 1))],
    ids=["linear", "batch norm", "conv"],
)
def test_a_lazy_module_is_refused_with_the_way_out(module: nn.Module) -> None:
    with pytest.raises(RecipeError, match="is not initialised yet: run one batch through the module"):
        blueprint(module)


def test_a_lazy_buffer_is_refused_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match="is not initialised yet: run one batch through the module"):
        blueprint(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["no parameters", "all frozen"])
def test_a_module_that_cannot_learn_is_refused(module: nn.Module) -> None:
    with pytest.raises(RecipeError, match="no trainable parameter"):
        blueprint(module)


def test_tensors_that_are_not_contiguous_or_have_no_dimensions_keep_their_values() -> None:
    module = nn.Module()
    module.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    module.scale = nn.Parameter(torch.tensor(7.0))
    module.image = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    new, weights, _ = build(module)
    assert weights[:7].tolist() == [0, 3, 1, 4, 2, 5, 7]
    for name, p in module.named_parameters():
        assert torch.equal(dict(new.named_parameters())[name], p) and dict(new.named_parameters())[name].shape == p.shape


def test_buffers_of_every_kind_go_round_and_are_exact() -> None:
    module = net()
    module[1].running_mean.copy_(torch.tensor([1 / 3, 1e-30, -2.5, 1e30]))
    module[1].num_batches_tracked.fill_(2**40 + 1)
    module.register_buffer("mask", torch.tensor([True, False]))
    module.register_buffer("third", torch.tensor([1 / 3], dtype=torch.bfloat16))
    module.register_buffer("hidden", torch.ones(2), persistent=False)
    module.register_buffer("absent", None)
    found, expected = layout(module), copy.deepcopy(dict(module.named_buffers()))
    values = read_buffers(module, found)
    assert values.dtype == torch.float64 and len(values) == found.m == 4 + 4 + 1 + 2 + 1 + 2
    for x in module.buffers():
        x.zero_()
    write_buffers(module, found, values)
    for name, x in module.named_buffers():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name])


def test_a_module_without_buffers_has_an_empty_vector_of_them() -> None:
    module = nn.Linear(2, 2)
    found = layout(module)
    assert found.m == 0 and read_buffers(module, found).shape == (0,)
    write_buffers(module, found, torch.empty(0, dtype=torch.float64))


def test_a_parametrised_module_can_be_rebuilt() -> None:
    torch.manual_seed(0)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    new, weights, _ = build(module)
    x = torch.randn(4, 3)
    assert torch.equal(new(x), module(x))
    weights.zero_()
    assert new(x).isnan().all() or new(x).abs().sum() == 0
