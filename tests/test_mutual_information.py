"""The mutual information loss: hand-computed values, the equations as loops, bounds, gradients, precision."""

import math

import pytest
import torch

from muscle_plugin.errors import InputError
from muscle_plugin.losses import (
    MutualInformationLoss,
    joint_distribution,
    mutual_information,
    mutual_information_terms,
)


def probabilities(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=dtype) * scale).softmax(-1)


def by_loops(p, q):
    """Equations 5 and 6, written as they stand in the paper; q is (V, N, C)."""
    c = p.shape[1]
    matrix = [[0.0] * c for _ in range(c)]
    pairs = [(p[i], view[i]) for view in q for i in range(len(p))]
    for z, zz in pairs:
        for a in range(c):
            for b in range(c):
                matrix[a][b] += float(z[a] * zz[b]) / len(pairs)
    sym = [[(matrix[a][b] + matrix[b][a]) / 2 for b in range(c)] for a in range(c)]
    row = [sum(sym[a]) for a in range(c)]
    col = [sum(sym[a][b] for a in range(c)) for b in range(c)]
    return sum(sym[a][b] * math.log(sym[a][b] / (row[a] * col[b])) for a in range(c) for b in range(c) if sym[a][b] > 0)


def test_hand_computed():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    # Q = [[.25, .25], [0, .5]], P = [[.25, .125], [.125, .5]], marginals (.375, .625)
    expected = (
        0.25 * math.log(0.25 / 0.375**2)
        + 2 * 0.125 * math.log(0.125 / (0.375 * 0.625))
        + 0.5 * math.log(0.5 / 0.625**2)
    )
    assert mutual_information(p, q).item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(
        joint_distribution(p, q), torch.tensor([[0.25, 0.125], [0.125, 0.5]], dtype=torch.float64)
    )


@pytest.mark.parametrize(("views", "n", "c"), [(1, 1, 2), (1, 7, 3), (3, 5, 4), (4, 2, 10)])
def test_equals_the_equations_as_loops(views, n, c):
    p, q = probabilities(n, c), probabilities(views, n, c, seed=1)
    assert mutual_information(p, q).item() == pytest.approx(by_loops(p, q), abs=1e-10)


@pytest.mark.parametrize("c", [2, 10, 100])
def test_bounds(c):
    uniform = torch.full((2 * c, c), 1 / c)
    one_hot = torch.eye(c).repeat(2, 1)
    assert mutual_information(uniform, uniform).item() == pytest.approx(0, abs=1e-5)
    assert mutual_information(one_hot, one_hot).item() == pytest.approx(math.log(c), rel=1e-5)
    random = mutual_information(probabilities(50, c), probabilities(50, c, seed=1)).item()
    assert -1e-12 < random < math.log(c)


def test_collapse_gives_no_information():
    collapsed = torch.zeros(8, 5)
    collapsed[:, 2] = 1
    terms = mutual_information_terms(collapsed, collapsed)
    assert [t.item() for t in terms] == pytest.approx([0, 0, 0], abs=1e-6)


def test_terms_are_those_of_equation_9():
    p, q = probabilities(20, 6), probabilities(20, 6, seed=1)
    terms = mutual_information_terms(p, q)
    joint = joint_distribution(p, q)
    marginal = joint.sum(1)
    entropy = -(marginal * marginal.log()).sum()
    conditional = -(joint * (joint / marginal).log()).sum()
    torch.testing.assert_close(terms.entropy, entropy)
    torch.testing.assert_close(terms.conditional, conditional)
    torch.testing.assert_close(terms.information, entropy - conditional)


def test_symmetric_in_views_and_invariant_to_order_of_classes_and_images():
    p, q = probabilities(12, 5), probabilities(12, 5, seed=1)
    value = mutual_information(p, q)
    images, classes = torch.randperm(12), torch.randperm(5)
    torch.testing.assert_close(mutual_information(q, p), value)
    torch.testing.assert_close(mutual_information(p[images], q[images]), value)
    torch.testing.assert_close(mutual_information(p[:, classes], q[:, classes]), value)


def test_views_count_as_pairs_with_the_weak_view_repeated():
    p, q = probabilities(6, 4), probabilities(3, 6, 4, seed=1)
    tiled = mutual_information(p.repeat(3, 1), q.reshape(18, 4))
    torch.testing.assert_close(mutual_information(p, q), tiled)


def test_gradient_matches_finite_differences():
    logits = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: mutual_information(a.softmax(1), b.softmax(1)), logits)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e30])
