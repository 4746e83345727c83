"""One worker's copy of the module: gradients summed over rows, and mistakes told before they train nonsense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.loss import Squeezed, squeeze
from bigdl_lite.model.replica import Replica


def net(out: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, out))


def replica(module: nn.Module, loss: Any) -> Replica:
    made, weights, buffers, constants = blueprint(module)
    found = Replica(made, weights, torch.full_like(weights, 99.0), constants, loss)
    found.buffers = buffers
    return found


def rows(n: int, classes: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch((torch.randn(n, 5, generator=generator),), torch.randint(0, classes, (n,), generator=generator))


def plain(module: nn.Module, loss: Any, batch: Batch) -> tuple[Tensor, float]:
    """Sums over rows, by plain torch."""
    value = loss(module(*batch.inputs), batch.target) * batch.rows
    grads = torch.autograd.grad(value, [p for p in module.parameters() if p.requires_grad])
    return torch.cat([g.reshape(-1) for g in grads]), float(value.detach())


class Lambda(nn.Module):
    """A module whose output is whatever a function makes of its one linear layer."""

    def __init__(self, make: Any, out: int = 3) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(5, out), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


@pytest.mark.parametrize("b", [1, 2, 7])
def test_backward_gives_the_sums_over_the_rows(b: int) -> None:
    found = replica(net(), nn.CrossEntropyLoss())
    loss = found.backward(rows(b), seed=0)
    gradient, expected = plain(net(), nn.CrossEntropyLoss(), rows(b))
    torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-6)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_sums_over_parts_are_the_sum_over_the_whole() -> None:
    found, whole = replica(net(), nn.CrossEntropyLoss()), rows(10)
    total, loss = torch.zeros_like(found.gradient), 0.0
    for part in (torch.arange(3), torch.arange(0), torch.arange(3, 10)):
        loss += found.backward(whole.take(part), seed=0)
        total += found.gradient
    gradient, expected = plain(net(), nn.CrossEntropyLoss(), whole)
    torch.testing.assert_close(total, gradient, rtol=0, atol=1e-6)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_every_call_starts_from_zero_and_no_rows_leave_zero() -> None:
    found = replica(net(), nn.CrossEntropyLoss())
    found.backward(rows(4), seed=0)
    first = found.gradient.clone()
    found.backward(rows(4), seed=0)
    assert torch.equal(found.gradient, first)
    assert found.backward(rows(0), seed=0) == 0.0 and not found.gradient.any()


def test_a_parameter_that_forward_does_not_use_has_a_gradient_of_zero() -> None:
    module = net()
    module.register_parameter("idle", nn.Parameter(torch.ones(4)))
    found = replica(module, nn.CrossEntropyLoss())
    found.backward(rows(4), seed=0)
    where = next(span for span in found.layout.parameters if span.name == "idle")
    assert not where.view(found.gradient).any() and found.gradient.any()


def test_sparse_gradients_of_an_embedding_land_in_the_flat_vector() -> None:
    def module(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))

    batch = Batch((torch.tensor([[1, 2], [2, 2], [0, 8]]),), torch.tensor([0, 1, 2]))
    found, expected = replica(module(True), nn.CrossEntropyLoss()), replica(module(False), nn.CrossEntropyLoss())
    found.backward(batch, seed=0)
    expected.backward(batch, seed=0)
    torch.testing.assert_close(found.gradient, expected.gradient)


def test_random_numbers_depend_on_the_seed_alone() -> None:
    found = replica(nn.Sequential(nn.Linear(5, 50), nn.Dropout(), nn.Linear(50, 3)), nn.CrossEntropyLoss())
    losses = []
    for seed in (1, 2, 1):
        torch.rand(seed)
        losses.append(found.backward(rows(6), seed))
    assert losses[0] == losses[2] != losses[1]


def test_the_module_is_in_training_mode_even_if_the_users_was_not() -> None:
    assert replica(net().eval(), nn.CrossEntropyLoss()).module.training


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)], ids=str)
def test_modules_of_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    batch = Batch((rows(6).inputs[0].to(dtype),), rows(6).target)
    found = replica(net().to(dtype), nn.CrossEntropyLoss())
    found.backward(batch, seed=0)
    gradient, _ = plain(net().to(dtype), nn.CrossEntropyLoss(), batch)
    assert found.gradient.dtype == dtype
    torch.testing.assert_close(found.gradient, gradient, rtol=tolerance, atol=tolerance)


def test_several_inputs_are_forwards_arguments_in_order() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.w * (a - b)

    found = replica(Two(), nn.MSELoss())
    loss = found.backward(Batch((torch.tensor([5.0, 5.0]), torch.tensor([1.0, 2.0])), torch.tensor([8.0, 7.0])), seed=0)
    assert loss == pytest.approx(1.0) and found.gradient.tolist() == [-6.0]  # 2 (6 - 7) 3


@pytest.mark.parametrize("make", [lambda x: (x, "text"), lambda x: {"logits": x, "h": x.detach()}], ids=["tuple", "dict"])
def test_an_output_of_several_parts_goes_to_the_loss_as_it_is(make: Any) -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        logits = output[0] if isinstance(output, tuple) else output["logits"]
        return nn.functional.cross_entropy(logits, target)

    found = replica(Lambda(make), loss)
    assert found.backward(rows(4), seed=0) > 0 and found.gradient.any()


def test_a_loss_without_a_label_is_the_modules_own_business() -> None:
    found = replica(Lambda(lambda x: x, 5), lambda output, target: output.square().mean())
    assert found.backward(Batch(rows(4).inputs, None), seed=0) > 0


def test_buffers_go_in_and_out_as_one_vector() -> None:
    found = replica(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), nn.CrossEntropyLoss())
    found.backward(rows(6), seed=0)
    after = found.buffers
    assert after[-1] == 1.0 and after[:3].abs().sum() > 0
    found.buffers = torch.zeros_like(after)
    assert found.module[1].running_mean.sum() == 0 and found.module[1].num_batches_tracked == 0


# ---- mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda x: x[:2], r"\[2, 3\]"), (lambda x: x.sum(), r"\[\]"), (lambda x: x.reshape(-1), r"\[12\]"),
        (lambda x: (x, x[:1]), r"\[1, 3\]"), (lambda x: {"a": x.T}, r"\[3, 4\]"),
    ],
    ids=["fewer rows", "a number", "flattened", "one of a tuple", "one of a dict"],
)  # fmt: skip
def test_an_output_whose_first_dimension_is_not_the_rows_is_refused(make: Any, shape: str) -> None:
    with pytest.raises(DataError, match=rf"forward returned a tensor of shape {shape} for 4 rows; its first dimension"):
        replica(Lambda(make), nn.CrossEntropyLoss()).backward(rows(4), seed=0)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"a tensor of shape \[4\].*reduction='mean'"),
        (lambda output, target: 3.0, "the loss returned float; it must return one number"),
        (lambda output, target: None, "the loss returned NoneType"),
        (lambda output, target: torch.tensor(1.0), "does not depend on any trainable parameter"),
        (lambda output, target: output.detach().sum(), "does not depend on any trainable parameter"),
    ],
    ids=["one a row", "a float", "nothing", "a constant", "detached"],
)
def test_a_loss_that_is_not_one_number_to_learn_from_is_refused(loss: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        replica(net(), loss).backward(rows(4), seed=0)


def test_a_loss_that_is_a_sum_over_rows_is_refused() -> None:
    """It would be multiplied by the rows of each worker's part, so the result would depend on the partitions."""
    with pytest.raises(RecipeError, match="reduction='mean'"):
        replica(net(), nn.CrossEntropyLoss(reduction="sum")).backward(rows(4), seed=0)


