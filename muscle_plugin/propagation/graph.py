"""The normalised nearest-neighbour graph of label propagation: A, W and S of ``docs/propagation.md``, (n, n) each.

Values are float32 and indices int32. CPU tensors go through faiss and SciPy (backend "faiss"), CUDA tensors and CPUs
without faiss through torch alone (backend "torch").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy import sparse
from sklearn.preprocessing import normalize
from torch import Tensor

from muscle_plugin.errors import InputError

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

BACKENDS = ("auto", "faiss", "torch")
NEIGHBOURS = ("auto", "exact", "approximate")
AFFINITIES = ("cosine", "local_scaling")
LOCAL_SCALE = 7  # the neighbour whose distance is the local scale
BLOCK = 1 << 16  # rows handled at a time where a temporary of all rows would cost memory
ENTRIES = {"cpu": 1 << 24, "cuda": 1 << 27}  # of a block of inner products: 64 and 512 MiB


def choose_backend(backend: str, device: torch.device) -> str:
    """Return "faiss" or "torch"; "auto" is "faiss" for CPU tensors where faiss can be imported."""
    if choice("backend", backend, BACKENDS) == "auto":
        return "faiss" if device.type == "cpu" and faiss is not None else "torch"
    if backend == "faiss" and device.type != "cpu":
        raise InputError(f"backend: 'faiss' expects CPU tensors, received features on {device}")
    if backend == "faiss" and faiss is None:
        raise ImportError("backend 'faiss' needs faiss: pip install faiss-cpu")
    return backend


def number(name: str, value: Any, expected: str, fits: Callable[[Any], bool], kind: type = Real) -> Any:
    """Return a setting as a Python number, as faiss and torch require; InputError if it is of another kind or does not fit."""
    right = isinstance(value, kind) and not isinstance(value, bool) and np.isfinite(value) and fits(value)
    if not right:
        raise InputError(f"{name}: expected {expected}, received {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def whole(name: str, value: Any, least: float = 1) -> int:
    """:func:`number` for integers."""
    bound = f" of at least {least}" if least > -np.inf else ""
    return number(name, value, f"a whole number{bound}", lambda v: v >= least, Integral)


def above_zero(name: str, value: Any) -> float:
    """:func:`number` for numbers above 0."""
    return number(name, value, "a number above 0", lambda v: v > 0)


class SparseRows:
    """An (n, d) CSR matrix of finite floats with as much of a CPU tensor's interface as :func:`propagate` needs."""

    device, is_cuda = torch.device("cpu"), False

    def __init__(self, matrix: sparse.csr_array) -> None:
        self.matrix, self.shape = matrix, matrix.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> SparseRows:
        return SparseRows(self.matrix[rows.numpy() if isinstance(rows, Tensor) else rows])

    def split(self, size: int) -> list[SparseRows]:
        return [self[first : first + size] for first in range(0, len(self), size)]


def default_k(n: int) -> int:
    """Return 2 ln n neighbours, rounded: a graph of n points stays connected with a few times ln n (docs/propagation.md)."""
    return max(1, round(2 * np.log(n)))


