"""Label propagation: a graph by hand, the closed form, the paper's procedure as loops, degenerate inputs, backends."""

import importlib.util
import inspect
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits, make_moons
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from muscle_plugin.errors import InputError
from muscle_plugin.propagation import (
    DiffusionLabelPropagation,
    affinity_graph,
    class_mass,
    class_weights,
    conjugate_gradients,
    diffusion,
    nearest_neighbours,
    normalise_rows,
    propagate,
    pseudo_labels,
)
from muscle_plugin.propagation import graph as graph_module

BACKENDS = ["faiss", "torch"] if importlib.util.find_spec("faiss") else ["torch"]


def in_float64(graph):
    return replace(graph, values=graph.values.double())


def clusters(n=120, d=8, c=3, labelled=2, noise=0.6, seed=0):
    """(features, labels with -1, true classes); the first ``labelled`` points of each class are labelled."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, c, n)
    x = rng.normal(size=(c, d))[truth] + noise * rng.normal(size=(n, d))
    y = np.full(n, -1)
    for j in range(c):
        y[np.flatnonzero(truth == j)[:labelled]] = j
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(truth)


def dense(graph):
    n = len(graph.offsets) - 1
    return (graph @ torch.eye(n, dtype=graph.values.dtype)).numpy()


def oracle_graph(x, k, gamma):
    """S by loops, from section 4.1 of the paper."""
    n = len(x)
    unit = [row / np.linalg.norm(row) if np.linalg.norm(row) > 0 else row for row in x]
    w = np.zeros((n, n))
    for i in range(n):
        near = sorted((j for j in range(n) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:k]
        for j in near:
            a = max(float(unit[i] @ unit[j]), 0) ** gamma
            w[i, j] += a
            w[j, i] += a
    degree = [w[i].sum() or 1.0 for i in range(n)]
    return np.array([[w[i, j] / math.sqrt(degree[i] * degree[j]) for j in range(n)] for i in range(n)])


def oracle_cg(a, b, iterations):
    """Textbook conjugate gradients for one right-hand side (Hestenes and Stiefel)."""
    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    for _ in range(iterations):
        step = (r @ r) / (p @ a @ p)
        x = x + step * p
        new = r - step * (a @ p)
        p = new + (new @ new) / (r @ r) * p
        r = new
    return x


def oracle(x, y, c, k, gamma, alpha, iterations):
    """(labels, weights, class weights, p) by loops."""
    s = oracle_graph(x, k, gamma)
    a = np.eye(len(x)) - alpha * s
    rhs = np.stack([(y == j) / max((y == j).sum(), 1) for j in range(c)], 1)
    if iterations is None:
        z = np.linalg.inv(a) @ rhs
    else:
        z = np.stack([oracle_cg(a, rhs[:, j], iterations) for j in range(c)], 1)
    z = np.clip(z, 0, None)
    labels, weights = [], []
    for row in z:
        p = row / row.sum()
        weights.append(1 + sum(q * math.log(q) for q in p if q > 0) / math.log(c))
        labels.append(int(p.argmax()))
    weights = [w / max(weights) for w in weights]
    labels = [int(t) if t >= 0 else label for t, label in zip(y, labels, strict=True)]
    weights = [1.0 if t >= 0 else w for t, w in zip(y, weights, strict=True)]
    balance = [len(x) / c / labels.count(j) if labels.count(j) else 0.0 for j in range(c)]
    return labels, weights, balance, z / z.sum(1, keepdims=True)


# ---------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_by_hand(backend):
    # Unit vectors at 0, 60 and 120 degrees: cosines 1/2, 1/2, -1/2. With k = 1 the outer two choose the middle one, and
    # the middle one chooses either: that edge counts twice. gamma = 1: W = 1 and 1/2, degrees 1, 3/2, 1/2.
    x = torch.tensor([[2.0, 0.0], [0.5, 3**0.5 / 2 - 1e-4], [-0.5, 3**0.5 / 2]])
    found = nearest_neighbours(normalise_rows(x), 1, backend=backend)
    assert found.index.tolist() == [[1], [0], [1]] or found.index.tolist() == [[1], [2], [1]]
    first = found.index[1, 0].item()
    s = dense(affinity_graph(found, 1.0, backend=backend))
    expected = np.zeros((3, 3))
    expected[1, first] = expected[first, 1] = 1 / math.sqrt(1.5 * 1)
    expected[1, 2 - first] = expected[2 - first, 1] = 0.5 / math.sqrt(1.5 * 0.5)
    np.testing.assert_allclose(s, expected, atol=2e-4)


def test_diffusion_by_hand():
    # Two points, one edge: S = [[0, 1], [1, 0]], so (I - S/2)^-1 = [[4, 2], [2, 4]] / 3; the labelled point is y = 1.
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([0, -1])
    result = propagate(x, y, 2, k=1, alpha=0.5)
    assert result.labels.tolist() == [0, 0]
    assert result.weights.tolist() == [1, 1]
    assert result.distributions.tolist() == [[1, 0], [1, 0]]
    assert result.class_weights.tolist() == [0.5, 0]
    graph = affinity_graph(nearest_neighbours(normalise_rows(x), 1))
    z = conjugate_gradients(lambda p: p - 0.5 * (graph @ p), torch.tensor([[1.0], [0.0]]), 1e-7, 5)
    torch.testing.assert_close(z.x.squeeze(1), torch.tensor([4 / 3, 2 / 3]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "gamma"), [(1, 3), (5, 3), (5, 1.5), (100, 2)])
def test_graph_equals_the_loops(backend, k, gamma):
    x, _, _ = clusters(40, d=4)
    x[7] = 0
    s = dense(affinity_graph(nearest_neighbours(normalise_rows(x), k, backend=backend), gamma, backend=backend))
    np.testing.assert_allclose(s, oracle_graph(x.numpy(), k, gamma), atol=1e-6)
    np.testing.assert_array_equal(s, s.T)
    assert (np.diag(s) == 0).all()
    assert np.abs(np.linalg.eigvalsh(s)).max() <= 1 + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_are_never_the_point_itself_even_among_many_duplicates(backend):
    x = torch.cat([torch.ones(30, 4), torch.randn(10, 4, generator=torch.Generator().manual_seed(0))])
    found = nearest_neighbours(normalise_rows(x), 5, backend=backend)
    assert (found.index != torch.arange(40)[:, None]).all()
    torch.testing.assert_close(found.similarity[:30], torch.ones(30, 5))
    assert all(len(set(row)) == 5 for row in found.index.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_approximate_neighbours_are_mostly_the_exact_ones(backend):
    x = normalise_rows(clusters(3000, d=16, c=30)[0])
    exact = nearest_neighbours(x, 10, method="exact", backend=backend)
    close = nearest_neighbours(x, 10, method="approximate", probes=16, backend=backend)
    everything = nearest_neighbours(x, 10, method="approximate", probes=1000, backend=backend)
    recall = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(exact.index.tolist(), close.index.tolist(), strict=True)]
    )
    assert recall > 0.8
    assert (exact.method, close.method) == ("exact", "approximate")
    torch.testing.assert_close(everything.similarity, exact.similarity, atol=1e-6, rtol=0)


def test_approximate_search_that_finds_too_few_fills_up_with_no_affinity():
    x = normalise_rows(clusters(100, d=8, c=10, noise=0.05)[0])
    found = nearest_neighbours(x, 60, method="approximate", probes=1)
    missing = found.index == torch.arange(100)[:, None]
    assert missing.any()
    assert (found.similarity[missing] == 0).all()


def test_auto_takes_approximate_neighbours_above_the_size():
    x, y, _ = clusters(50)
    assert propagate(x, y, 3, k=5, approximate_above=50).stats.neighbours == "exact"
    assert propagate(x, y, 3, k=5, approximate_above=49).stats.neighbours == "approximate"
    assert propagate(x, y, 3, k=5, approximate_above=49, neighbours="exact").stats.neighbours == "exact"


@pytest.mark.skipif(len(BACKENDS) < 2, reason="faiss is not installed")
def test_each_backend_uses_its_own_search(monkeypatch):
    calls = []

    def note(owner, name):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or inner(*args, **kwargs))

    note(graph_module.faiss, "knn")
    for name in ("_inverted_file", "_list_by_list", "_add_transpose_scipy", "_add_transpose_torch"):
        note(graph_module, name)

    def used(**settings):
        calls.clear()
        x, y, _ = clusters()
        propagate(x, y, 3, k=5, **settings)
        return calls[:]

    # on the CPU faiss and SciPy, unless told otherwise
    assert used() == used(backend="faiss") == ["knn", "_add_transpose_scipy"]
    assert used(backend="torch") == ["_add_transpose_torch"]
    assert used(neighbours="approximate") == ["_inverted_file", "_add_transpose_scipy"]
    assert used(neighbours="approximate", backend="torch") == ["_list_by_list", "_add_transpose_torch"]


def test_backends_of_devices():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert graph_module.choose_backend("auto", cpu) == BACKENDS[0]
    assert graph_module.choose_backend("auto", cuda) == graph_module.choose_backend("torch", cuda) == "torch"
    with pytest.raises(InputError, match="^backend: 'faiss' .*features .*cuda"):
        graph_module.choose_backend("faiss", cuda)


def test_neighbours_have_the_defaults_of_propagate():
    ours, whole = (inspect.signature(f).parameters for f in (nearest_neighbours, propagate))
    names = ("approximate_above", "probes", "backend", "seed")
    assert [ours[n].default for n in names] == [whole[n].default for n in names] == [300_000, 16, "auto", 0]
    assert ours["method"].default == whole["neighbours"].default == "auto"
    assert inspect.signature(affinity_graph).parameters["gamma"].default == whole["gamma"].default == 3


def test_float64_features_beyond_float32_keep_their_direction():
    x = torch.tensor([[3e200, 4e200], [-3e-200, 4e-200], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(normalise_rows(x), torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0, 0]]))


def test_lists_of_an_approximate_search():
    assert [graph_module._lists(n) for n in (1, 4, 100, 10_000)] == [1, 4, 20, 200]


def test_centres_are_of_unit_length_and_those_of_the_clusters():
    corners = torch.eye(3).repeat(20, 1)
    unit = normalise_rows(corners + 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0)))
    centres = graph_module._spherical_k_means(unit, 12, 0)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(12))
    means = normalise_rows(torch.stack([unit[i::3].mean(0) for i in range(3)]))
    assert ((means @ centres.T).amax(1) > 0.98).all()
    # more lists than different rows: an empty list keeps its centre
    torch.testing.assert_close(graph_module._spherical_k_means(torch.eye(3)[[0] * 9], 4, 0), torch.eye(3)[[0] * 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_handled_in_blocks_or_at_once_it_is_the_same(monkeypatch, backend):
    x, y, _ = clusters(90)
    whole = [propagate(x, y, 3, k=6, backend=backend, neighbours=m) for m in ("exact", "approximate")]
    for module in (graph_module, diffusion):
        monkeypatch.setattr(module, "BLOCK", 16)
    parts = [propagate(x, y, 3, k=6, backend=backend, neighbours=m) for m in ("exact", "approximate")]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.weights, b.weights, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.distributions, b.distributions, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- the solver


def test_solver_equals_the_closed_form():
    x, y, _ = clusters(150)
    graph = in_float64(affinity_graph(nearest_neighbours(normalise_rows(x), 10)))
    a = np.eye(150) - 0.99 * dense(graph)
    rhs = torch.nn.functional.one_hot(y + 1, 4)[:, 1:].double() / 2
    solution = conjugate_gradients(lambda p: p - 0.99 * (graph @ p), rhs, 1e-12, 1000)
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(a, rhs.numpy()), rtol=1e-8, atol=1e-12)
    assert (solution.residuals <= 1e-12).all()


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_each_column_goes_its_own_way_as_textbook_cg(iterations):
    rng = np.random.default_rng(0)
    m = rng.normal(size=(60, 60))
    a = m @ m.T / 60 + 0.1 * np.eye(60)
    rhs = rng.normal(size=(60, 4)) * [1, 1e-3, 1e3, 1]
    solution = conjugate_gradients(lambda p: torch.from_numpy(a) @ p, torch.from_numpy(rhs), 0, iterations)
    for j in range(4):
        expected = oracle_cg(a, rhs[:, j], iterations)
        np.testing.assert_allclose(solution.x[:, j].numpy(), expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
        true = np.linalg.norm(rhs[:, j] - a @ expected) / np.linalg.norm(rhs[:, j])
        assert solution.residuals[j].item() == pytest.approx(true, rel=1e-6)


def test_columns_that_are_solved_rest():
    a = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    rhs = torch.zeros(5, 3, dtype=torch.float64)
    rhs[0, 0] = 1  # an eigenvector: one iteration
    rhs[:, 1] = 1  # five distinct eigenvalues: five
    solution = conjugate_gradients(lambda p: a @ p, rhs, 1e-10, 50)
    assert solution.iterations.tolist() == [1, 5, 0]
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, rhs))
    assert (solution.residuals <= 1e-10).all()


def test_columns_that_rest_stay_where_they_are():
    rng = np.random.default_rng(0)
    m = rng.normal(size=(30, 30))
    a = torch.from_numpy(m @ m.T / 30 + 0.1 * np.eye(30))
    # near-eigenvectors rest long before the random columns do
    rhs = torch.cat([torch.linalg.eigh(a).eigenvectors[:, [0, -1]], torch.from_numpy(rng.normal(size=(30, 2)))], 1)
    rhs[:, :2] += 0.05 * torch.from_numpy(rng.normal(size=(30, 2)))
    together = conjugate_gradients(lambda p: a @ p, rhs, 0.3, 100)
    alone = [conjugate_gradients(lambda p: a @ p, rhs[:, [j]], 0.3, 100) for j in range(4)]
    assert len(set(together.iterations.tolist())) > 2
    for j, one in enumerate(alone):
        assert together.iterations[j] == one.iterations[0]
        torch.testing.assert_close(together.x[:, j], one.x[:, 0])
        torch.testing.assert_close(together.residuals[j], one.residuals[0])


def test_products_are_those_of_the_iterations_and_of_a_check_of_what_is_solved():
    a = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    products = []

    def multiply(p):
        products.append(len(p))
        return a @ p

    rhs = torch.zeros(5, 2, dtype=torch.float64)
    conjugate_gradients(multiply, rhs, 1e-6, 50)
    assert len(products) == 0
    rhs[:, 0] = 0.1
    conjugate_gradients(multiply, rhs, 1e-6, 3)
    assert len(products) == 3  # a column of zeros is solved without a check
    conjugate_gradients(multiply, rhs, 1e-6, 50)
    assert len(products) == 3 + 5 + 1


def test_in_float32_columns_go_on_from_their_true_residual_until_it_is_small():
    resumed = 0
    for seed in range(4):
        x, y, _ = clusters(200, d=4, seed=seed)
        graph = affinity_graph(nearest_neighbours(normalise_rows(x), 5))
        rhs = torch.nn.functional.one_hot(y + 1, 4)[:, 1:].float() / 2
        products = []
        solution = conjugate_gradients(lambda p: products.append(0) or p - 0.99 * (graph @ p), rhs, 1e-6, 1000)  # noqa: B023
        exact = in_float64(graph)
        true = rhs.double() - (solution.x.double() - 0.99 * (exact @ solution.x.double()))
        assert (solution.residuals <= 1e-6).all()
        assert (true.norm(dim=0) / rhs.norm(dim=0) <= 1.5e-6).all()
        resumed += len(products) > solution.iterations.max() + 1
    assert resumed


def test_residual_is_the_true_one_where_float32_can_carry_no_further():
    x, y, _ = clusters(200, d=4)
    graph = affinity_graph(nearest_neighbours(normalise_rows(x), 5))
    rhs = torch.nn.functional.one_hot(y + 1, 4)[:, 1:].float()
    solution = conjugate_gradients(lambda p: p - 0.999 * (graph @ p), rhs, 1e-9, 10_000)
    exact = in_float64(graph)
    true = rhs.double() - (solution.x.double() - 0.999 * (exact @ solution.x.double()))
    assert solution.iterations.max() < 2000  # gives up
    assert (solution.residuals > 1e-9).all()
    torch.testing.assert_close(solution.residuals.double(), (true.norm(dim=0) / rhs.norm(dim=0)), rtol=0.5, atol=0)


# ---------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [5, 20, None])
def test_equals_the_procedure_as_loops(backend, iterations):
    x, y, truth = clusters(80, d=6)
    y[np.flatnonzero(truth == 1)[:9]] = 1  # classes with different numbers of labels
    labels, weights, balance, p = oracle(x.numpy(), y.numpy(), 3, 6, 3, 0.9, iterations)
    result = propagate(
        x, y, 3, k=6, alpha=0.9, max_iter=iterations or 500, tol=0 if iterations else 1e-7, backend=backend
    )
    assert result.labels.tolist() == labels
    np.testing.assert_allclose(result.weights.numpy(), weights, atol=1e-4)
    np.testing.assert_allclose(result.class_weights.numpy(), balance, rtol=1e-6)
    np.testing.assert_allclose(result.distributions.numpy(), p, atol=1e-4)


def test_more_classes_than_are_solved_at_once(monkeypatch):
    monkeypatch.setitem(diffusion.COLUMNS, "cpu", 16)
    x, y, _ = clusters(300, c=40, labelled=1)
    labels, weights, _, p = oracle(x.numpy(), y.numpy(), 40, 8, 3, 0.8, None)
    result = propagate(x, y, 40, k=8, alpha=0.8, max_iter=500)
    assert (result.labels.numpy() == labels).mean() > 0.99
    np.testing.assert_allclose(result.weights.numpy(), weights, atol=1e-3)
    np.testing.assert_allclose(result.distributions.numpy(), p, atol=1e-4)


def test_several_threads_solve_classes_at_a_time(monkeypatch):
    monkeypatch.setitem(diffusion.COLUMNS, "cpu", 4)
    x, y, _ = clusters(200, c=10)
    one = propagate(x, y, 10, k=8)
    used = []
    solve = diffusion.conjugate_gradients
    monkeypatch.setattr(
        diffusion,
        "conjugate_gradients",
        lambda *a: used.append((threading.get_ident(), torch.get_num_threads(), a[1].shape[1])) or solve(*a),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = propagate(x, y, 10, k=8)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert threading.get_ident() not in {thread for thread, _, _ in used}
    assert sorted(rest for _, *rest in used) == [[1, 2], [1, 2], [1, 3], [1, 3]]  # as many parts for each thread
    assert torch.equal(one.labels, two.labels)
    torch.testing.assert_close(one.distributions, two.distributions, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.stats.residuals, two.stats.residuals, atol=1e-5, rtol=1e-3)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="faiss is not installed")
def test_backends_agree():
    x, y, _ = clusters(400, c=5)
    a, b = (propagate(x, y, 5, k=10, backend=backend) for backend in BACKENDS)
    assert torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.weights, b.weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.class_weights, b.class_weights)
    assert (a.stats.backend, b.stats.backend) == ("faiss", "torch")


def test_without_faiss_torch_does_the_work(monkeypatch):
    x, y, _ = clusters(60)
    monkeypatch.setattr(graph_module, "faiss", None)
    assert propagate(x, y, 3, k=5).stats.backend == "torch"
    with pytest.raises(ImportError, match="faiss-cpu"):
        propagate(x, y, 3, k=5, backend="faiss")


@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_deterministic_and_leaves_its_input_alone(method):
    x, y, _ = clusters(300)
    kept = x.clone(), y.clone()
    state = torch.get_rng_state()
    a, b = (propagate(x, y, 3, k=10, neighbours=method) for _ in range(2))
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    assert torch.equal(state, torch.get_rng_state())
    for name in ("labels", "weights", "class_weights", "distributions"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_order_of_points_and_classes_does_not_matter():
    x, y, _ = clusters(200, c=4)
    base = propagate(x, y, 4, k=8)
    generator = torch.Generator().manual_seed(1)
    points, classes = torch.randperm(200, generator=generator), torch.randperm(4, generator=generator)
    renamed = torch.where(y >= 0, classes[y.clamp(min=0)], -1)
    moved = propagate(x[points], renamed[points], 4, k=8)
    assert torch.equal(moved.labels, classes[base.labels][points])
    torch.testing.assert_close(moved.weights, base.weights[points], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.distributions[:, classes], base.distributions[points], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.class_weights[classes], base.class_weights)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_length_of_features_does_not_matter(scale):
    x, y, _ = clusters()
    x = x.float()
    factors = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)) + 0.5
    base, scaled = propagate(x, y, 3, k=8), propagate(x * factors * scale, y, 3, k=8)
    assert torch.equal(base.labels, scaled.labels)
    torch.testing.assert_close(base.weights, scaled.weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_any_real_dtype_also_under_autocast(dtype):
    x, y, _ = clusters()
    x = (x * 16 + 128).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = propagate(x.requires_grad_(dtype != torch.uint8), y.int(), 3, k=8)
    expected = propagate(x.detach().double(), y, 3, k=8)
    assert result.weights.dtype == result.distributions.dtype == result.class_weights.dtype == torch.float32
    assert not result.weights.requires_grad
    assert torch.equal(result.labels, expected.labels)


# ---------------------------------------------------------------------------------------------------- class mass

CHOICES = [
    ("diffusion", "uniform"), ("diffusion", "labels"), ("poisson_mbo", "none"), ("poisson_mbo", "uniform"),
    ("poisson_mbo", "equal"),
]  # fmt: skip


def few_labels(n=1500, c=5, seed=0, ratio=1.0):
    """(features, one label per class, true classes) of overlapping Gaussians in 128 dimensions, where hubs abound; class j
    is ``ratio`` times as frequent as class j + 1."""
    rng = np.random.default_rng(seed)
    sizes = ratio ** -np.arange(c)
    truth = rng.choice(c, n, p=sizes / sizes.sum())
    x = rng.normal(size=(c, 128))[truth] + 3.2 * rng.normal(size=(n, 128))
    y = np.full(n, -1)
    for j in range(c):
        y[rng.choice(np.flatnonzero(truth == j))] = j
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(truth)


def accuracy(result, y, truth):
    return float((result.labels == truth)[y < 0].double().mean())


def test_even_class_mass_takes_nothing_from_a_hub():
    x, y, _ = few_labels(300)
    graph = affinity_graph(nearest_neighbours(normalise_rows(x), 10))
    rhs = torch.zeros(300, 5)
    rhs[y >= 0, y[y >= 0]] = 1
    z = conjugate_gradients(lambda p: p - 0.99 * (graph @ p), rhs, 1e-6, 20).x.clamp(min=0)
    even = class_mass.even_mass(z)
    torch.testing.assert_close(even, z / z.sum(0))
    torch.testing.assert_close(even.sum(0), torch.ones(5))
    torch.testing.assert_close(class_mass.even_mass(z * torch.tensor([100.0, 1, 1, 1, 1])), even)
    given = propagate(x, y, 5, k=10, class_mass="uniform")
    expected = torch.where(y >= 0, y, even.argmax(1))
    assert (given.labels == expected).double().mean() > 0.99
    assert class_mass.even_mass(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).tolist() == [[0.25, 0], [0.75, 0]]


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.1, 0.9], [0.2, 0.3, 0.5], [0.01, 0.04, 0.95]])
def test_classes_get_their_shares_of_the_points(shares):
    c = len(shares)
    z = torch.rand(1000, c, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1  # as alike as rows of Z often are
    z[::10] = 0  # not reached
    scaled = class_mass.scale_to_shares(z, torch.tensor(shares))
    counts = torch.bincount(scaled[scaled.sum(1) > 0].argmax(1), minlength=c) / 900
    assert (counts - torch.tensor(shares)).abs().max() < 0.01
    assert (scaled[::10] == 0).all()
    factors = (scaled / z * z.amax(1, keepdim=True))[1:10]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))  # whole columns are scaled, nothing else


@pytest.mark.parametrize("method", ["diffusion", "poisson_mbo"])
def test_parts_of_the_graph_with_one_class_each_keep_it_whatever_the_shares(method):
    x = torch.eye(3).repeat_interleave(20, 0) + 0.01 * torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(3).repeat_interleave(20)
    y = torch.where(torch.arange(60) % 20 == 0, truth, -1)
    result = propagate(x, y, 3, k=5, method=method, class_mass=[1, 1, 98], max_iter=200)
    check_sound(result, y, 3)
    assert result.reached.all()
    assert method == "poisson_mbo" or torch.equal(result.labels, truth)


def test_shares_of_the_classes():
    labels = torch.tensor([0, 0, 0, 2, -1, -1])
    assert class_mass.class_shares("none", labels, 3) is class_mass.class_shares("uniform", labels, 3) is None
    assert class_mass.class_shares("equal", labels, 3).tolist() == [0.5, 0, 0.5]
    assert class_mass.class_shares("labels", labels, 3).tolist() == [0.75, 0, 0.25]
    given = class_mass.class_shares([2, 5, 6], labels, 3)  # class 1 has no label to start from
    assert given.tolist() == [0.25, 0, 0.75]
    huge = class_mass.class_shares(np.array([1e307, 1e308, 3e307]), labels, 3)
    torch.testing.assert_close(huge, given)


@pytest.mark.parametrize("wrong", ["even", 3, None, [0.5, 0.5], [1, 0, 1], [1, float("nan"), 1], {"a": 1}, [[1, 1, 1]]])
def test_class_mass_that_cannot_be(wrong):
    x, y, _ = clusters()
    with pytest.raises(
        InputError, match=r"^class_mass: expected one of none, uniform, equal, labels, or 3 shares"
    ) as error:
        propagate(x, y, 3, k=5, class_mass=wrong)
    assert "\n" not in str(error.value)


def test_class_mass_frees_pseudo_labels_from_hubs():
    gains, more = [], []
    for seed in range(5):
        x, y, truth = few_labels(seed=seed)
        none, even, mbo = (
            accuracy(propagate(x, y, 5, k=15, method=method, class_mass=mass), y, truth)
            for method, mass in (("diffusion", "none"), ("diffusion", "uniform"), ("poisson_mbo", "equal"))
        )
        gains.append(even - none)
        more.append(mbo - even)
    assert min(gains) > 0  # 10 points and more on average, on each draw something
    assert np.mean(gains) > 0.1
    assert np.mean(more) > 0.05


@pytest.mark.parametrize(("c", "ratio"), [(2, 6.0), (3, 3.0), (5, 1.8)])
@pytest.mark.parametrize("method", ["diffusion", "poisson_mbo"])
def test_true_shares_of_unequal_classes_help(c, ratio, method):
    gains = []
    for seed in range(4):
        x, y, truth = few_labels(c=c, seed=seed, ratio=ratio)
        shares = torch.bincount(truth) / len(truth)
        told, equal = (
            accuracy(propagate(x, y, c, k=15, method=method, class_mass=mass), y, truth)
            for mass in (shares.numpy(), "equal")
        )
        gains.append(told - equal)
    assert np.mean(gains) > 0.1


@pytest.mark.parametrize("classes", [(3, 8), (1, 3, 5, 8, 9), range(10)])
@pytest.mark.parametrize(("method", "mass"), CHOICES)
def test_weights_tell_right_from_wrong(classes, method, mass):
    x, truth = load_digits(return_X_y=True)
    rows = np.isin(truth, classes)
    x, truth = torch.from_numpy(x[rows] - x.mean(0)), torch.from_numpy(np.searchsorted(list(classes), truth[rows]))
    better = []
    for seed in range(5):
        y = torch.full_like(truth, -1)
        for j in range(len(classes)):
            rng = np.random.default_rng(seed)
            y[rng.choice(np.flatnonzero(truth == j))] = j
        result = propagate(x, y, len(classes), k=10, method=method, class_mass=mass)
        right, weights = (result.labels == truth)[y < 0], result.weights[y < 0]
        assert weights.unique().numel() > 20
        if 0 < right.sum() < len(right):
            better.append(roc_auc_score(right, weights))
    assert np.mean(better) > 0.55


@pytest.mark.parametrize("backend", BACKENDS)
def test_poisson_mbo_gives_classes_their_sizes(backend):
    x, y, _ = few_labels()
    for mass, sizes in (("equal", [300] * 5), ([5, 4, 3, 2, 1], [500, 400, 300, 200, 100])):
        result = propagate(x, y, 5, k=15, method="poisson_mbo", class_mass=mass, backend=backend)
        counts = torch.bincount(result.labels, minlength=5)
        assert (counts - torch.tensor(sizes)).abs().max() <= 8
        check_sound(result, y, 5)
        assert torch.equal(result.distributions[y < 0].argmax(1), result.labels[y < 0])


def test_poisson_mbo_begins_with_the_sizes_that_the_diffusion_finds():
    x, y, _ = few_labels(ratio=1.8)
    even = torch.bincount(propagate(x, y, 5, k=15, class_mass="uniform").labels, minlength=5)
    kept = torch.bincount(propagate(x, y, 5, k=15, method="poisson_mbo", class_mass="uniform").labels, minlength=5)
    assert (even - kept).abs().max() <= 8


def test_heat_flows_as_in_the_loops_of_algorithm_2():
    x, y, _ = clusters(60, c=3, noise=0.9)
    found = nearest_neighbours(normalise_rows(x), 6)
    graph = in_float64(affinity_graph(found))
    root = np.diag(np.sqrt(graph.degree.double().numpy()))
    w = root @ dense(graph) @ root
    laplacian = np.diag(w.sum(1)) - w
    start = torch.nn.functional.one_hot(torch.arange(60) % 3, 3).double()
    u = start.numpy().copy()
    source = np.zeros((60, 3))
    for i in np.flatnonzero(y >= 0):
        source[i] = np.eye(3)[y[i]] - 1 / 3
    dt = 1 / w.sum(1).max()
    for _ in range(40):
        u = u - dt * (laplacian @ u - source)
    seen = []
    inner = class_mass.assign
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_mass, "assign", lambda scores, *a: seen.append(scores) or inner(scores, *a))
        class_mass.volume_mbo(graph, y, start, None)
    np.testing.assert_allclose(seen[0].numpy(), u, atol=1e-6)


def test_assignment_is_nearly_the_best_of_its_sizes():
    scores = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([120.0, 90, 60, 30])
    labels, shift = class_mass.assign(scores, sizes, torch.zeros(4))
    counts = torch.bincount(labels, minlength=4)
    assert (counts - sizes).abs().max() <= 1.2
    places = np.repeat(np.arange(4), counts.numpy())
    rows, columns = linear_sum_assignment(-scores.numpy()[:, places])
    best = scores.numpy()[rows, places[columns]].sum()
    assert scores[torch.arange(300), labels].sum().item() == pytest.approx(best, rel=1e-6)
    assert torch.equal((scores + shift).argmax(1), labels)


def test_poisson_mbo_is_as_accurate_as_graphlearnings():
    graphlearning = pytest.importorskip("graphlearning", reason="graphlearning is not installed")
    differences = []
    for seed in range(5):
        x, y, truth = few_labels(seed=seed)
        graph = affinity_graph(nearest_neighbours(normalise_rows(x), 15))
        root = np.diag(graph.degree.sqrt().numpy())
        w = sparse.csr_matrix(root @ dense(graph) @ root)
        rows = np.flatnonzero(y >= 0)
        theirs = graphlearning.ssl.poisson_mbo(w, np.full(5, 0.2)).fit_predict(rows, y[rows].numpy())
        ours = propagate(x, y, 5, k=15, method="poisson_mbo", class_mass="equal")
        differences.append(accuracy(ours, y, truth) - float((theirs == truth.numpy())[y < 0].mean()))
    assert abs(np.mean(differences)) < 0.02


@pytest.mark.parametrize(("method", "mass"), CHOICES)
def test_every_choice_is_sound_where_points_are_missing_or_alike(method, mass):
    settings = {"method": method, "class_mass": mass}
    x, y, _ = clusters(60, d=6)
    x = torch.cat([x, torch.zeros(60, 6)], 1)
    x[10] = x[11] = 0
    x[20:26] = 0
    x[20:26, 8] = 1
    y[[10, *range(20, 26)]] = -1
    y[11] = 2
    y[y == 1] = 2
    result = propagate(x, y, 3, k=4, **settings)
    check_sound(result, y, 3)
    assert (~result.reached).nonzero().squeeze(1).tolist() == [10, *range(20, 26)]
    assert result.stats.unlabelled_classes == (1,)
    assert not (result.labels == 1).any()
    for n in (1, 2, 5):
        check_sound(propagate(*clusters(n, c=1, labelled=1)[:2], 2, **settings), clusters(n, c=1, labelled=1)[1], 2)
    y = torch.tensor([0, 1] + [-1] * 28)
    check_sound(propagate(torch.ones(30, 4), y, 2, k=40, **settings), y, 2)
    check_sound(propagate(torch.zeros(30, 4), y, 2, k=40, **settings), y, 2)
    one = torch.tensor([0] + [-1] * 29)
    result = propagate(torch.ones(30, 4), one, 1, k=4, **settings)
    check_sound(result, one, 1)
    assert (result.labels == 0).all()


@pytest.mark.parametrize(("method", "mass"), CHOICES)
def test_every_choice_is_the_same_again_and_on_either_backend(method, mass):
    x, y, _ = clusters(400, c=5)
    a, b, c = (
        propagate(x, y, 5, k=10, method=method, class_mass=mass, backend=backend)
        for backend in (BACKENDS[0], BACKENDS[0], BACKENDS[-1])
    )
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.distributions, b.distributions)
    assert (a.labels == c.labels).double().mean() > 0.99


# ---------------------------------------------------------------------------------------------------- hubs


@pytest.mark.parametrize("backend", BACKENDS)
def test_local_scaling_equals_the_loops(backend):
    x = clusters(40, d=4)[0]
    x[7] = 0
    unit = normalise_rows(x)
    found = nearest_neighbours(unit, 9, backend=backend)
    near, cosine = found.index.numpy(), found.similarity.double().numpy().copy()
    distance = np.sqrt(np.maximum(2 - 2 * cosine, 0))
    scale = distance[:, 6]
    w = np.zeros((40, 40))
    for i in range(40):
        for j, s, d in zip(near[i], cosine[i], distance[i], strict=True):
            a = math.exp(-(d**2) / (scale[i] * scale[j])) if s > 0 else 0
            w[i, j] += a
            w[j, i] += a
    degree = w.sum(1)
    graph = affinity_graph(found, affinity="local_scaling", backend=backend)
    np.testing.assert_allclose(graph.degree.numpy(), degree, rtol=1e-4)
    root = np.sqrt(np.where(degree > 0, degree, 1))
    np.testing.assert_allclose(dense(graph), w / root[:, None] / root, atol=1e-5)


def test_the_largest_in_degree_is_reported():
    x, y, _ = few_labels(300)
    result = propagate(x, y, 5, k=6)
    index = nearest_neighbours(normalise_rows(x), 6).index
    assert result.stats.in_degree == torch.bincount(index.view(-1)).max() > 12
    assert result.stats.k == 6


@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 1), (40, 7), (400, 12)])
def test_without_k_neighbours_grow_with_the_logarithm_of_the_points(n, k):
    x, y, _ = clusters(n, c=1, labelled=1)
    assert propagate(x, y, 1, k=None).stats.k == k


@pytest.mark.parametrize(
    ("setting", "known"), [("method", "diffusion, poisson_mbo"), ("affinity", "cosine, local_scaling")]
)
@pytest.mark.parametrize("wrong", ["gauss", 3, None, ["cosine"]])
def test_an_unknown_method_or_affinity_is_named(setting, known, wrong):
    x, y, _ = clusters()
    with pytest.raises(InputError, match=f"^{setting}: expected one of {known}, received "):
        propagate(x, y, 3, k=5, **{setting: wrong})


# ---------------------------------------------------------------------------------------------------- edge cases


def check_sound(result, y, c):
    """What holds of every propagation."""
    assert all(torch.isfinite(t).all() for t in (result.weights, result.class_weights, result.distributions))
    assert torch.isfinite(result.stats.residuals).all()
    assert ((result.weights >= 0) & (result.weights <= 1)).all()
    assert ((result.labels >= 0) & (result.labels < c)).all()
    torch.testing.assert_close(result.distributions.sum(1), torch.ones(len(y)))
    assert torch.equal(result.labels[y >= 0], y[y >= 0])
    assert (result.weights[y >= 0] == 1).all()
    assert (result.weights[~result.reached & (y < 0)] == 0).all()
    counted = result.labels[result.reached | (y >= 0)]
    assert result.class_weights[counted].sum().item() == pytest.approx(
        len(counted) / c * len(counted.unique()), rel=1e-5
    )
    assert (result.class_weights[torch.bincount(counted, minlength=c) == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_isolated_and_unreached_points_weigh_nothing(backend):
    x, y, _ = clusters(60, d=6)
    x = torch.cat([x, torch.zeros(60, 6)], 1)
    x[10] = x[11] = 0  # zero vectors
    x[12] = 0
    x[12, 6] = 1  # orthogonal to all others
    x[20:26] = 0
    x[20:26, 8] = 1  # an island of duplicates without a label
    y[[10, 11, 12, *range(20, 26)]] = -1
    y[11] = 2  # a labelled point without a neighbour
    y[y == 1] = 2  # class 1 has no label; class 2 the most
    result = propagate(x, y, 3, k=4, backend=backend)
    check_sound(result, y, 3)
    assert result.stats.isolated == 3
    assert result.stats.unreached == 8
    assert result.stats.unlabelled_classes == (1,)
    lost = [10, 12, *range(20, 26)]
    assert (~result.reached).nonzero().squeeze(1).tolist() == lost
    assert result.labels[lost].tolist() == [2] * 8
    assert result.distributions[lost].unique().tolist() == [pytest.approx(1 / 3)]
    assert (result.labels[11], result.weights[11]) == (2, 1)
    assert result.class_weights[1] == 0
    counts = torch.bincount(result.labels[result.reached], minlength=3)
    torch.testing.assert_close(result.class_weights[0], 52 / 3 / counts[0].float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_more_neighbours_than_points(backend, n):
    x, y, _ = clusters(n, c=1, labelled=1)
    result = propagate(x, y, 2, k=50, backend=backend)
    check_sound(result, y, 2)


def test_all_duplicates():
    y = torch.tensor([0, 1] + [-1] * 28)
    result = propagate(torch.ones(30, 4), y, 2, k=40, max_iter=200)
    check_sound(result, y, 2)
    assert (result.weights[2:] <= 1e-5).all() or result.weights.max() == 1


def test_one_class():
    x, y, _ = clusters(50, c=1)
    result = propagate(x, y, 1, k=5)
    check_sound(result, y, 1)
    assert (result.weights == 1).all()
    assert result.class_weights.tolist() == [1]


def test_all_labelled():
    x, _, truth = clusters(50)
    result = propagate(x, truth, 3, k=5)
    check_sound(result, truth, 3)
    assert torch.equal(result.class_weights, class_weights(truth, 3))


def test_no_certainty_anywhere_gives_no_weight():
    y = torch.tensor([0, 1, -1, -1])
    _, weights, distributions, reached = pseudo_labels(torch.ones(4, 2), y)
    assert weights.tolist() == [1, 1, 0, 0]
    assert reached.all()
    assert (distributions == 0.5).all()


def test_points_without_neighbours_are_solved_at_once_and_exactly():
    result = propagate(torch.eye(4), torch.tensor([0, 1, -1, -1]), 2, k=2, tol=0)
    assert result.stats.residuals.tolist() == [0, 0]
    assert result.stats.converged
    assert (result.stats.iterations, result.stats.isolated, result.stats.unreached) == (1, 4, 2)


def test_seconds_are_those_of_the_parts():
    x, y, _ = clusters()
    start = time.perf_counter()
    stats = propagate(x, y, 3, k=8).stats
    assert 0 < sum(stats.seconds.values()) < time.perf_counter() - start


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_of_the_graph_are_int32(backend):
    x, _, _ = clusters()
    found = nearest_neighbours(normalise_rows(x), 5, backend=backend)
    graph = affinity_graph(found, backend=backend)
    assert found.index.dtype == graph.offsets.dtype == graph.columns.dtype == torch.int32


def test_iterations_and_convergence_are_reported_as_they_were():
    x, y, _ = clusters(300)
    short = propagate(x, y, 3, k=10, max_iter=3)
    long = propagate(x, y, 3, k=10, max_iter=500, tol=1e-5)
    assert (short.stats.iterations, short.stats.converged) == (3, False)
    assert 3 < long.stats.iterations < 500
    assert long.stats.converged
    assert (long.stats.residuals <= 1e-5).all()
    graph = in_float64(affinity_graph(nearest_neighbours(normalise_rows(x), 10)))
    a, rhs = np.eye(300) - 0.99 * dense(graph), (y == 0).double().numpy() / 2
    z = oracle_cg(a, rhs, 3)
    assert short.stats.residuals[0].item() == pytest.approx(np.linalg.norm(rhs - a @ z) / np.linalg.norm(rhs), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.0}, r"^alpha: .*\b1\.0"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": math.nan}, "alpha.*nan"),
        ({"gamma": 0}, r"^gamma: .*\b0$"),
        ({"k": 0}, r"^k\b.*\b1, .*\b0\b"),
        ({"max_iter": 0}, r"^max_iter: .*\b1, .*\b0$"),
        ({"max_iter": 2.5}, r"^max_iter: .*whole.*2\.5"),
        ({"k": 2.5}, r"^k: .*whole number of at least 1, .*2\.5"),
        ({"probes": "4"}, "^probes: .*'4'"),
        ({"seed": None}, "^seed: .*None"),
        ({"approximate_above": 1.5}, r"^approximate_above: .*1\.5"),
        ({"gamma": "3"}, "^gamma: .*'3'"),
        ({"alpha": None}, "^alpha: .*None"),
        ({"tol": -1}, r"^tol: .*\b0, .*-1"),
        ({"tol": "small"}, "^tol: .*'small'"),
        ({"neighbours": "some"}, "^neighbours: .*auto, exact, approximate, .*'some'"),
        ({"backend": "gpu"}, "^backend: .*auto, faiss, torch, .*'gpu'"),
        ({"labels": torch.full((120,), -1)}, "^labels: .*labelled"),
        ({"labels": torch.full((120,), 3)}, r"^labels: .*-1 .*\b2 .*\b3 to 3"),
        ({"labels": torch.full((120,), -2)}, "^labels: .*-2 to -2"),
        ({"labels": torch.zeros(7).long()}, r"^labels: .*\b120 .*\(7,\)"),
        ({"labels": torch.zeros(120)}, r"^labels: .*\b120 integers.*float32"),
        ({"features": torch.zeros(120)}, r"^features: .*\(n, d\).*\(120,\)"),
        ({"labels": torch.full((120,), 255).byte(), "num_classes": 256}, r"^labels: 255 .*-1 .*uint8"),
        ({"labels": torch.zeros(120).cfloat()}, r"^labels: .*\b120 integers.*complex64"),
        ({"features": torch.zeros(120, 2).cfloat()}, "^features: .*real.*complex64"),
        ({"num_classes": 0}, r"^num_classes: .*\b1, .*\b0\b"),
        ({"num_classes": 2.5}, r"^num_classes: .*whole.*2\.5"),
        ({"features": torch.zeros(0, 3), "labels": torch.zeros(0).long()}, "^labels: .*labelled"),
    ],
)
def test_wrong_input_is_named(change, message):
    x, y, _ = clusters()
    arguments = {"features": x, "labels": y, "num_classes": 3} | change
    with pytest.raises(InputError, match=message):
        propagate(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbours", ["exact", "approximate"])
def test_numpys_numbers_are_as_good_as_pythons(backend, neighbours):
    x, y, _ = clusters()
    given = {
        "k": 7,
        "gamma": 2.5,
        "alpha": 0.75,
        "max_iter": 9,
        "tol": 0.125,
        "approximate_above": 90,
        "probes": 3,
        "seed": 5,
    }
    expected = propagate(x, y, 3, backend=backend, neighbours=neighbours, **given)
    for kind in (np.int16, np.uint8):
        scalars = {n: np.float32(v) if isinstance(v, float) else kind(v) for n, v in given.items()}
        result = propagate(x, y.to(torch.int16), kind(3), backend=backend, neighbours=neighbours, **scalars)
        assert torch.equal(result.labels, expected.labels)
        assert torch.equal(result.weights, expected.weights)


def test_labels_of_an_unsigned_dtype_are_all_labelled():
    x, _, truth = clusters()
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(propagate(x, truth.to(dtype), 3, k=5).labels, truth)


def test_seeds_of_more_than_32_bits_are_as_good_as_any():
    x, y, _ = clusters()
    for seed in (2**31, 2**40):
        assert propagate(x, y, 3, k=5, neighbours="approximate", seed=seed).stats.neighbours == "approximate"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_in_one_line(value):
    x, y, _ = clusters()
    x[3, 1] = x[5, 2] = value
    with pytest.raises(InputError, match=r"^features: .*\b2 of 120 rows") as caught:
        propagate(x, y, 3)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 4),
    c=st.integers(1, 4),
    k=st.integers(1, 14),
    gamma=st.sampled_from([0.5, 1.0, 3.0, 20.0]),
    alpha=st.sampled_from([1e-3, 0.5, 0.99, 1 - 1e-7]),
    scale=st.sampled_from([1e-38, 1.0, 1e38]),
    max_iter=st.integers(1, 40),
    backend=st.sampled_from(BACKENDS),
    method=st.sampled_from(["exact", "approximate"]),
    data=st.data(),
)
def test_sound_for_any_small_input(n, d, c, k, gamma, alpha, scale, max_iter, backend, method, data):
    # few distinct entries: duplicates, opposites and zero vectors are common
    x = data.draw(
        st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.5, 1.0]), min_size=d, max_size=d), min_size=n, max_size=n)
    )
    y = data.draw(st.lists(st.integers(-1, c - 1), min_size=n, max_size=n).filter(lambda y: max(y) >= 0))
    y = torch.tensor(y)
    result = propagate(
        torch.tensor(x) * scale,
        y,
        c,
        k=k,
        gamma=gamma,
        alpha=alpha,
        max_iter=max_iter,
        backend=backend,
        neighbours=method,
    )
    check_sound(result, y, c)


# ---------------------------------------------------------------------------------------------------- it learns


def test_follows_moons_where_the_nearest_label_misleads():
    x, truth = make_moons(600, noise=0.06, random_state=0)
    y = np.full(600, -1)
    for j in range(2):  # one label per moon
        y[np.flatnonzero(truth == j)[0]] = j
    # the cosine knows directions only: random features of a Gaussian kernel turn distances into them
    rng = np.random.default_rng(0)
    lifted = np.cos(x @ rng.normal(size=(2, 500)) * 4 + rng.uniform(0, 2 * np.pi, 500))
    ours = DiffusionLabelPropagation(k=10, max_iter=200, tol=1e-5).fit(lifted, y)
    nearest = KNeighborsClassifier(1).fit(lifted[y >= 0], y[y >= 0])
    assert (ours.transduction_ == truth).mean() > 0.95
    assert (nearest.predict(lifted) == truth).mean() < 0.9


def test_digits_with_one_label_per_class():
    x, truth = load_digits(return_X_y=True)
    scores, nearest = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        y = np.full(len(truth), -1)
        for j in range(10):
            y[rng.choice(np.flatnonzero(truth == j))] = j
        model = DiffusionLabelPropagation(k=10).fit(x - x.mean(0), y)
        scores.append((model.transduction_ == truth).mean())
        nearest.append((KNeighborsClassifier(1).fit(x[y >= 0], y[y >= 0]).predict(x) == truth).mean())
        sure = model.weights_ > np.median(model.weights_)
        right = model.transduction_ == truth
        assert right[sure].mean() > right[~sure].mean()  # weights order points by how right they are
    assert np.mean(scores) > 0.75
    assert np.mean(scores) > np.mean(nearest) + 0.1
