"""DiffusionLabelPropagation: attributes, settings, inputs."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from test_propagation import clusters

from muscle_plugin.errors import InputError
from muscle_plugin.propagation import DiffusionLabelPropagation, propagate


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_estimator_attributes(kind):
    x, y, truth = clusters(120, c=3)
    names = np.array([4, 7, 9])
    y = np.where(y >= 0, names[y], -1)
    model = DiffusionLabelPropagation(k=8)
    assert model.fit(kind(x), kind(y)) is model
    expected = propagate(x, torch.from_numpy(np.where(y >= 0, np.searchsorted(names, y), -1)), 3, k=8)
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


def test_estimator_settings_are_those_of_propagate():
    model = DiffusionLabelPropagation(k=7, gamma=2.0, backend="torch")
    assert clone(model).get_params() == model.get_params()
    ours = model.set_params(k=50, gamma=3.0, backend="auto").get_params()
    del ours["num_classes"]
    signature = inspect.signature(propagate).parameters
    assert ours == {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}


def test_estimator_has_the_defaults_of_propagate():
    ours = DiffusionLabelPropagation().get_params()
    assert ours.pop("num_classes") is None
    assert ours == {n: inspect.signature(propagate).parameters[n].default for n in ours}


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
    with pytest.raises(InputError, match="^labels: "):
        model.fit(x, y - 5)
    np.testing.assert_array_equal(model.predict(x), before)


def test_grid_search_over_numpys_numbers():
    x, _, truth = clusters()
    grid = {"k": np.arange(3, 9, 2), "gamma": np.float32([1, 3]), "max_iter": np.arange(4, 6), "seed": np.arange(2)}
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
    with pytest.raises(InputError, match="^y: .*integers"):
        DiffusionLabelPropagation().fit(x, y.double())
    with pytest.raises(ValueError, match="could not convert string"):
        DiffusionLabelPropagation().fit(np.array([["a"], ["b"]]), np.array([0, -1]))
    with pytest.raises(TypeError, match="[Ss]parse"):
        DiffusionLabelPropagation().fit(sparse.csr_array(x.numpy()), y)
    with pytest.raises(ValueError, match="NaN"):
        DiffusionLabelPropagation().fit(np.full((120, 2), np.nan), y)
    with pytest.raises(ValueError, match="2D"):
        DiffusionLabelPropagation().fit(torch.zeros(120), y)
    with pytest.raises(InputError, match="one labelled point"):
        DiffusionLabelPropagation().fit(x, np.full(120, -1))