@pytest.mark.parametrize("n", [1, 2, 64])
def test_finite_at_saturated_logits(scale, n):
    generator = torch.Generator().manual_seed(0)
    weak = (torch.randn(n, 10, generator=generator) * scale).requires_grad_()
    hard = (torch.randn(3, n, 10, generator=generator) * scale).requires_grad_()
    loss, terms = MutualInformationLoss(1.0)(weak, hard)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, weak.grad, hard.grad, *terms))


def test_ascent_turns_leaning_to_one_class_into_certain_and_spread_predictions():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 1.5
    logits.requires_grad_()
    assert mutual_information(logits.softmax(1), logits.softmax(1)) < 0.25 * math.log(4)
    for _ in range(500):
        loss, terms = MutualInformationLoss()(logits, logits)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 5 * gradient).detach().requires_grad_()
    assert terms.information > 0.75 * math.log(4)
    assert terms.conditional < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_mixed_precision(dtype):
    p, q = probabilities(64, 10, dtype=torch.float32), probabilities(64, 10, seed=1, dtype=torch.float32)
    exact = mutual_information(p, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mutual_information(p, q)
        halved = mutual_information(p.to(dtype), q.to(dtype))
    assert inside.dtype == halved.dtype == torch.float32
    assert inside.item() == exact.item()
    assert halved.item() == pytest.approx(exact.item(), abs=5e-3)


def test_wrong_shapes_are_named():
    p = torch.rand(4, 3)
    with pytest.raises(InputError, match=r"^q: .*\(4, 3\).*\(5, 3\)"):
        mutual_information(p, torch.rand(5, 3))
    with pytest.raises(InputError, match=r"^p: .*\(N, C\).*\(4,\)"):
        mutual_information(torch.rand(4), torch.rand(4))
    with pytest.raises(InputError, match=r"^p: .*\(0, 3\)"):
        mutual_information(torch.rand(0, 3), torch.rand(0, 3))
    with pytest.raises(InputError, match=r"^p: .*\(4, 0\)"):
        mutual_information(torch.rand(4, 0), torch.rand(4, 0))
    with pytest.raises(InputError, match=r"^q: .*\(0, 4, 3\)"):
        mutual_information(p, torch.rand(0, 4, 3))
    with pytest.raises(InputError, match=r"^weight: .*-1\b"):
        MutualInformationLoss(-1)


def test_one_image_one_class_and_no_weight_are_allowed():
    for n, c in ((1, 3), (4, 1), (1, 1)):
        p = torch.full((n, c), 1 / c)
        assert mutual_information(p, p).item() == pytest.approx(0, abs=1e-6)
    loss, terms = MutualInformationLoss(0)(torch.eye(3) * 9, torch.eye(3) * 9)
    assert loss.item() == 0
    assert terms.information > 0


@pytest.mark.parametrize("views", [None, 2])
def test_the_loss_is_the_weighted_information_of_soft_max_predictions(views):
    generator = torch.Generator().manual_seed(0)
    weak = torch.randn(6, 4, generator=generator)
    hard = torch.randn(*([6, 4] if views is None else [views, 6, 4]), generator=generator)
    exact = mutual_information(weak.softmax(-1), hard.softmax(-1))
    assert MutualInformationLoss()(weak, hard)[0].item() == pytest.approx(-exact.item(), rel=1e-6)
    assert MutualInformationLoss(3)(weak, hard)[0].item() == pytest.approx(-3 * exact.item(), rel=1e-6)


def test_other_processes_are_asked_only_for_the_global_batch(monkeypatch):
    monkeypatch.setattr("muscle_plugin.distributed.mean", lambda joint: torch.full_like(joint, 1 / 9))
    p = torch.eye(3)
    assert joint_distribution(p, p)[0, 0] == pytest.approx(1 / 3)
    assert joint_distribution(p, p, global_batch=True)[0, 0] == pytest.approx(1 / 9)
    for of in (mutual_information, lambda *a: mutual_information_terms(*a).information):
        assert of(p, p).item() == pytest.approx(math.log(3))
        assert of(p, p, True).item() == pytest.approx(0, abs=1e-6)
    assert MutualInformationLoss()(99 * p, 99 * p)[1].information.item() == pytest.approx(math.log(3))
    assert MutualInformationLoss(1, True)(99 * p, 99 * p)[1].information.item() == pytest.approx(0, abs=1e-6)
