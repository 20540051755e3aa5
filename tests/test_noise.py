"""The random bits against a Threefry written here, the normals against the normal distribution."""

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import brainmass_kernels as bk
from brainmass_kernels import noise
from brainmass_kernels.schedule import Body, Schedule, parity_in, segment_groups

MASK = 0xFFFFFFFF
normals = jax.jit(noise.normals, static_argnums=2)
SIGMA = u.Hz * u.second**0.5


def threefry(key, counter, rounds: int):
    """Threefry-2x32 of Salmon et al. 2011, on Python integers."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + key[0]) & MASK, (counter[1] + key[1]) & MASK
    for n in range(rounds):
        by = (13, 15, 26, 6, 17, 29, 16, 24)[n % 8]
        x = (x + y) & MASK
        y = (((y << by) | (y >> (32 - by))) & MASK) ^ x
        if (n + 1) % 4 == 0:
            d = (n + 1) // 4
            x, y = (x + keys[d % 3]) & MASK, (y + keys[(d + 1) % 3] + d) & MASK
    return x, y


def signed(x) -> np.ndarray:
    return np.asarray(x, np.uint32).view(np.int32)


def words(x) -> list[int]:
    return np.asarray(x).astype(np.int32).view(np.uint32).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("key", "counter", "known"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((MASK, MASK), (MASK, MASK), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_reference_knows_the_known_answers(key, counter, known):
    """Random123's kat_vectors for threefry2x32 with 20 rounds."""
    assert threefry(key, counter, 20) == known


def test_bits():
    rng = np.random.default_rng(0)
    k0, k1, c0, c1 = (rng.integers(0, 2**32, 500, dtype=np.uint32) for _ in range(4))
    want = [threefry((a, b), (c, d), 13) for a, b, c, d in zip(*(x.tolist() for x in (k0, k1, c0, c1)))]
    x, y = noise.threefry(*(jnp.asarray(signed(v)) for v in (k0, k1, c0, c1)))
    assert x.dtype == y.dtype == jnp.int32
    assert list(zip(words(x), words(y))) == want


def test_seeds_and_normals_by_hand():
    """Lane, pair of steps and stream enter the counter as documented; Box and Muller in float64 gives the normals."""
    key = jax.random.key(42)
    words_of_key = words(jax.random.key_data(key).astype(jnp.int32))
    seeds = noise.lane_seeds(key, (2, 3))
    assert seeds.shape == (2, 2, 3)
    even, odd = jax.jit(lambda: [noise.normals(seeds, step, 3) for step in (4, 5)])()
    assert len(even) == len(odd) == 3
    for lane in range(6):
        seed = threefry(words_of_key, (lane, MASK), 13)
        assert [words(s)[lane] for s in seeds] == list(seed)
        for stream in range(3):
            b0, b1 = threefry(seed, (2, stream), 13)
            radius = np.sqrt(-2.0 * np.log(((b0 >> 1) + 0.5) / 2.0**31))
            angle = np.pi / 2 * ((b1 >> 30) + (b1 & 0x3FFFFFFF) / 2.0**30 - 0.5)
            for made, want in ((even, np.cos(angle)), (odd, np.sin(angle))):
                normal = float(made[stream].reshape(-1)[lane])
                assert normal == pytest.approx(radius * want, abs=2e-6 * radius)


def test_the_ends_of_the_uniforms():
    """The smallest and largest words make finite normals, 6.66 at most."""
    ends = jnp.asarray([0, 1, -1, 2**31 - 1, -(2**31)], jnp.int32)
    first, second = noise.box_muller(ends[:, None], ends[None, :])
    assert bool(jnp.all(jnp.isfinite(first)) & jnp.all(jnp.isfinite(second)))
    assert 6.5 < float(jnp.max(jnp.hypot(first, second))) < 6.67


@functools.lru_cache
def draws(lanes=4096, steps=64, count=4):
    """Normals ``(steps, streams, lanes)``."""
    seeds = noise.lane_seeds(jax.random.key(0), (lanes,))
    made = jax.jit(jax.vmap(lambda n: jnp.stack(noise.normals(seeds, n, count))))(jnp.arange(steps))
    return np.asarray(made, np.float64)


