"""DiffusionLabelPropagation: scikit-learn's checks, labels of any kind, score, sparse features, warnings."""

import inspect
import re
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.utils.estimator_checks import parametrize_with_checks
from test_propagation import BACKENDS, clusters

from muscle_plugin.errors import InputError
from muscle_plugin.propagation import DiffusionLabelPropagation, propagate
from muscle_plugin.propagation import graph as graph_module


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_estimator_attributes(kind):
    x, y, truth = clusters(120, c=3)
    names = np.array([4, 7, 9])
    y = np.where(y >= 0, names[y], -1)
    model = DiffusionLabelPropagation(k=8)
    assert model.fit(kind(x), kind(y)) is model
    expected = propagate(
        x, torch.from_numpy(np.where(y >= 0, np.searchsorted(names, y), -1)), 3, k=8, class_mass="uniform"
    )
    assert model.classes_.tolist() == [4, 7, 9]
    np.testing.assert_array_equal(model.transduction_, names[expected.labels.numpy()])
    np.testing.assert_array_equal(model.weights_, expected.weights.numpy())
    np.testing.assert_array_equal(model.class_weights_, expected.class_weights.numpy())
    assert model.label_distributions_.shape == (120, 3)
    assert model.residuals_.shape == (3,)
    assert (model.n_iter_, model.converged_, model.neighbours_) == (expected.stats.iterations, False, "exact")
    assert set(model.timings_) == {"knn", "graph", "diffusion"}
    assert all(isinstance(getattr(model, a), np.ndarray) for a in ("transduction_", "weights_", "residuals_"))
    assert model.score(kind(x), names[truth.numpy()]) > 0.9
    np.testing.assert_allclose(model.predict_proba(kind(x)).sum(1), 1, rtol=1e-5)


def test_estimator_predicts_new_points_by_their_neighbours():
    x, y, truth = clusters(400, c=4, noise=0.3)
    model = DiffusionLabelPropagation(k=10).fit(x[:300], y[:300])
    assert (model.predict(x[300:]) == truth[300:].numpy()).mean() > 0.95
    np.testing.assert_allclose(model.predict_proba(torch.zeros(2, 8)), 0.25)
    for wrong in (np.zeros((5, 3)), torch.zeros(5, 3)):
        with pytest.raises(ValueError, match=r"3 features.* 8 features"):
            model.predict(wrong)


def test_estimator_settings_are_those_of_propagate_with_defaults_for_few_labels():
    model = DiffusionLabelPropagation(k=7, gamma=2.0, backend="torch")
    assert clone(model).get_params() == model.get_params()
    ours = DiffusionLabelPropagation().get_params()
    assert ours.pop("num_classes") is None
    signature = inspect.signature(propagate).parameters
    papers = {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}
    assert ours == papers | {"class_mass": "uniform", "k": None}
    assert (papers["class_mass"], papers["k"]) == ("none", 50)


def test_estimator_warns_of_points_and_classes_left_out():
    x, y, _ = clusters()
    x[5] = 0
    y[5] = -1
    with pytest.warns(UserWarning, match=r"\b1 of 120 points .*\b1 isolated.*\b1 of 4 classes"):
        model = DiffusionLabelPropagation(k=8, num_classes=4).fit(x, y)
    assert model.classes_.tolist() == [0, 1, 2, 3]
    assert (model.n_isolated_, model.n_unreached_) == (1, 1)
    assert model.class_weights_[3] == 0


@pytest.mark.parametrize(("classes", "text"), [(None, r"\b1 of 120 points"), (4, r"\b1 of 4 classes")])
def test_estimator_warns_of_either_where_it_is_called(classes, text):
    x, y, _ = clusters()
    if classes is None:
        x[5] = 0
        y[5] = -1
    with pytest.warns(UserWarning, match=text) as caught:
        DiffusionLabelPropagation(k=8, num_classes=classes).fit(x, y)
    assert [w.filename for w in caught] == [__file__]


