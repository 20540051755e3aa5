"""Networks with sparse weights: the numbers of the matrix, its gradient by edge, and no array of all pairs."""

import functools
import re

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse

import brainmass_kernels as bk
from brainmass_kernels import _context, arguments, dispatch
from brainmass_kernels.run import RUNS, request_of

N, STEPS, DT = 20, 40, 0.5 * u.ms
RANDOM = np.random.default_rng(5)
ROWS, COLUMNS = np.nonzero((RANDOM.random((N, N)) < 0.2) & ~np.eye(N, dtype=bool))
# No region sends to the third; the others are stored in no order.
ORDER = RANDOM.permutation(np.flatnonzero(ROWS != 2))
ROWS, COLUMNS = ROWS[ORDER], COLUMNS[ORDER]
INDICES = np.stack([ROWS, COLUMNS], axis=1)
VALUES = RANDOM.random(len(ROWS)).astype(np.float32)
TIMES = (RANDOM.random((N, N)) * 16).round(2)
DRIVE = {"x_inp": (0.2 * RANDOM.random(N)).astype(np.float32)}

implementations = pytest.mark.parametrize("implementation", ["scan", "numba"])
delayed = pytest.mark.parametrize("delayed", [True, False], ids=["delays", "no delays"])


def bcoo(values=VALUES, indices=INDICES) -> sparse.BCOO:
    return sparse.BCOO((jnp.asarray(values), indices), shape=(N, N))


def matrix() -> np.ndarray:
    dense = np.zeros((N, N), np.float32)
    dense[ROWS, COLUMNS] = VALUES
    return dense


def network(weights, delays=None, **kwargs) -> bk.Network:
    return bk.Network(bk.Hopf(), weights, delays=delays, **{"k": 0.05, **kwargs})


def signal(net: bk.Network, implementation: str, **kwargs):
    return bk.simulate(net, STEPS, DT, inputs=DRIVE, every=5, implementation=implementation, **kwargs)["x"]


def loss(net: bk.Network, implementation: str):
    return jnp.mean(signal(net, implementation) ** 2)


def near(a, b, tolerance=1e-4):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(b).max() > 0
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Numbers ------------------------------------------------------------------------------------------------------------


@functools.cache
def of_the_matrix(delayed: bool):
    """Records, and the gradient by each edge, of the same network with a matrix."""
    dense = network(matrix(), TIMES * u.ms if delayed else None)
    gradient = jax.grad(lambda w: loss(dense.replace(weights=w), "numba"))(jnp.asarray(matrix()))
    return signal(dense, "numba"), gradient[ROWS, COLUMNS]


@implementations
@delayed
def test_sparse_weights_have_the_numbers_of_the_matrix(implementation, delayed):
    edges = network(bcoo(), TIMES[ROWS, COLUMNS] * u.ms if delayed else None)
    records, by_edge = of_the_matrix(delayed)
    near(signal(edges, implementation), records, 1e-5)
    gradient = jax.grad(lambda v: loss(edges.replace(weights=v), implementation))(jnp.asarray(VALUES))
    assert gradient.shape == VALUES.shape
    near(gradient, by_edge)


