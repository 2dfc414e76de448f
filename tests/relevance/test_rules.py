"""Each rule against its slow form: dense Jacobians and loops in float64 (method.md e 8-11)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raystudy.relevance import rules
from raystudy.relevance.canonise import Conv, Pool
from raystudy.relevance.gradients import input_gradient
from raystudy.relevance.tape import ConvRule
from tests.relevance import oracle

SHAPES = [  # outputs, inputs, kernel, stride, padding, height, width
    (4, 3, 3, 1, 1, 6, 5),
    (4, 3, 3, 2, 1, 7, 6),
    (5, 3, 3, 2, 1, 6, 6),
    (3, 4, 1, 1, 0, 4, 5),
    (3, 4, 1, 2, 0, 5, 4),
    (4, 3, 7, 2, 3, 9, 8),
]


def tensors(case: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    o, i, k, stride, padding, height, width = case
    g = torch.Generator().manual_seed(sum(case))
    a = torch.randn(1, i, height, width, generator=g, dtype=torch.float64).relu()
    w = torch.randn(o, i, k, k, generator=g, dtype=torch.float64)
    shape = F.conv2d(a, w, None, stride, padding).shape
    return a, w, torch.randn(shape, generator=g, dtype=torch.float64)


def through(a: torch.Tensor, w: torch.Tensor, r: torch.Tensor, stride: int, padding: int, gamma: float) -> torch.Tensor:
    """The package's rule for one convolution: R of the output to R of the input."""
    rule = ConvRule.of(Conv(w, torch.randn(len(w), dtype=w.dtype), stride, padding), gamma, torch.float64)
    _, z = rule.forward(a)
    return a * rule.back(r, rule.factor(torch.ones_like(r), z), (a.shape[2], a.shape[3]))