def test_estimator_by_hand():
    # One neighbour, whose affinity is 0.8 ^ 3: new points have its distribution. Opposite to all: uniform.
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]]), torch.tensor([3, -1, 5, -1])
    model = DiffusionLabelPropagation(k=1).fit(x, y)
    expected = [[1, 0], [0, 1], [0.5, 0.5]]
    np.testing.assert_allclose(model.predict_proba(np.array([[0.8, -0.6], [-0.6, 0.8], [-1, -1]])), expected, atol=1e-6)
    # two neighbours: weights 1 and 0.6 ^ 3
    model.set_params(k=2, gamma=3.0)
    x[1], x[3] = torch.tensor([-1.0, 0.0]), torch.tensor([0.0, -1.0])
    model.fit(x, torch.tensor([3, 3, 5, 5]))
    a, b = 0.8**3, 0.6**3
    share = np.array([[a, b]]) @ model.label_distributions_[[0, 2]] / (a + b)
    np.testing.assert_allclose(model.predict_proba(np.array([[0.8, 0.6]])), share, atol=1e-6)


def test_estimator_of_one_class():
    x, y, _ = clusters(50, c=1)
    model = DiffusionLabelPropagation(k=5).fit(x, y)
    assert model.label_distributions_.shape == (50, 1)
    assert (model.transduction_ == 0).all()


def test_estimator_takes_tensors_that_numpy_does_not_know():
    x, y, truth = clusters(noise=0.3)
    model = DiffusionLabelPropagation(k=8).fit(x.bfloat16(), y)
    assert model.score(x.bfloat16(), truth) > 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_estimator_takes_what_a_net_gives(backend):
    x, y, _ = clusters()
    expected = DiffusionLabelPropagation(k=8, backend=backend).fit(x, y).predict(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = DiffusionLabelPropagation(k=8, backend=backend).fit(x.requires_grad_(), y)
        assert (model.predict(x) == expected).mean() > 0.95


@pytest.mark.parametrize("ask", ["predict", "predict_proba", "score"])
def test_estimator_that_is_not_fitted_says_so(ask):
    x, y, truth = clusters()
    model = DiffusionLabelPropagation(k=0)
    for _ in range(2):
        with pytest.raises(NotFittedError):
            getattr(model, ask)(*((x, truth) if ask == "score" else (x,)))
        with pytest.raises(InputError, match="^k: "):  # a fit that fails fits nothing
            model.fit(x, y)


def test_a_fit_that_fails_leaves_the_one_before():
    x, y, _ = clusters()
    model = DiffusionLabelPropagation(k=5).fit(x, y)
    before = model.predict(x)
    with pytest.raises(InputError, match="^y: "):
        model.fit(x, y - 5)
    np.testing.assert_array_equal(model.predict(x), before)


def test_grid_search_over_numpys_numbers():
    x, _, truth = clusters()
    grid = {
        "k": np.arange(3, 9, 2),
        "gamma": np.float32([1, 3]),
        "max_iter": np.arange(4, 6),
        "tol": np.logspace(-6, -5, 2),
        "num_classes": np.array([None, np.int8(3)]),
        "backend": np.array(["auto", "torch"]),
        "neighbours": np.array(["auto", "exact"], dtype=np.str_),
    }
    search = GridSearchCV(DiffusionLabelPropagation(), grid, cv=2, error_score="raise").fit(x.numpy(), truth.numpy())
    assert search.best_score_ > 0.8
    assert search.best_params_["k"] in (3, 5, 7)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"k": 2.5}, "k"), ({"k": 0}, "k"), ({"gamma": -1}, "gamma"), ({"num_classes": 2.5}, "num_classes")],
)
def test_estimator_names_a_wrong_setting_in_fit_and_in_predict(changes, name):
    x, y, _ = clusters()
    with pytest.raises(InputError, match=f"^{name}: .*received {next(iter(changes.values()))}"):
        DiffusionLabelPropagation(**changes).fit(x, y)
    if name != "num_classes":
        with pytest.raises(InputError, match=f"^{name}: "):
            DiffusionLabelPropagation().fit(x, y).set_params(**changes).predict(x)


