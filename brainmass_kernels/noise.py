"""Counter-based random numbers, the same random bits on every backend.

The bits are Threefry-2x32 (Salmon et al. 2011, SC'11, "Parallel random numbers: as easy as 1, 2, 3") with 13
rounds; JAX's generator has 20. tests/test_noise.py checks their statistics. The key is (key, lane), the counter (pair
of steps, stream). By Box and Muller two words give two normals, one for an even step and one for the odd step after
it. All arithmetic is in 32-bit integers and float32, which Pallas, Triton and numba have. Any normal can be computed
again from its counter, so that an adjoint replays a noisy run without stored noise.

The number of a step has 64 bits. Half of its low word is the counter's first word; its high word is in the second,
above the stream. No two pairs of steps up to 2^53 share a counter. A run that needs no high word computes none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .schedule import COUNTED

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
ROUNDS = 13
PARITY = 0x1BD11BDA
# Bits of the counter's second word that are the stream's number; above them is the high word of the step's number.
STREAM_BITS = 11

# sin(pi x / 2) / x and cos(pi x / 2) on |x| <= 1/2 in powers of x^2, minimax in float32.
_SIN = (1.5707963267948966, -0.6459640975062462, 0.07969262624616704, -0.004681754135318688, 0.00016044118478735982)
_COS = (1.0, -1.2337005501361697, 0.25366950790104797, -0.020863480763352958, 0.0009192602748394263)


def _rotate(x, by: int):
    return lax.shift_left(x, jnp.int32(by)) | lax.shift_right_logical(x, jnp.int32(32 - by))


def threefry(k0, k1, c0, c1):
    """Threefry-2x32-13 of counter ``(c0, c1)`` under key ``(k0, k1)``; int32 arrays that broadcast."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.int32(PARITY))
    x0, x1 = c0 + k0, c1 + k1
    for i in range(ROUNDS):
        x0 = x0 + x1
        x1 = _rotate(x1, ROTATIONS[i % 8]) ^ x0
        if i % 4 == 3:
            j = i // 4 + 1
            x0 = x0 + keys[j % 3]
            x1 = x1 + (keys[(j + 1) % 3] + jnp.int32(j))  # this sum is the same at each step: it is hoisted
    return x0, x1


def box_muller(b0, b1):
    """Two independent float32 standard normals from two int32 words."""
    scale = jnp.float32(2.0**-31)
    uniform = (lax.shift_right_logical(b0, jnp.int32(1)).astype(jnp.float32) + 0.5) * scale
    radius = jnp.sqrt(-2.0 * jnp.log(jnp.minimum(uniform, jnp.float32(1.0))))
    # A quarter turn from the top two bits, the place within it from the other thirty.
    quadrant = lax.shift_right_logical(b1, jnp.int32(30))
    x = (b1 & jnp.int32(0x3FFFFFFF)).astype(jnp.float32) * jnp.float32(2.0**-30) - 0.5
    xx = x * x
    sin = x * _horner(_SIN, xx)
    cos = _horner(_COS, xx)
    swap, negate = (quadrant & 1) == 1, quadrant >= 2
    first, second = jnp.where(swap, -sin, cos), jnp.where(swap, cos, sin)
    radius = jnp.where(negate, -radius, radius)
    return radius * first, radius * second


def _horner(coefficients, x):
    value = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + jnp.float32(c)
    return value


def pairs(seeds, half, count: int, high=None) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """For each stream, the normals of an even step and of the odd step after it.

    Parameters
    ----------
    seeds : two int32 arrays of the lane shape, from `lane_seeds`
    half : int32, half of the low word of the even step's number
    count : number of streams
    high : int32, the high word of the number of both; ``None``, 0
    """
    return tuple(box_muller(*words) for words in random_words(seeds, half, count, high))


def random_words(seeds, half, count: int, high=None) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """For each stream the two int32 words that `pairs`, of the same arguments, makes its normals of."""
    streams: list[Any] = [jnp.int32(stream) for stream in range(count)]
    if high is not None:
        streams = [in_second_word(high) + stream for stream in streams]
    return tuple(threefry(seeds[0], seeds[1], half, stream) for stream in streams)


def in_second_word(high):
    """The high word of a step's number where it is in the counter's second word, to which the stream is added."""
    return lax.shift_left(high, jnp.int32(STREAM_BITS))


def normals(seeds, step, count: int) -> tuple[jax.Array, ...]:
    """``count`` standard normals a lane for one step.

    Parameters
    ----------
    seeds : two int32 arrays of the lane shape, from `lane_seeds`; a third has the number of the first step, or a third
        and a fourth its low and high word (`numbered`)
    step : int32 scalar from 0 on, counted from that first step, or from 0
    count : number of streams

    Returns
    -------
    ``count`` float32 arrays of the lane shape
    """
    return in_a_row(seeds, step, count)(0)