def choice(name: str, value: Any, known: tuple[str, ...]) -> str:
    """Return a setting that is one of the known names; InputError if it is not."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name}: expected one of {', '.join(known)}, received {value!r}")
    return value


def normalise_rows(features: Tensor | SparseRows) -> Tensor | SparseRows:
    """Divide rows, (n, d) of any real dtype, by their Euclidean length, into a new float32 tensor; rows of zeros stay zero.

    Each row is first divided by its largest entry, so that squares of huge or tiny features neither overflow nor vanish.

    Raises:
        InputError: not real, not of shape (n, d) with n, d >= 1, or entries that are NaN or infinite.
    """
    if isinstance(features, SparseRows):
        matrix = features.matrix.tocoo().tocsr()  # which adds up entries of the same place
        return SparseRows(normalize(normalize(matrix, norm="max")).astype(np.float32))
    if features.dim() != 2 or 0 in features.shape or features.is_complex() or features.layout != torch.strided:
        received = f"{features.layout} {features.dtype} of shape {tuple(features.shape)}"
        raise InputError(f"features: expected dense real numbers of shape (n, d) with n, d >= 1, received {received}")
    unit = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    bad = 0
    for source, target in zip(features.split(BLOCK), unit.split(BLOCK), strict=True):
        block = source if source.is_floating_point() else source.float()
        largest = block.abs().amax(1, keepdim=True)
        bad += int((~largest.isfinite()).sum())
        target.copy_(block / torch.where(largest > 0, largest, 1))
        length = torch.linalg.vector_norm(target, dim=1, keepdim=True)
        target.div_(torch.where(length > 0, length, 1))
    if bad:
        raise InputError(f"features: expected finite numbers, received NaN or infinity in {bad} of {len(unit)} rows")
    return unit


def inner_products(a: Tensor | SparseRows, b: Tensor | SparseRows) -> Tensor:
    """(m, n) inner products of (m, d) with (n, d) rows, each dense or sparse."""
    if not isinstance(a, SparseRows) and not isinstance(b, SparseRows):
        return a @ b.T
    left, right = (x.matrix if isinstance(x, SparseRows) else x.cpu().numpy() for x in (a, b))
    product = left @ right.T
    return torch.from_numpy(product.toarray() if sparse.issparse(product) else product)


def search(base: Tensor | SparseRows, queries: Tensor | SparseRows, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Find the ``k`` rows of ``base``, (n, d), with the largest inner product with each query, (m, d), best first: (m, k)
    inner products, float32, and (m, k) row numbers, int64."""
    if backend == "faiss" and isinstance(base, Tensor) and isinstance(queries, Tensor):
        similarity, index = faiss.knn(queries.numpy(), base.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(similarity), torch.from_numpy(index)
    entries = ENTRIES.get(base.device.type, ENTRIES["cpu"])
    blocks = [inner_products(block, base).topk(k) for block in queries.split(max(1, entries // len(base)))]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


# rows, and for each of them (m, k) inner products and (m, k) row numbers, -1 where none was found
Found: TypeAlias = Iterator[tuple[Tensor, Tensor, Tensor]]


class NearestNeighbours(NamedTuple):
    """(n, k) inner products, float32, and (n, k) row numbers, int32, of each row's neighbours, itself left out."""

    similarity: Tensor
    index: Tensor
    method: str  # "exact" or "approximate"


def nearest_neighbours(
    unit: Tensor | SparseRows,
    k: int,
    *,
    method: str = "auto",
    approximate_above: int = 300_000,
    probes: int = 16,
    backend: str = "auto",
    seed: int = 0,
) -> NearestNeighbours:
    """Find each row's k nearest other rows by inner product.

    "approximate" is an inverted file: k-means puts the rows into 2 sqrt(n) lists, and a row is compared with those of
    the ``probes`` lists whose centres are nearest to it (faiss) or to the centre of its own list (torch).

    Args:
        unit: (n, d) float32 rows of unit length or zero.
        k: neighbours per row; n - 1 where n <= k. Where an approximate search finds fewer, the row itself with
            similarity 0 fills up.
        method: "exact", "approximate", or "auto": approximate for n > ``approximate_above``. Sparse rows: exact.
        probes: lists that an approximate search compares with.
        backend: "faiss", "torch" or "auto".
        seed: of the clustering.

    Raises:
        InputError: a setting outside its range.
    """
    choice("neighbours", method, NEIGHBOURS)
    k, probes, seed = whole("k", k), whole("probes", probes), whole("seed", seed, -np.inf)
    approximate_above = whole("approximate_above", approximate_above, 0)
    backend = choose_backend(backend, unit.device)
    n = len(unit)
    k = min(k, n - 1)
    if method == "auto":
        method = "approximate" if n > approximate_above and isinstance(unit, Tensor) else "exact"
    elif method == "approximate" and not isinstance(unit, Tensor):
        raise InputError("neighbours: sparse features need 'exact' or 'auto', received 'approximate'")
    index = torch.arange(n, dtype=torch.int32, device=unit.device)[:, None].repeat(1, k)
    similarity = torch.zeros(n, k, dtype=torch.float32, device=unit.device)
    found: Found
    if method == "exact":
        blocks = torch.arange(n, device=unit.device).split(BLOCK)
        found = ((rows, *search(unit, unit[rows], k + 1, backend)) for rows in blocks)
    elif backend == "faiss":
        found = _inverted_file(unit, k + 1, probes, seed)
    else:
        found = _list_by_list(unit, k + 1, probes, seed)
    for rows, near, where in found if k else ():
        near, where = _without_self(near, where, rows)
        missing = where < 0
        similarity[rows, : near.shape[1]] = near.masked_fill_(missing, 0)
        index[rows, : near.shape[1]] = torch.where(missing, rows[:, None], where).int()
    return NearestNeighbours(similarity, index, method)


class Neighbourhood(NamedTuple):
    """The nearest neighbours of n points, which many sets of labels can share: row i is point ``order[i]``."""

    order: Tensor
    neighbours: NearestNeighbours

    def __len__(self) -> int:
        return len(self.order)

    @property
    def device(self) -> torch.device:
        return self.order.device

    @property
    def is_cuda(self) -> bool:
        return self.order.is_cuda


def neighbourhood(features: Tensor | SparseRows, k: int | None, seed: int = 0, **search: Any) -> Neighbourhood:
    """Find the neighbours of (n, d) features, in an order that keeps neighbours together; ``k`` None for 2 ln n, others
    as of :func:`nearest_neighbours`."""
    unit = normalise_rows(features)
    order = locality_order(unit, seed)
    unit = unit[order]
    return Neighbourhood(order, nearest_neighbours(unit, default_k(len(unit)) if k is None else k, seed=seed, **search))


def _without_self(similarity: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the row itself or, where more than k duplicates have crowded it out, the last of them."""
    last = index.shape[1] - 1
    itself = index == rows[:, None]
    place = torch.where(itself.any(1), itself.int().argmax(1), last)
    before = torch.arange(last, device=index.device) < place[:, None]
    return tuple(torch.where(before, x[:, :-1], x[:, 1:]) for x in (similarity, index))


def _inverted_file(unit: Tensor, k: int, probes: int, seed: int) -> Found:
    lists = _lists(len(unit))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(unit.shape[1]), unit.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = (seed + 2**31) % 2**32 - 2**31  # of 32 bits in faiss
    index.cp.min_points_per_centroid, index.nprobe = 1, min(probes, lists)
    index.train(unit[_some(unit, lists * 32, seed)].numpy())
    index.add(unit.numpy())
    for rows in torch.arange(len(unit)).split(BLOCK):
        similarity, where = index.search(unit[rows].numpy(), k)
        yield rows, torch.from_numpy(similarity), torch.from_numpy(where)


def _list_by_list(unit: Tensor, k: int, probes: int, seed: int) -> Found:
    """Compare the rows of a list with those of the lists nearest to its centre, in one matrix product."""
    lists = _lists(len(unit))
    centres = _spherical_k_means(unit, lists, seed)
    assigned = _nearest_centre(unit, centres)
    members = assigned.argsort(stable=True).split(torch.bincount(assigned, minlength=lists).tolist())
    near = (centres @ centres.T).topk(min(probes, lists)).indices.tolist()
    for own, others in zip(members, near, strict=True):
        if len(own):
            candidates = torch.cat([own, *(members[j] for j in others if members[j] is not own)])
            similarity, where = search(unit[candidates], unit[own], min(k, len(candidates)), "torch")
            yield own, similarity, candidates[where]


def _lists(n: int) -> int:
    return min(n, round(2 * n**0.5))


def _some(unit: Tensor | SparseRows, count: int, seed: int) -> Tensor:
    """Numbers of ``count`` rows drawn at random, all of them where there are fewer."""
    return torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:count].to(unit.device)


def _nearest_centre(unit: Tensor | SparseRows, centres: Tensor | SparseRows) -> Tensor:
    return torch.cat([inner_products(block, centres).argmax(1) for block in unit.split(1 << 14)])


def locality_order(unit: Tensor | SparseRows, seed: int) -> Tensor:
    """Return a permutation, (n,) int64, that puts similar rows side by side: sorted by the nearest of about sqrt(n) / 2 rows.

    Neighbours then lie close in memory: a product with the graph takes a third to a half of the time (n = 50,000, clusters).
    """
    centres = unit[_some(unit, round(len(unit) ** 0.5 / 2) + 1, seed)]
    coarse = centres[: round(len(centres) ** 0.5)]  # similar centres side by side, too
    centres = centres[_nearest_centre(centres, coarse).argsort(stable=True)]
    return _nearest_centre(unit, centres).argsort(stable=True)


def _spherical_k_means(unit: Tensor, lists: int, seed: int) -> Tensor:
    """(lists, d) centres of unit length, from eight of Lloyd's iterations on a sample of 32 rows per list."""
    sample = unit[_some(unit, lists * 32, seed)]
    centres = sample[:lists].clone()
    for _ in range(8):
        total = torch.zeros_like(centres).index_add_(0, _nearest_centre(sample, centres), sample)
        length = torch.linalg.vector_norm(total, dim=1, keepdim=True)
        centres = torch.where(length > 0, total / torch.where(length > 0, length, 1), centres)
    return centres


@dataclass(frozen=True)
class AffinityGraph:
    """S as compressed sparse rows: row i has ``columns[offsets[i]:offsets[i + 1]]`` and the ``values`` there.

    Attributes:
        offsets: (n + 1,) int32.
        columns: (nnz,) int32.
        values: (nnz,) float32.
        degree: (n,) float32, the row sums of W.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    degree: Tensor

    @property
    def isolated(self) -> int:
        """Number of points without an affinity to any other."""
        return int((self.degree == 0).sum())

    def __matmul__(self, x: Tensor) -> Tensor:
        """S x of a dense (n, c) matrix of the dtype of ``values``."""
        # a weighted sum of rows per bag: every build of torch has it; sparse CSR tensors need MKL, and were no faster
        return torch.nn.functional.embedding_bag(
            self.columns, x, self.offsets, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )


def affinities(similarity: Tensor, gamma: float, affinity: str, scale: Tensor | None = None) -> Tensor:
    """Return (n, k) affinities of the (n, k) neighbours, best first, from their cosines, which are overwritten.

    Args:
        gamma: the power of the cosine.
        affinity: "cosine", or "local_scaling": ``exp(-d_ij^2 / (s_i s_j))`` of the distances between unit rows, s_i being
            the distance to the 7th neighbour (Zelnik-Manor, Perona 2004). A cosine of at most 0 gives 0 in both.
        scale: (n, k) s_j of the neighbours; by default s_i, for points outside the graph.
    """
    if affinity == "cosine":
        return similarity.clamp_(min=0).pow_(gamma)
    own = local_scale(similarity)[:, None]
    exponent = (2 - 2 * similarity).clamp_(min=0).div_(own * (own if scale is None else scale))
    return exponent.neg_().exp_().masked_fill_(similarity <= 0, 0)


def local_scale(similarity: Tensor) -> Tensor:
    """(n,) distances between unit rows and their 7th neighbours, of (n, k) cosines, best first; at least float32's rounding."""
    seventh = similarity[:, :LOCAL_SCALE].amin(1) if similarity.shape[1] else similarity.new_ones(len(similarity))
    return (2 - 2 * seventh).clamp_(min=1e-6).sqrt_()


def affinity_graph(
    neighbours: NearestNeighbours, gamma: float = 3.0, *, affinity: str = "cosine", backend: str = "auto"
) -> AffinityGraph:
    """Build S of the paper's section 4.1 from nearest neighbours, whose ``similarity`` is overwritten.

    Args:
        neighbours: of :func:`nearest_neighbours`.
        gamma: exponent of the cosine, above 0.
        affinity: "cosine" (the paper's) or "local_scaling" (see :func:`affinities`).
        backend: "faiss" (here: SciPy on the CPU), "torch" or "auto".

    Raises:
        InputError: a setting outside its range.
    """
    gamma, affinity = above_zero("gamma", gamma), choice("affinity", affinity, AFFINITIES)
    index, scale = neighbours.index, None
    if affinity == "local_scaling":
        scale = local_scale(neighbours.similarity).index_select(0, index.view(-1)).view(index.shape)
    values = affinities(neighbours.similarity, gamma, affinity, scale)
    degree = values.sum(1, dtype=torch.float64)
    degree.index_add_(0, index.view(-1), values.view(-1).double())
    scale = torch.where(degree > 0, degree, 1).rsqrt().float()
    # D^-1/2 A D^-1/2: adding its transpose gives S
    values.mul_(scale[:, None]).mul_(scale.index_select(0, index.view(-1)).view_as(values))
    add_transpose = _add_transpose_scipy if choose_backend(backend, values.device) == "faiss" else _add_transpose_torch
    return AffinityGraph(*add_transpose(values, index), degree.float())


def _add_transpose_scipy(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, k = values.shape
    offsets = np.arange(n + 1, dtype=np.int32 if n * k < 2**30 else np.int64) * k
    matrix = sparse.csr_array((values.numpy().reshape(-1), index.numpy().reshape(-1), offsets), shape=(n, n))
    total = matrix + matrix.T.tocsr()  # not sorting the rows first is quicker
    return torch.from_numpy(total.indptr), torch.from_numpy(total.indices), torch.from_numpy(total.data)


def _add_transpose_torch(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, k = values.shape
    rows = torch.arange(n, device=values.device).repeat_interleave(k)
    columns = index.reshape(-1).long()
    keys, order = torch.cat([rows * n + columns, columns * n + rows]).sort()
    merged, place = torch.unique_consecutive(keys, return_inverse=True)
    total = torch.zeros(len(merged), dtype=values.dtype, device=values.device)
    total.index_add_(0, place, values.reshape(-1).repeat(2)[order])
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = torch.bincount(merged // n, minlength=n).cumsum(0)
    dtype = torch.int32 if len(merged) < 2**31 else torch.int64
    return offsets.to(dtype), (merged % n).to(dtype), total