@pytest.mark.parametrize("case", SHAPES)
def test_zplus_shares_relevance_by_positive_contributions_and_ignores_the_bias(case: tuple[int, ...]) -> None:
    a, w, r = tensors(case)
    stride, padding = case[3:5]
    contributions = (
        oracle.jacobian(w.clamp(min=0), tuple(a.shape[1:]), stride, padding) * a.flatten()
    )  # outputs, inputs
    z = contributions.sum(1, keepdim=True)
    expected = (torch.where(z > 0, contributions / z, 0.0) * r.flatten()[:, None]).sum(0).view_as(a)
    torch.testing.assert_close(through(a, w, r, stride, padding, float("inf")), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(oracle.alpha1_beta0(a, w, r, stride, padding), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", SHAPES)
def test_gamma_rule_keeps_the_sign_of_each_output_and_conserves(case: tuple[int, ...]) -> None:
    a, w, r = tensors(case)
    stride, padding = case[3:5]
    plain = oracle.jacobian(w, tuple(a.shape[1:]), stride, padding) * a.flatten()
    up, down = plain + 0.3 * plain.clamp(min=0), plain + 0.3 * plain.clamp(max=0)
    chosen = torch.where(plain.sum(1, keepdim=True) >= 0, up, down)
    z = chosen.sum(1, keepdim=True)
    expected = (torch.where(z != 0, chosen / z, 0.0) * r.flatten()[:, None]).sum(0).view_as(a)
    result = through(a, w, r, stride, padding, 0.3)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
    alive = (z != 0).flatten()
    assert result.sum() == pytest.approx(float(r.flatten()[alive].sum()), rel=1e-9)


@pytest.mark.parametrize("case", SHAPES)
def test_input_gradient_equals_the_transposed_jacobian(case: tuple[int, ...]) -> None:
    a, w, r = tensors(case)
    stride, padding = case[3:5]
    expected = (oracle.jacobian(w, tuple(a.shape[1:]), stride, padding).T @ r.flatten()).view_as(a)
    size = (a.shape[2], a.shape[3])
    torch.testing.assert_close(input_gradient(w, stride, padding)(r, size), expected, rtol=1e-10, atol=1e-12)


def test_an_output_without_positive_contributions_hands_on_nothing_and_stays_finite() -> None:
    a = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    w = -torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert torch.equal(through(a, w, torch.ones_like(a), 1, 0, float("inf")), torch.zeros_like(a))


def test_zplus_is_gradient_times_input_when_no_weight_is_negative() -> None:
    g = torch.Generator().manual_seed(5)
    a = torch.rand(1, 3, 6, 6, generator=g, dtype=torch.float64)
    first = torch.rand(4, 3, 3, 3, generator=g, dtype=torch.float64)
    second = torch.rand(2, 4, 3, 3, generator=g, dtype=torch.float64)
    h = F.conv2d(a, first, padding=1)
    z = F.conv2d(h, second, padding=1)
    r = torch.randn(z.shape, generator=g, dtype=torch.float64)
    leaf = a.clone().requires_grad_()
    out = F.conv2d(F.conv2d(leaf, first, padding=1), second, padding=1)
    (gradient,) = torch.autograd.grad((out * (r / z)).sum(), leaf)
    back = through(a, first, through(h, second, r, 1, 1, float("inf")), 1, 1, float("inf"))
    torch.testing.assert_close(back, a * gradient, rtol=1e-8, atol=1e-12)


def box_through(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    ones = torch.ones_like(x)
    z = F.conv2d(x, w, None, stride, padding)
    z = z - rules.BOX_LOW * F.conv2d(ones, w.clamp(min=0), None, stride, padding)
    z = z - rules.BOX_HIGH * F.conv2d(ones, w.clamp(max=0), None, stride, padding)
    s = r / rules.stabilise(z, rules.BOX_EPS)
    gradients = input_gradient(rules.box_weights(w), stride, padding)(s, (x.shape[2], x.shape[3]))
    return rules.box_combine(x.unsqueeze(1), gradients.unsqueeze(1))[0, 0]


@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[1], SHAPES[5]])
def test_box_rule_equals_its_three_dense_terms(case: tuple[int, ...]) -> None:
    a, w, r = tensors(case)
    stride, padding = case[3:5]
    x = (a * 3).clamp(max=2.6) - 1.5
    shape = tuple(x.shape[1:])
    plain, positive, negative = (
        oracle.jacobian(v, shape, stride, padding) for v in (w, w.clamp(min=0), w.clamp(max=0))
    )
    contributions = plain * x.flatten() - oracle.LOW * positive - oracle.HIGH * negative
    z = contributions.sum(1)
    s = r.flatten() / (z + 1e-6 * z.sign() + 1e-6 * (z == 0))
    expected = (contributions * s[:, None]).sum(0).view_as(x).sum(1)[0]
    torch.testing.assert_close(box_through(x, w, r, stride, padding), expected, rtol=1e-9, atol=1e-11)


def test_box_rule_gives_no_negative_pixel_for_inputs_inside_the_box() -> None:
    g = torch.Generator().manual_seed(2)
    x = rules.BOX_LOW + (rules.BOX_HIGH - rules.BOX_LOW) * torch.rand(1, 3, 12, 12, generator=g, dtype=torch.float64)
    w = torch.randn(8, 3, 7, 7, generator=g, dtype=torch.float64)
    r = torch.rand(1, 8, 6, 6, generator=g, dtype=torch.float64)
    result = box_through(x, w, r, 2, 3)
    assert result.min() >= 0
    assert result.sum() == pytest.approx(float(r.sum()), rel=1e-5)


def test_box_rule_by_hand_for_one_channel_and_one_tap() -> None:
    # x = 1, w = 2: Z = 1*2 - L*2 and all of R comes back, up to 1e-6 / Z.
    x, w = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    z = 2 - rules.BOX_LOW * 2
    r = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    assert float(box_through(x, w, r, 1, 0)) == pytest.approx(3 * z / (z + 1e-6), rel=1e-12)


def test_box_rule_at_the_lower_bound_with_positive_weights_gives_zero_not_nan() -> None:
    x = torch.full((1, 1, 3, 3), rules.BOX_LOW, dtype=torch.float64)
    w = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert torch.equal(box_through(x, w, torch.ones_like(x), 1, 0), torch.zeros(3, 3, dtype=torch.float64))


def test_box_bounds_are_the_darkest_and_brightest_normalised_value_of_any_channel() -> None:
    assert pytest.approx(oracle.LOW, abs=1e-12) == rules.BOX_LOW
    assert pytest.approx(oracle.HIGH, abs=1e-12) == rules.BOX_HIGH


def pool_back(a: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    _, winners = F.max_pool2d(a, 3, 2, 1, return_indices=True)
    return rules.scatter_to_winners(r, winners, (a.shape[2], a.shape[3]), Pool(3, 2, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pool_gives_all_to_the_first_maximum_of_each_window(layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(3)
    a = torch.randint(0, 4, (1, 3, 9, 8), generator=g).double().contiguous(memory_format=layout)  # many ties
    r = torch.randn(1, 3, 5, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(pool_back(a, r), oracle.max_pool(a, r), rtol=1e-12, atol=1e-12)


def test_overlapping_pool_windows_that_share_a_maximum_add() -> None:
    a = torch.zeros(1, 1, 5, 5)
    a[0, 0, 1, 1] = 1  # in the windows of outputs (0, 0), (0, 1), (1, 0) and (1, 1)
    r = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]]])
    assert float(pool_back(a, r)[0, 0, 1, 1]) == 1 + 2 + 8 + 16


def test_a_constant_pool_window_gives_to_its_first_element() -> None:
    result = pool_back(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2))
    assert result[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("u", "v", "relevance", "expected"),
    [
        (3.0, -1.0, 1.0, (1.5, -0.5)),
        (2.0, -2.0, 1.0, (0.0, 0.0)),  # opposite branches: finite
        (-1.0, 0.5, 1.0, (0.0, 0.0)),  # the ReLU is closed: no relevance comes from above
        (1.0, 0.0, 2.0, (2.0, 0.0)),
    ],
)
def test_residual_sum_shares_by_signed_branches(
    u: float, v: float, relevance: float, expected: tuple[float, float]
) -> None:
    t = torch.tensor(u + v, dtype=torch.float64)
    # R of relu(t) is relu(t) g; the rule hands u share g and v share g to the branches
    g = relevance / t if t > 0 else torch.tensor(relevance, dtype=torch.float64)
    share = rules.residual_share(t)
    assert (float(u * share * g), float(v * share * g)) == pytest.approx(expected, abs=3e-6)
    if t > 0:
        slow = oracle.residual(torch.tensor(u).double(), torch.tensor(v).double(), torch.tensor(relevance).double())
        assert (float(u * share * g), float(v * share * g)) == pytest.approx([float(s) for s in slow], rel=1e-12)


def test_stabiliser_moves_away_from_zero_on_both_sides() -> None:
    t = torch.tensor([2.0, -2.0, 0.0, -0.0], dtype=torch.float64)
    assert rules.stabilise(t, 0.5).tolist() == [2.5, -2.5, 0.5, 0.5]


@pytest.mark.parametrize("power", [2, 4])
def test_similarity_start_is_the_normalised_inverse_power_of_the_difference(power: int) -> None:
    g = torch.Generator().manual_seed(7)
    patch, prototype = torch.rand(2, 3, 16, generator=g, dtype=torch.float64).unbind()
    result = rules.similarity_start(patch, prototype, power)
    for i in range(3):
        torch.testing.assert_close(result[i], oracle.start(patch[i], prototype[i], power), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-11, atol=0)


def test_similarity_start_by_hand() -> None:
    # differences 1 and 2: weights 1 and 1/4 (power 2), 1 and 1/16 (power 4)
    patch, prototype = torch.tensor([1.0, 2.0]).double(), torch.zeros(2).double()
    assert rules.similarity_start(patch, prototype, 2).tolist() == pytest.approx([0.8, 0.2], rel=1e-9)
    assert rules.similarity_start(patch, prototype, 4).tolist() == pytest.approx([16 / 17, 1 / 17], rel=1e-9)


def test_similarity_start_at_an_exact_match_is_uniform() -> None:
    patch = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rules.similarity_start(patch, patch).tolist() == pytest.approx([1 / 8] * 8, rel=1e-9)


def test_similarity_start_refuses_another_power() -> None:
    with pytest.raises(ValueError, match="l2_power must be 2"):
        rules.similarity_start(torch.zeros(2), torch.zeros(2), 3)


def test_division_by_zero_is_zero() -> None:
    share = torch.tensor([1.0, 1.0, 0.0, -3.0])
    assert rules.divide(share, torch.tensor([4.0, 0.0, 0.0, -2.0])).tolist() == [0.25, 0.0, 0.0, 1.5]


def test_the_separating_rules_are_gamma_rules_in_the_add_on_and_the_topmost_stage_only() -> None:
    stages = ("layer1", "layer2", "layer3")
    gammas = [rules.RULE_SETS["separating"].gamma(stage, stages) for stage in (*stages, "add_on")]
    assert gammas == [float("inf"), float("inf"), 0.02, 0.02]
    assert {rules.RULE_SETS["published"].gamma(stage, stages) for stage in (*stages, "add_on")} == {float("inf")}