def test_columns_of_a_table_keep_their_places():
    x, y, _ = clusters()
    table = pd.DataFrame(x.numpy(), columns=list("abcdefgh"))
    model = DiffusionLabelPropagation(k=5).fit(table, pd.Series(y.numpy(), index=range(7, 127)))
    assert model.feature_names_in_.tolist() == list("abcdefgh")
    assert (model.n_features_in_, len(model.predict(table))) == (8, 120)
    for other in (table[list("hgfedcba")], table.rename(columns={"a": "z"})):
        with pytest.raises(ValueError, match="feature names should match"):
            model.predict(other)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("classes", [None, 256])
def test_a_minus_one_that_wrapped_around_is_no_class(dtype, kind, classes):
    x, y, truth = clusters()
    wrapped = y.numpy().astype(dtype)
    with pytest.raises(InputError, match=rf"^y: {wrapped.max()} .*-1 .*{dtype}"):
        DiffusionLabelPropagation(k=5, num_classes=classes).fit(x, kind(wrapped))
    model = DiffusionLabelPropagation(k=5).fit(x, kind(truth.numpy().astype(dtype)))
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.predict(x).dtype == dtype


def test_estimator_takes_arrays_of_any_layout_without_a_word(recwarn):
    x, y, _ = clusters()
    x, y = x.float().numpy(), y.numpy()
    expected = DiffusionLabelPropagation(k=5, num_classes=3).fit(x, y).weights_
    read_only = x.copy(), y.copy()
    for array in read_only:
        array.flags.writeable = False
    for arrays in ((x.tolist(), y.tolist()), (np.asfortranarray(x), y[::-1].copy()[::-1]), read_only,
                  (x.astype(">f8"), y.astype(">i8")), (x.astype(np.longdouble), y), (x.astype(object), y)):  # fmt: skip
        model = DiffusionLabelPropagation(k=5, num_classes=3).fit(*arrays)
        np.testing.assert_allclose(model.weights_, expected, atol=1e-5)
        assert (model.predict(arrays[0]) == model.predict(x)).all()
    assert not [w for w in recwarn if w.category is UserWarning]


def test_estimator_refuses_what_it_cannot_read():
    x, y, _ = clusters()
    for target, text in (
        (y + 0.5, "[Cc]ontinuous"),
        (y.numpy() * 1j, "[Cc]omplex"),
        (np.stack([y, y], 1), "1d array"),
        (y[:7], "inconsistent numbers of samples"),
        (None, "requires y"),
        (np.array([{}] * 120, dtype=object), "Unknown label type"),
        (np.array(["a", 1] * 60, dtype=object), "^y: .*strings .*numbers"),
        (y - 5, "^y: .*-1 .*at least 0, .*-6"),
        (np.full(120, -1), r"^y: .*one labelled point.*\b120\b"),
        (np.full(120, np.nan), "^y: .*one labelled point"),
        (np.array(["a", -1] * 60), "^y: '-1' .*string.*None"),
        (np.array(["a", np.nan] * 60), "^y: .*'nan' .*string.*None"),
        (np.array(["a", "-1"] * 60, dtype=object), "^y: '-1' .*string.*None"),
    ):
        with pytest.raises(ValueError, match=text):
            DiffusionLabelPropagation().fit(x, target)
    for features, error, text in (
        (np.array([["a"]] * 120), ValueError, "could not convert string"),
        (np.full((120, 2), np.nan), ValueError, "NaN"),
        (sparse.csr_array(np.full((120, 2), np.nan)), ValueError, "NaN"),
        (torch.zeros(120), ValueError, "2D"),
        (x.to_sparse(), InputError, "^features: .*dense.*sparse_coo"),
    ):
        with pytest.raises(error, match=text):
            DiffusionLabelPropagation().fit(features, y)


# ---------------------------------------------------------------------------------------------------- scikit-learn


@parametrize_with_checks([DiffusionLabelPropagation()])
def test_scikit_learns_own_checks(estimator, check):
    if check.func.__name__ == "check_classifiers_classes":
        # One of its classes is -1, which is unlabelled here; it exempts its own semi-supervised estimators by name.
        check = partial(check.func, "LabelSpreading")
    check(estimator)