def test_moments():
    x = draws().ravel()
    n = x.size
    assert abs(x.mean()) < 4 / np.sqrt(n)
    assert abs(x.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.skew(x)) < 4 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 4 * np.sqrt(24 / n)


def test_distribution():
    assert stats.kstest(draws().ravel(), "norm").pvalue > 1e-3
    for stream in range(4):
        x = np.sort(draws()[:8, stream].ravel())
        logs = stats.norm.logcdf(x) + stats.norm.logsf(x)[::-1]
        n = x.size
        anderson = -n - np.mean((2 * np.arange(1, n + 1) - 1) * logs)
        assert anderson < 6.0  # one in a thousand beyond it


@pytest.mark.parametrize("beyond", [2.0, 3.0, 4.0])
def test_tails(beyond):
    x = draws().ravel()
    for found in ((x > beyond).sum(), (x < -beyond).sum()):
        wanted = x.size * stats.norm.sf(beyond)
        assert abs(found - wanted) < 4 * np.sqrt(wanted)


@pytest.mark.parametrize("power", [1, 2])
def test_no_correlation(power):
    """Between neighbouring lanes, steps and streams, of the normals and of their squares."""
    x = draws() ** power
    x = (x - x.mean()) / x.std()
    for axis, name in enumerate(("step", "stream", "lane")):
        for lag in (1, 2, 3):
            a, b = (np.take(x, range(s, x.shape[axis] - lag + s), axis) for s in (0, lag))
            assert abs(np.mean(a * b)) < 4.5 / np.sqrt(a.size), f"lag {lag} in {name}"


@pytest.mark.parametrize("first", [0, 1, 6, 7])
@pytest.mark.parametrize("later", [None, 0, 5])
def test_steps_in_a_row(first, later):
    """The same bits as one by one, in any order, whether or not their parity is known; every pair is drawn once."""
    seeds = noise.lane_seeds(jax.random.key(5), (9,))
    origin = 0 if later is None else later
    if later is not None:
        seeds = jnp.concatenate([seeds, jnp.full((1, 9), later, jnp.int32)])
    one_by_one = [noise.normals(seeds[:2], origin + first + j, 2) for j in range(5)]
    for parity in (None, first % 2):
        row = noise.in_a_row(seeds, first, 2, parity)
        for j in (4, 1, 0, 2, 3):
            np.testing.assert_array_equal(row(j), one_by_one[j])
        assert len(row._pairs) <= 3 + (row.parity is None)


# Steps beyond 32 bits -----------------------------------------------------------------------------------------------

EDGES = [2**31, 2**32, 2**33, 3 * 2**32 + 2**31, 2**48, 2**53 - 40]


def number(n: noise.StepNumber) -> np.ndarray:
    low, high = (np.asarray(word).view(np.uint32).astype(np.int64) for word in (n.low, n.high))
    return low + (high << 32)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1), st.integers(0, 2**31 - 1), st.integers(1, 2**53))