ELEMENTWISE = [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()]


@pytest.mark.parametrize("loss", ELEMENTWISE, ids=repr)
def test_an_output_that_would_broadcast_against_the_label_is_refused(loss: nn.Module) -> None:
    batch = Batch(rows(4).inputs, torch.rand(4))
    name = type(loss).__name__
    with pytest.raises(DataError, match=rf"forward returns \[4, 1\] but the label is \[4\], and {name} needs one shape"):
        replica(net(1), loss).backward(batch, seed=0)
    assert replica(net(1), Squeezed(loss)).backward(batch, seed=0) > 0
    with pytest.raises(DataError, match=r"forward returns \[4, 3\] but the label is \[4\]"):
        replica(net(3), Squeezed(loss)).backward(batch, seed=0)


def test_a_squeezed_loss_is_the_loss_on_the_squeezed_output() -> None:
    batch = Batch(rows(4).inputs, torch.rand(4))
    found = replica(net(1), Squeezed(nn.MSELoss()))
    loss = found.backward(batch, seed=0)
    module = net(1)
    expected = nn.functional.mse_loss(module(batch.inputs[0]).squeeze(1), batch.target) * 4
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-6)
    torch.testing.assert_close(found.gradient, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))


@pytest.mark.parametrize(
    ("output", "target", "shape"),
    [([4, 1], [4], (4,)), ([4, 1], [4, 1], (4, 1)), ([4, 2], [4], (4, 2)), ([1, 1], [1], (1,))],
)
def test_only_a_single_output_against_a_flat_label_is_squeezed(output: list[int], target: list[int], shape: tuple) -> None:
    assert squeeze(torch.zeros(output), torch.zeros(target)).shape == shape


def test_what_is_not_a_tensor_is_not_squeezed() -> None:
    assert squeeze("text", torch.zeros(4)) == "text" and squeeze(torch.zeros(4, 1), None).shape == (4, 1)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss()], ids=repr)
@pytest.mark.parametrize(("label", "said"), [(3, "value 3"), (-1, "value -1"), (100, "value 100")])
def test_a_class_that_the_module_has_no_output_for_is_refused(loss: nn.Module, label: int, said: str) -> None:
    batch = Batch(rows(4).inputs, torch.tensor([0, 1, label, 2]))
    with pytest.raises(DataError, match=rf"{said}, the module has 3 outputs: labels must be 0 \.\. 2"):
        replica(net(), loss).backward(batch, seed=0)


@pytest.mark.parametrize("ignored", [-100, 255, 1])
def test_the_class_to_ignore_is_let_through(ignored: int) -> None:
    batch = Batch(rows(4).inputs, torch.tensor([0, 1, ignored, 2]))
    assert replica(net(), nn.CrossEntropyLoss(ignore_index=ignored)).backward(batch, seed=0) > 0


def test_class_probabilities_are_no_class_numbers() -> None:
    batch = Batch(rows(4).inputs, torch.full([4, 3], 1 / 3))
    assert replica(net(), nn.CrossEntropyLoss()).backward(batch, seed=0) > 0