def test_batches_and_vmap_keep_the_edges():
    implementation = "numba"
    delays, strengths = TIMES[ROWS, COLUMNS] * u.ms, np.array([[0.02], [0.05]], np.float32)
    swept = signal(network(bcoo(), delays, k=strengths), implementation)
    assert swept.shape == (STEPS // 5, 2, N)
    near(swept[:, 1], signal(network(bcoo(), delays, k=np.float32(0.05)), implementation), 1e-5)

    def of(values, k):
        return loss(network(bcoo(values), delays, k=k), implementation)

    both = jnp.stack([jnp.asarray(VALUES), 2 * jnp.asarray(VALUES)])
    gradients = jax.vmap(jax.grad(of), in_axes=(0, None))(both, strengths)
    for values, gradient in zip(both, gradients):
        near(gradient, jax.grad(of)(values, strengths))
    shared = jax.vmap(of, in_axes=(None, 0))(jnp.asarray(VALUES), jnp.stack([strengths, 2 * strengths]))
    near(shared[0], of(VALUES, strengths), 1e-5)


def test_a_batch_of_values_on_one_pattern():
    values = np.stack([VALUES, 2 * VALUES])
    both = sparse.BCOO((jnp.asarray(values), INDICES[None]), shape=(2, N, N))
    swept = signal(network(both), "scan")
    near(swept[:, 1], signal(network(bcoo(2 * VALUES)), "scan"), 1e-5)


def test_couplings_with_the_degree_sum_over_edges():
    dense, edges = (network(w, coupling="diffusive") for w in (matrix(), bcoo()))
    near(edges.magnitudes()["degree"], dense.magnitudes()["degree"], 1e-6)
    near(signal(edges, "scan"), signal(dense, "scan"), 1e-5)


def test_the_diagonal_counts_only_where_asked():
    indices = np.concatenate([INDICES, [[4, 4]]])
    values = np.concatenate([VALUES, np.float32([3.0])])
    near(signal(network(bcoo(values, indices)), "scan"), signal(network(bcoo()), "scan"), 1e-6)
    itself = matrix() + np.diag(np.float32([0.0] * 4 + [3.0] + [0.0] * (N - 5)))
    there = [network(w, self_connection=True) for w in (bcoo(values, indices), itself)]
    near(signal(there[0], "scan"), signal(there[1], "scan"), 1e-5)


def test_padding_of_a_bcoo_is_no_connection():
    padded = sparse.BCOO.fromdense(jnp.asarray(matrix()), nse=len(VALUES) + 7)
    near(signal(network(padded), "scan"), signal(network(bcoo()), "scan"), 1e-5)


@implementations
def test_a_network_of_no_connections(implementation):
    none = network(scipy.sparse.csr_matrix((N, N), dtype=np.float32), 3 * u.ms)
    near(signal(none, implementation), signal(network(np.zeros((N, N), np.float32)), implementation), 1e-6)


def test_entries_that_share_a_place_are_side_by_side():
    twice = network(bcoo(np.concatenate([VALUES, VALUES]), np.concatenate([INDICES, INDICES])))
    near(signal(twice, "scan"), signal(network(bcoo(2 * VALUES)), "scan"), 1e-5)


# What is taken ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil", "dok", "bsr", "dia"])
def test_every_format_of_scipy(form):
    weights = scipy.sparse.coo_matrix(matrix()).asformat(form)
    lengths = scipy.sparse.csr_array(np.where(matrix() != 0, 1.0 + TIMES, 0.0))
    net = network(weights, distances=lengths, speed=1 * u.mm / u.ms)
    dense = network(matrix(), (1.0 + TIMES) * u.ms)
    steps = np.zeros((N, N), np.int32)
    (stored,), _, _ = arguments.connections_of(net, 5e-4)
    steps[tuple(stored.edges)] = stored.steps
    weighty = matrix() != 0
    assert (steps[weighty] == dense.delay_steps(5e-4)[weighty]).all()
    assert isinstance(net.weights, sparse.BCOO)


def test_delays_in_the_pattern_in_any_order():
    swapped = ORDER.argsort()
    pattern = sparse.BCOO((jnp.asarray(TIMES[ROWS, COLUMNS][swapped]), INDICES[swapped]), shape=(N, N))
    by_pattern = network(bcoo(), u.Quantity(pattern, unit=u.ms))
    assert (by_pattern.delay_steps(5e-4) == network(bcoo(), TIMES[ROWS, COLUMNS] * u.ms).delay_steps(5e-4)).all()
    assert (by_pattern.delay_steps(5e-4) == network(bcoo(), TIMES * u.ms).delay_steps(5e-4)).all()
    # float32 has no 0.1: what is meant is one step, not two.
    tenth = u.Quantity(sparse.BCOO((jnp.full(len(VALUES), 0.1, jnp.float32), INDICES), shape=(N, N)), unit=u.ms)
    assert (network(bcoo(), tenth).delay_steps(1e-8) == 10_000).all()


def test_whole_numbers_are_floating_point():
    counts = scipy.sparse.coo_matrix((np.ones(3, int), ([0, 1, 2], [1, 2, 0])), shape=(3, 3))
    assert network(counts).weights.data.dtype == np.float32


def other_pattern():
    return scipy.sparse.coo_matrix((np.ones(2), ([0, 1], [1, 0])), shape=(N, N))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: network(bcoo(), other_pattern() * u.ms), ValueError, "'delays' got another pattern"),
        (lambda: network(bcoo(), np.ones(3) * u.ms), ValueError, rf"shape \(3,\), but takes \({len(ROWS)},\)"),
        (lambda: network(bcoo(), np.ones(len(ROWS))), ValueError, "'delays' got .*but takes s"),
        (lambda: network(matrix(), other_pattern() * u.ms), TypeError, "'delays' got a sparse matrix, but takes"),
        (lambda: network(scipy.sparse.eye(3, 4)), ValueError, r"'weights' got a sparse matrix of shape \(3, 4\)"),
        (lambda: network(bcoo(np.full(len(VALUES), np.nan))), ValueError, r"'weights' got NaN \(first at \(0,"),
        (lambda: network(sparse.BCOO.fromdense(jnp.ones((N, N)), n_dense=1)), ValueError, "1 sparse and 1 dense"),
        (lambda: network(bcoo(), -TIMES[ROWS, COLUMNS] * u.ms), ValueError, "'delays' got negative"),
    ],
)  # fmt: skip
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_connections_are_known_before_tracing():
    with pytest.raises(TypeError, match="'weights' got a BCOO whose indices are traced"):
        jax.jit(lambda indices: signal(network(bcoo(VALUES, indices)), "scan"))(jnp.asarray(INDICES))