def test_numbers_of_steps_are_added_and_multiplied_in_two_words(a, b, few, size):
    assert number(noise.StepNumber.of(a)) == a
    assert number(noise.StepNumber.of(a) + noise.StepNumber.of(b)) == a + b
    assert number(noise.StepNumber.of(a) + jnp.int32(few)) == a + few
    multiples = noise.StepNumber.multiples(size, 7)
    np.testing.assert_array_equal(number(noise.StepNumber.of(b // 2) + multiples), b // 2 + size * np.arange(7))


def test_multiples_of_many():
    """The halves of both factors count."""
    size, count = 2**40 + 2**31 + 98_765, 100_000
    found = number(noise.StepNumber.multiples(size, count))
    np.testing.assert_array_equal(found, size * np.arange(count, dtype=np.int64))


def wide(first: int, lanes: int = 5):
    seeds = noise.lane_seeds(jax.random.key(5), (lanes,))
    return noise.numbered(seeds, noise.StepNumber.of(first), wide=True)


@pytest.mark.parametrize("edge", EDGES)
def test_counters_far_on_by_hand(edge):
    """Half of the low word, with its sign, is the first word; 2^11 times the high word plus the stream the second."""
    k0, k1 = (words(x) for x in wide(0)[:2])
    for step in range(edge - 4, edge + 4, 2):
        low, high = np.asarray([step & MASK], np.uint32).view(np.int32)[0], step >> 32
        made = noise.normals(wide(edge - 4), step - (edge - 4), 2)
        after = noise.normals(wide(step + 1), 0, 2)
        for stream in range(2):
            counter = (int(low) >> 1) & MASK, ((high << 11) + stream) & MASK
            bits = [threefry(key, counter, 13) for key in zip(k0, k1)]
            want = noise.box_muller(*(jnp.asarray(signed(word)) for word in zip(*bits)))
            np.testing.assert_array_equal(made[stream], want[0])
            np.testing.assert_array_equal(after[stream], want[1])


@pytest.mark.parametrize("step", [0, 1, 6, 2**30 + 1, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_below_33_bits_one_word_has_the_same_bits(step):
    one = noise.normals(wide(0)[:2], jnp.asarray(signed(step)), 3)
    for seeds in (wide(step), noise.numbered(wide(0)[:2], noise.StepNumber.of(step), wide=False)):
        for a, b in zip(one, noise.normals(seeds, 0, 3), strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_two_pairs_of_steps_share_a_counter():
    """Of as many streams as the second word has room for, near all powers of two."""
    steps = {2**n + k for n in range(1, 54) for k in range(-8, 8, 2) if 0 <= 2**n + k < 2**53}
    steps = sorted({step - step % 2 for step in steps})
    low, high = np.asarray(steps, "<i8")[:, None].view("<i4").T
    streams = np.arange(2**noise.STREAM_BITS, dtype=np.int32)
    second = np.asarray(noise.in_second_word(jnp.asarray(high)))[:, None] + streams
    counters = np.stack([np.broadcast_to((low >> 1)[:, None], second.shape), second], axis=-1).reshape(-1, 2)
    assert len(np.unique(counters.view("i8"))) == len(steps) * len(streams)


@pytest.mark.parametrize("edge", EDGES)
def test_steps_in_a_row_far_on(edge):
    for first in (edge - 3, edge - 4):
        one_by_one = [noise.normals(wide(first + j), 0, 2) for j in range(8)]
        row = noise.in_a_row(wide(first - 6), 6, 2, parity=0)
        for j in (7, 1, 0, 2, 3, 4, 5, 6):
            np.testing.assert_array_equal(row(j), one_by_one[j])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(0, 40), st.integers(1, 30), st.integers(1, 40), st.integers(1, 20))
def test_a_body_begins_at_the_step_of_the_parity_that_is_said(steps, lead, every, segment, most):
    """And the bodies of a segment are its steps, whole strides where they have several."""
    for piece in segment_groups(Schedule(steps, min(lead, steps), every), segment):
        parity, form = parity_in(0, piece), Body.of(piece, most, noisy=True)
        stretch = piece.length if form.strides else piece.stride
        assert 1 <= form.steps <= max(most, 1)
        assert form.strides * piece.stride in (0, form.steps)
        for i in range(piece.segments):
            first = piece.start + i * piece.length
            assert parity in (None, first % 2)
            for begin in range(0, piece.length, stretch):
                starts = range(begin, begin + stretch, form.steps)
                assert not form.even or not any(start % 2 for start in starts)


def test_keys_differ():
    seeds = [noise.lane_seeds(jax.random.key(k), (4096,)) for k in (0, 1)]
    a, b = (np.asarray(normals(s, 0, 1)[0]) for s in seeds)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / 64
    assert np.unique(np.asarray(seeds[0]).T, axis=0).shape == (4096, 2)


def test_one_stream_is_the_first_of_many():
    seeds = noise.lane_seeds(jax.random.key(3), (50,))
    for count in (1, 2, 3):
        for a, b in zip(normals(seeds, 9, count), normals(seeds, 9, 4)):
            np.testing.assert_array_equal(a, b)


def test_old_style_keys_are_keys():
    old, new = jax.random.PRNGKey(11), jax.random.key(11)
    np.testing.assert_array_equal(noise.lane_seeds(old, (6,)), noise.lane_seeds(new, (6,)))
    many = jax.random.split(new, 6)
    np.testing.assert_array_equal(noise.lane_seeds(jax.random.key_data(many), (6,)), noise.lane_seeds(many, (6,)))


def test_a_key_each_makes_lanes_that_can_be_split():
    keys = jax.random.split(jax.random.key(1), 10)
    whole = noise.lane_seeds(keys, (10,))
    np.testing.assert_array_equal(whole[:, 3:7], noise.lane_seeds(keys[3:7], (4,)))
    np.testing.assert_array_equal(whole[:, 4], noise.lane_seeds(keys[4], (1,))[:, 0])


def test_keys_over_one_axis_leave_lanes_of_the_other_alone():
    """Keys (2, 1) for a batch of (2, 3): one key a row shares its noise over the row."""
    keys = jax.random.split(jax.random.key(1), 2)[:, None]
    seeds = np.asarray(noise.lane_seeds(keys, (2, 3)))
    assert (seeds[..., :1] == seeds).all()
    assert (seeds[:, 0] != seeds[:, 1]).any()


# Noise in a run -----------------------------------------------------------------------------------------------------


@bk.model
class Decay(bk.Model):
    """Ornstein and Uhlenbeck: x' = drive - a x."""

    a: object = 20.0 * u.Hz

    states = {"x": u.UNITLESS}
    inputs = {"drive": 0.0 * u.Hz}

    @staticmethod
    def drift(s, p, i):
        return {"x": i.drive - p.a * s.x}


def stationary(sigma, dt_ms: float, scheme: str = "heun", lanes: int = 20_000):
    res = bk.simulate(
        Decay(),
        0.3 * u.second,
        dt_ms * u.ms,
        noise={"drive": np.broadcast_to(np.float32(sigma), (lanes,)) * SIGMA},
        key=jax.random.key(2),
        record=(),
        scheme=scheme,
        implementation="scan",
    )
    return np.asarray(res.final["x"], np.float64)


@pytest.mark.parametrize("dt_ms", [0.5, 1.0, 2.0])
def test_variance_does_not_depend_on_the_step(dt_ms):
    """An intensity sigma makes the stationary variance sigma^2 / 2 a of the continuous process, at any step."""
    x = stationary(2.0, dt_ms)
    assert x.var() == pytest.approx(2.0**2 / (2 * 20.0), rel=4 * np.sqrt(2 / x.size))
    assert abs(x.mean()) < 4 * x.std() / np.sqrt(x.size)


def test_variance_grows_as_the_square():
    """In a linear model the same noise is just scaled."""
    one, three = stationary(1.0, 1.0, lanes=500), stationary(3.0, 1.0, lanes=500)
    np.testing.assert_allclose(three, 3.0 * one, rtol=1e-5, atol=1e-6)


def test_variance_of_a_second_order_block():
    """x'' = A a (sigma noise) - 2 a x' - a^2 x has the stationary variance A^2 sigma^2 / (4 a)."""
    res = bk.simulate(
        bk.JansenRit(C=0.0),
        0.2 * u.second,
        0.5 * u.ms,
        noise={"E_inp": np.full(20_000, 2.0, np.float32) * SIGMA},
        key=jax.random.key(4),
        record=(),
        implementation="scan",
    )
    x = np.asarray(res.final["E"].mantissa, np.float64)
    assert x.var() == pytest.approx(3.25**2 * 2.0**2 / (4 * 100.0), rel=4 * np.sqrt(2 / x.size))


def test_intensity_takes_its_own_unit():
    with pytest.raises(ValueError, match=r"noise\['E_inp'\].* got .*Hz.* but takes .*Hz.*s"):
        bk.simulate(bk.JansenRit(), 5, 1 * u.ms, noise={"E_inp": 2.0 * u.Hz}, key=jax.random.key(0))


def test_intensity_in_another_unit():
    def run(sigma):
        res = bk.simulate(bk.JansenRit(), 20, 1 * u.ms, noise={"E_inp": sigma}, key=jax.random.key(0))
        return np.asarray(res["eeg"].mantissa)

    np.testing.assert_allclose(run(2.0 * SIGMA), run(2.0 / 1000**0.5 * u.Hz * 1000**0.5 * u.second**0.5), rtol=1e-6)
    np.testing.assert_allclose(run(2.0 * SIGMA), run(0.002 * u.kHz * u.second**0.5), rtol=1e-5)