def in_a_row(seeds, first, count: int, parity: int | None = None) -> Normals:
    """Standard normals of consecutive steps, float32 arrays of the lane shape.

    Parameters
    ----------
    seeds : as for `normals`
    first : int32 scalar, the first of the steps, counted as for `normals`
    count : number of streams
    parity : 0 or 1 if ``first`` is known to be even or odd, with steps counted from 0
    """
    first, later = jnp.asarray(first, jnp.int32), len(seeds) > 2
    begin = StepNumber(seeds[2], seeds[3]) + first if is_wide(seeds) else None
    first = begin.low if begin else first + seeds[2] if later else first

    def draw(k: int):
        if begin is None:
            return pairs(seeds, lax.shift_right_arithmetic(first, jnp.int32(1)) + jnp.int32(k), count)
        at = begin + jnp.int32(2 * k)
        return pairs(seeds, lax.shift_right_arithmetic(at.low, jnp.int32(1)), count, at.high)

    def choose(after_odd, after_even):
        return jnp.where(first & 1 == 1, after_odd, after_even)

    return Normals(draw, choose, None if later else parity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepNumber:
    """The number of a step, or an array of them, as two int32 words; JAX has no 64-bit integers by default."""

    low: Any
    high: Any

    @classmethod
    def of(cls, n: int) -> StepNumber:
        """From 0 to 2^63 - 1."""
        return cls(*(jnp.int32(word) for word in np.asarray(n, "<i8").reshape(1).view("<i4")))

    @classmethod
    def multiples(cls, size: int, count: int) -> StepNumber:
        """``0, size, 2 size, ...``, so many."""
        by, low, high = lax.iota(jnp.uint32, count), np.uint32(size & 0xFFFFFFFF), np.uint32(size >> 32)
        words = by * low, by * high + _high_word(by, low)
        return cls(*(lax.bitcast_convert_type(word, jnp.int32) for word in words))

    def __add__(self, other: StepNumber | Any) -> StepNumber:
        """Plus another, or plus int32 from 0 on."""
        a, (b, high) = self.low, (other.low, other.high) if isinstance(other, StepNumber) else (other, 0)
        low = a + b
        carry = lax.shift_right_logical((a & b) | ((a | b) & (low ^ -1)), jnp.int32(31))
        return StepNumber(low, self.high + high + carry)


def _high_word(a, b):
    """The upper 32 bits of a product of uint32."""
    (a1, a0), (b1, b0) = ((x >> 16, x & 0xFFFF) for x in (a, b))
    middle = a1 * b0 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16) + (a0 * b1 + (middle & 0xFFFF) >> 16)


def is_wide(seeds) -> bool:
    """Whether seeds have the number of the first step as two words."""
    return len(seeds) == 4


def numbered(seeds, first: StepNumber, wide: bool):
    """Seeds ``(2, L)`` of steps that are counted from a first one: with its number, or the low word where that is all.

    Returns
    -------
    ``(3, L)`` int32, or ``(4, L)`` if ``wide``
    """
    words = (first.low, first.high) if wide else (first.low,)
    return jnp.concatenate([seeds, *(jnp.full((1, seeds.shape[1]), word, jnp.int32) for word in words)])


class Normals:
    """Normals of consecutive steps; each pair of steps is drawn once, at the first call for one of them.

    Parameters
    ----------
    draw : ``k -> pairs``, for each stream the normals of an even step and of the odd step after it; for ``k = 0`` the
        even step is the first step or the one before it
    choose : ``(if the first step is odd, if it is even) -> value``; not called if the parity is known
    parity : of the first step, or ``None``
    """

    def __init__(self, draw: Callable[[int], Sequence[tuple]], choose: Callable[[Any, Any], Any], parity: int | None):
        self.draw, self.choose, self.parity = draw, choose, parity
        self._pairs: dict[int, Sequence[tuple]] = {}

    def __call__(self, j: int) -> tuple:
        """The normals of the step ``first + j``, one for each stream."""
        if self.parity is not None:
            return self._after_even(j + self.parity)
        return tuple(self.choose(*both) for both in zip(self._after_even(j + 1), self._after_even(j)))

    def _after_even(self, j: int) -> tuple:
        """The normals of the ``j``-th step after an even one."""
        k, which = divmod(j, 2)
        if k not in self._pairs:
            self._pairs[k] = self.draw(k)
        return tuple(pair[which] for pair in self._pairs[k])


def check_key(key) -> None:
    """Raise ``TypeError`` unless it is a JAX random key, old or new style, an array of them, or ``None``."""
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    plain = hasattr(key, "dtype") and key.dtype == np.uint32 and np.ndim(key) > 0 and np.shape(key)[-1] in (2, 4)
    if key is None or typed or plain:
        return
    got = f"an array of {key.dtype}, {np.shape(key)}" if hasattr(key, "dtype") else f"{key!r}"
    raise TypeError(f"'key' got {got}, but takes a random key of JAX's, such as jax.random.key(0)")


def check_streams(names, steps: int) -> None:
    """Raise ValueError if a run is so long that the counter has no room for the noise on all of these names."""
    if steps > COUNTED and len(names) > 2**STREAM_BITS:
        raise ValueError(
            f"'noise' got {len(names):,} names, but takes at most {2**STREAM_BITS:,} in a run of more than "
            f"{COUNTED:,} steps: several runs that continue each other with initial=result.final take more"
        )


def lane_seeds(key, batch: tuple[int, ...]) -> jax.Array:
    """The two words of each lane, ``(2, *batch)`` int32.

    Parameters
    ----------
    key : a JAX key, whose lanes are counted in C order, or an array of keys of shape ``batch``, one a lane, with which
        a batch can be split over several runs without a change in its noise
    batch : the shape of the batch
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32))
    words = jax.random.key_data(key).reshape(*key.shape, -1)[..., :2]
    words = lax.bitcast_convert_type(words, jnp.int32)
    if key.shape:
        lane = jnp.zeros(key.shape, jnp.int32)
    else:
        lane = jnp.arange(int(np.prod(batch, dtype=int)), dtype=jnp.int32).reshape(batch)
    # The counter -1 does not occur in the loop, whose streams are counted from 0.
    seeds = threefry(words[..., 0], words[..., 1], lane, jnp.int32(-1))
    return jnp.stack([jnp.broadcast_to(s, batch) for s in seeds])