def test_delays_stay_with_their_connections():
    net = network(bcoo(), TIMES[ROWS, COLUMNS] * u.ms)
    near(net.replace(weights=bcoo(2 * VALUES)).weights.data, 2 * VALUES, 0.0)
    near(net.replace(weights=2 * VALUES).connections(), 2 * net.connections(), 0.0)
    with pytest.raises(ValueError, match="'weights' got another pattern than the network's delays"):
        net.replace(weights=bcoo(VALUES, INDICES[::-1]))


def test_a_network_is_a_pytree_of_its_values():
    net = network(bcoo(), TIMES[ROWS, COLUMNS] * u.ms).as_arrays()
    leaves, structure = jax.tree.flatten(net)
    assert not any(jnp.issubdtype(x.dtype, jnp.integer) for x in leaves)
    assert structure == jax.tree.structure(network(bcoo(), TIMES[ROWS, COLUMNS] * u.ms).as_arrays())
    gradient = jax.jit(jax.grad(lambda n: loss(n, "numba")))(net)
    assert isinstance(gradient.weights, sparse.BCOO)
    assert (gradient.weights.indices == INDICES).all()
    near(gradient.weights.data, jax.grad(lambda v: loss(net.replace(weights=v), "numba"))(net.weights.data))


def test_fits_of_other_connections_share_no_program():
    """All values are the same, and only where they are differs."""
    connectivity = bk.Connectivity(np.corrcoef(RANDOM.random((N, 40))).astype(np.float32))

    def losses(indices):
        return bk.fit(
            network(bcoo(np.full_like(VALUES, 0.5), indices)), connectivity, {"coupling.k": (0.01, 0.2)}, duration=20,
            dt=DT, transient=0, noise={"x": 0.1 / u.ms**0.5}, key=jax.random.key(0),
            steps=1, starts=1, implementation="numba",
        ).losses  # fmt: skip

    assert np.abs(losses(INDICES) - losses(INDICES[:, ::-1])).max() > 0