def test_works_where_only_torch_scikit_learn_and_faiss_are_installed():
    code = """
import sys
for absent in ("semilearn", "pandas", "timm", "torchvision", "pydantic", "ruamel", "rich", "matplotlib"):
    sys.modules[absent] = None  # importing it is an ImportError
import numpy as np
from muscle_plugin.propagation import DiffusionLabelPropagation
x = np.random.default_rng(0).normal(size=(40, 3)) + np.repeat([[0, 0, 9], [9, 0, 0]], 20, axis=0)
y = np.array(["cat", *[None] * 19, "dog", *[float("nan")] * 19], dtype=object)
print(DiffusionLabelPropagation(k=5).fit(x, y).predict(x[[1, 21]]).tolist())
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (shown.stdout, shown.stderr) == ("['cat', 'dog']\n", "")


# ---------------------------------------------------------------------------------------------------- labels

NAMES = np.array(["cat", "dog", "owl"])


def named(y, unlabelled, dtype=object):
    """``y`` as names, with ``unlabelled`` in place of -1."""
    return np.array([unlabelled if j < 0 else str(NAMES[j]) for j in y], dtype=dtype)


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: named(y, -1),
        lambda y: named(y, None),
        lambda y: named(y, np.nan),
        lambda y: named(y, pd.NA),
        lambda y: named(y, None).tolist(),
        lambda y: named(y, -1).tolist(),
        lambda y: tuple(named(y, np.nan)),
        lambda y: pd.Series(named(y, None)),
        lambda y: pd.Series(named(y, None), dtype="string"),
        lambda y: pd.Series(named(y, None), dtype="category", index=range(5, 125)),
        lambda y: pd.Categorical(named(y, None)),
        lambda y: pd.Series(named(y, -1), dtype="category"),
    ],
)
def test_strings_are_classes(kind):
    x, y, truth = clusters(noise=0.3)
    expected = DiffusionLabelPropagation(k=8).fit(x, y)
    model = DiffusionLabelPropagation(k=8).fit(x, kind(y))
    assert model.classes_.tolist() == NAMES.tolist()
    np.testing.assert_array_equal(model.transduction_, NAMES[expected.transduction_])
    np.testing.assert_array_equal(model.label_distributions_, expected.label_distributions_)
    np.testing.assert_array_equal(model.predict(x), NAMES[expected.predict(x)])
    accuracy = expected.score(x, y)
    assert model.score(x, kind(y)) == accuracy == (expected.predict(x) == truth.numpy())[y >= 0].mean()
    assert model.score(x, NAMES[truth]) == expected.score(x, truth)  # of a fixed length, since all have a label


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (lambda y: y.double(), "float64"),
        (lambda y: np.where(y >= 0, y, np.nan), "float64"),
        (lambda y: np.where(y >= 0, y, np.nan).astype(np.float32), "float32"),
        (lambda y: y.numpy().astype(object), "int64"),
        (lambda y: np.where(y >= 0, y.numpy().astype(object), None), "int64"),
        (lambda y: [None if j < 0 else int(j) for j in y], "int64"),
        (lambda y: pd.Series(y).where(pd.Series(y) >= 0), "float64"),
        (lambda y: pd.Series(y).where(pd.Series(y) >= 0).astype("Int64"), None),  # of pandas
        (lambda y: pd.Series(y, dtype="Int64"), "int64"),
        (lambda y: pd.Series(y).where(pd.Series(y) >= 0).astype("category"), "float64"),
    ],
)
@pytest.mark.parametrize("classes", [None, 3])
def test_numbers_of_any_kind_are_classes(kind, dtype, classes):
    x, y, truth = clusters()
    expected = DiffusionLabelPropagation(k=8).fit(x, y)
    model = DiffusionLabelPropagation(k=8, num_classes=classes).fit(x, kind(y))
    assert model.classes_.tolist() == [0, 1, 2]
    assert classes or dtype is None or model.classes_.dtype == dtype
    np.testing.assert_array_equal(model.transduction_, expected.transduction_)
    assert model.score(x, kind(y)) == expected.score(x, y)
    assert model.score(x, truth) == expected.score(x, truth)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda y: y.tolist(), lambda y: y.astype(object)])
def test_booleans_are_classes(kind):
    x, y, truth = clusters(c=2, noise=0.3)
    model = DiffusionLabelPropagation(k=8).fit(x, kind(truth.numpy() == 1))
    assert model.classes_.dtype == bool
    assert model.score(x, truth.numpy() == 1) > 0.9
    expected = DiffusionLabelPropagation(k=8).fit(x, y).transduction_ == 1
    for some in (np.where(y >= 0, y.numpy() == 1, None), pd.Series(y == 1).astype("boolean").where(pd.Series(y >= 0))):
        model = DiffusionLabelPropagation(k=8).fit(x, some)
        assert model.classes_.tolist() == [False, True]
        np.testing.assert_array_equal(model.transduction_, expected)


def test_a_column_of_labels_is_taken_with_scikit_learns_warning():
    x, y, _ = clusters()
    expected = DiffusionLabelPropagation(k=8).fit(x, y).transduction_
    for column in (pd.DataFrame({"label": y}), y.numpy()[:, None]):
        with pytest.warns(DataConversionWarning, match="column-vector"):
            model = DiffusionLabelPropagation(k=8).fit(x, column)
        np.testing.assert_array_equal(model.transduction_, expected)


@pytest.mark.parametrize("labels", [named([0, 1] * 60, None), np.arange(120) % 2 == 0, np.arange(120) % 4])
def test_number_of_classes_is_for_integers_below_it(labels):
    with pytest.raises(
        InputError, match=r"^num_classes: 3 expects integer labels 0 to 2, .*received label (dog|True|3)$"
    ):
        DiffusionLabelPropagation(num_classes=3).fit(clusters()[0], labels)


def test_one_label_of_each_of_many_classes_is_no_surprise(recwarn):
    x, y, _ = clusters(300, c=40, labelled=1)
    DiffusionLabelPropagation(k=8).fit(x, y)
    assert not [w for w in recwarn if "unique classes" in str(w.message)]


# ---------------------------------------------------------------------------------------------------- score


def test_points_without_a_label_do_not_count_in_the_score():
    x, y, truth = clusters(noise=1.5)
    model = DiffusionLabelPropagation(k=8).fit(x, y)
    right, some = model.predict(x) == truth.numpy(), np.arange(120) % 3 > 0
    assert 0 < right[some].mean() < 1
    for missing in (np.where(some, truth, -1), np.where(some, truth, np.nan)):
        assert model.score(x, missing) == pytest.approx(right[some].mean())
        weights = np.arange(120)
        assert model.score(x, missing, weights) == pytest.approx(np.average(right[some], weights=weights[some]))
    with pytest.raises(InputError, match="^y: .*one labelled point"):
        model.score(x, np.full(120, -1))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.score(x, truth[:7])


@pytest.mark.parametrize("kind", [np.asarray, lambda y: named(y, None)])
def test_grid_search_on_partly_labelled_data_ranks_by_the_labelled(kind):
    x, y, _ = clusters(200, labelled=12, noise=0.3)
    search = GridSearchCV(
        DiffusionLabelPropagation(), {"k": [5, 10]}, cv=KFold(3, shuffle=True, random_state=0), error_score="raise"
    )
    assert search.fit(x.numpy(), kind(y.numpy())).best_score_ > 0.9


# ---------------------------------------------------------------------------------------------------- sparse features


def sparse_clusters():
    x, y, truth = clusters(150, d=30, noise=0.5)
    x = np.where(np.abs(x.numpy()) > 0.8, x.numpy(), 0)
    x[9], y[9] = 0, -1
    return x, y.numpy(), truth.numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csr_matrix, sparse.csc_array, sparse.coo_array])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_sparse_features_are_as_good_as_dense_ones(monkeypatch, backend, kind, dtype):
    x, y, truth = sparse_clusters()
    x = (x * 10).round().astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the row of zeros is isolated
        whole = DiffusionLabelPropagation(k=8, backend=backend, approximate_above=10, neighbours="exact").fit(x, y)
        model = DiffusionLabelPropagation(k=8, backend=backend, approximate_above=10)
        model.fit(kind(x), y)
    assert model.neighbours_ == "exact"  # "auto" is, too
    np.testing.assert_array_equal(model.transduction_, whole.transduction_)
    np.testing.assert_allclose(model.weights_, whole.weights_, atol=1e-5)
    for ours in (model, whole):
        for new in (x, kind(x), torch.from_numpy(x)):
            np.testing.assert_allclose(ours.predict_proba(new), whole.predict_proba(x), atol=1e-5)
    assert model.score(kind(x), truth) == whole.score(x, truth) > 0.9


def test_sparse_features_are_never_made_dense_as_a_whole(monkeypatch):
    x, y, _ = sparse_clusters()
    shapes = []
    for name in ("csr_array", "csr_matrix"):
        dense = getattr(sparse, name).toarray
        monkeypatch.setattr(
            getattr(sparse, name), "toarray", lambda m, *a, _d=dense: shapes.append(m.shape) or _d(m, *a)
        )
    wide = sparse.hstack([sparse.csr_array(x), sparse.csr_array((150, 1_000_000))]).tocsr()
    with pytest.warns(UserWarning, match="1 isolated"):
        DiffusionLabelPropagation(k=8).fit(wide, y).predict(wide)
    assert shapes
    assert all(columns <= 150 for _, columns in shapes)


def test_sparse_entries_of_the_same_place_are_added():
    rows = sparse.csr_array((np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    unit = graph_module.normalise_rows(graph_module.SparseRows(rows)).matrix
    np.testing.assert_allclose(unit.toarray(), [[0.6, 0.8]])
    assert rows.nnz == 3


def test_sparse_features_are_searched_in_blocks(monkeypatch):
    x, _, _ = sparse_clusters()
    sizes = []
    inner = graph_module.inner_products
    monkeypatch.setattr(graph_module, "inner_products", lambda a, b: sizes.append(len(a)) or inner(a, b))
    monkeypatch.setattr(graph_module, "ENTRIES", {"cpu": 150 * 40})
    rows = graph_module.normalise_rows(graph_module.SparseRows(sparse.csr_array(x)))
    found = graph_module.nearest_neighbours(rows, 5)
    assert sizes == [40, 40, 40, 30]
    expected = graph_module.nearest_neighbours(graph_module.normalise_rows(torch.from_numpy(x)), 5)
    torch.testing.assert_close(found.similarity, expected.similarity, atol=1e-6, rtol=0)


def test_approximate_neighbours_need_dense_features():
    x, y, _ = sparse_clusters()
    with pytest.raises(InputError, match="^neighbours: sparse .*'exact' or 'auto'.*'approximate'$"):
        DiffusionLabelPropagation(neighbours="approximate").fit(sparse.csr_array(x), y)


# ---------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"max_iter": 5}, False),  # a smaller budget
        ({"tol": 0}, False),  # the whole budget, whatever the residual
        ({"tol": 0, "max_iter": 30}, False),
        ({"tol": 1e-7}, True),
        ({"max_iter": 25}, True),
        ({"max_iter": 500, "tol": 1e-5}, False),  # it converges
    ],
)
def test_no_convergence_is_told_to_those_who_asked_for_it(recwarn, settings, warned):
    x, y, _ = clusters(300)
    model = DiffusionLabelPropagation(k=10, **settings).fit(x, y)
    assert model.converged_ == (settings.get("max_iter") == 500)
    said = [w for w in recwarn if w.category is ConvergenceWarning]
    assert len(said) == warned
    for warning in said:
        assert warning.filename == __file__
        assert re.search(r"relative residual \S+e-0\d after \d+ iterations, .*raise max_iter", str(warning.message))


def test_warning_of_points_left_out_says_what_helps():
    x, y, _ = clusters()
    x[5] = 0
    y[5] = -1
    with pytest.warns(UserWarning, match="larger k.*labels"):
        DiffusionLabelPropagation(k=8).fit(x, y)