def test_a_sweep_of_other_connections_is_another(tmp_path):
    """All values are the same: chunks and results on disk tell networks apart by their edges too."""

    def swept(indices, **where):
        net = network(bcoo(np.full_like(VALUES, 0.5), indices))
        over = {"coupling.k": np.array([0.05, 0.2])}
        return bk.sweep(net, over, STEPS, DT, inputs=DRIVE, record=bk.Mean(), implementation="numba", **where)

    first, other = swept(INDICES, out=tmp_path / "a.npz"), swept(INDICES[:, ::-1], out=tmp_path / "a.npz")
    want = swept(INDICES[:, ::-1])
    assert first.about["digest"] != other.about["digest"]
    for name, x in want.records.items():
        np.testing.assert_array_equal(other[name], x)
        assert np.abs(np.asarray(first[name]) - np.asarray(x)).max() > 0
    swept(INDICES, out=tmp_path / "b.npz", part=(0, 2), chunk=1)
    with pytest.raises(ValueError, match="edges"):
        swept(INDICES[:, ::-1], out=tmp_path / "b.npz", part=(1, 2), chunk=1)


def test_a_fit_of_other_connections_does_not_resume(tmp_path):
    connectivity = bk.Connectivity(np.corrcoef(RANDOM.random((N, 40))).astype(np.float32))
    path = tmp_path / "fit.json"

    def fitted(indices, **more):
        return bk.fit(
            network(bcoo(np.full_like(VALUES, 0.5), indices)), connectivity, {"coupling.k": (0.01, 0.2)}, duration=20,
            dt=DT, transient=0, noise={"x": 0.1 / u.ms**0.5}, key=jax.random.key(0),
            starts=1, implementation="numba", **more,
        )  # fmt: skip

    fitted(INDICES, steps=1).save(path)
    with pytest.raises(ValueError, match="fixed"):
        fitted(INDICES[:, ::-1], steps=2, resume=path)


@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_accelerators_say_that_they_take_matrices(name):
    platform = {"triton": "gpu", "mosaic_tpu": "tpu"}[name]
    with _context.setting(_context.TARGET, _context.Target(platform, 8, 9.0)):
        run, _ = arguments.prepare(network(bcoo()), STEPS, DT, implementation="scan")
        reason = dispatch.load(name).unsupported(request_of(run))
        assert bk.explain(network(bcoo()), STEPS, DT).implementation == "scan"
    assert reason == "it takes weights as a matrix, and these are sparse; 'scan' and, on CPUs, 'numba' take them"


# Sizes --------------------------------------------------------------------------------------------------------------


def large(regions: int, each: int = 4) -> bk.Network:
    rows, columns = np.repeat(np.arange(regions), each), RANDOM.integers(0, regions, regions * each)
    values = RANDOM.random(regions * each).astype(np.float32)
    weights = scipy.sparse.coo_matrix((values, (rows, columns)), shape=(regions, regions))
    return network(weights, (1 + RANDOM.random(regions * each)) * u.ms)


@implementations
def test_no_array_of_all_pairs_of_regions(implementation):
    net, steps = large(3000), 20
    data = arguments.prepare(net, steps, DT, implementation=implementation)[1]
    assert all(np.size(x) <= 3000 * 40 for x in jax.tree.leaves(data))

    def gradient(values):
        sent = bk.simulate(net.replace(weights=values), steps, DT, every=steps, implementation=implementation)["x"]
        return jnp.sum(sent)

    # Pairs would be 9,000,000; what a gradient keeps grows with the regions, the edges, and the steps. The largest is
    # the scratch of a kernel for CPUs, in bytes: sums of 64 steps, both ways, are 512 a region.
    text = jax.jit(jax.grad(gradient)).lower(net.weights.data).as_text()
    shapes = re.findall(r"tensor<([\dx]+)x[a-z]", text)
    assert max(np.prod([int(n) for n in shape.split("x")]) for shape in shapes) < 3000 * 1500


@implementations
def test_the_text_of_a_program_does_not_grow_with_the_regions(implementation):
    def texts(net):
        run, data = arguments.prepare(net, 20, DT, every=10, implementation=implementation)
        return len(RUNS(run).lower(data).as_text())

    few, many = (texts(large(regions)) for regions in (50, 800))
    assert many < few + 2000
    weights = [RANDOM.random((n, n), np.float32) for n in (50, 400)]
    few, many = (texts(network(w, np.full(w.shape, 2.0) * u.ms)) for w in weights)
    assert many < few + 2000
