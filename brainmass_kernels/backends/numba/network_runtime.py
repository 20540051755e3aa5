"""What emitted CPU kernels of networks are made with besides `runtime`.

The sum of a region is over its connections, of each one multiply-add for every step. Where a delay has `TILE` steps or
more, what arrives in the next `TILE` steps was sent before them: those sums are made for all these steps at once, in
SIMD over time, as what a region sent lies together in time. Shorter delays are summed step by step. The order of each
sum is fixed.
"""

# pyright: reportCallIssue=false, reportReturnType=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from .intrinsics import f32_at, f64_at, fma, i32_at, i64_at, multiply_add, put, zeros
from .language import PACK, f32, f64, reordering
from .runtime import named

# Steps that are summed at once.
TILE = PACK
# Steps over which a gradient by the weights reads what all regions sent, so that it stays in cache.
SPAN = 512


def places(area, regions):
    """Of a list of connections: where those of each region begin, where the near ones of each begin, what they read."""
    return i64_at(area), i64_at(area + 8 * (regions + 1)), i64_at(area + 8 * (3 * regions + 1))


def weights_at(area, regions, edges):
    return area + 8 * (3 * regions + 1) + 8 * edges


def _lists(kind: str, at, one):
    """The connections of a network, sorted."""

    def list_connections(area, of, others, delays, weights, edges, regions, nearest, stride, sign):
        """Sort connections by the region they are ``of``; those with a delay under ``nearest`` come last of each."""
        row, column, delay, of_edge = i32_at(of), i32_at(others), i32_at(delays), at(weights)
        first, near, reads = places(area, regions)
        next_of = i64_at(area + 8 * (2 * regions + 1))
        weight = at(weights_at(area, regions, edges))
        for i in range(regions + 1):
            first[i] = 0
        for e in range(edges):
            first[row[e] + 1] += 1
        for i in range(regions):
            first[i + 1] += first[i]
            next_of[i] = first[i]
        for far in range(2):
            for e in range(edges):
                if (delay[e] >= nearest) == (far == 0):
                    k = next_of[row[e]]
                    reads[k] = column[e] * stride + sign * delay[e]
                    weight[k] = of_edge[e]
                    next_of[row[e]] = k + 1
            if far == 0:
                for i in range(regions):
                    near[i] = next_of[i]

    return (list_connections,)


def _sums(kind: str, at, one):
    """What arrives at regions."""

    def sum_far(area, regions, edges, source, start, sums, begin, end):
        """The sums of a whole tile over the connections that are not near, ``(regions, TILE)``; of some regions."""
        first, near, reads = places(area, regions)
        weight, sent, total = at(weights_at(area, regions, edges)), at(source), at(sums)
        for i in range(begin, end):
            even, odd = zeros(one), zeros(one)
            e, last = first[i], near[i]
            while e + 1 < last:
                even = multiply_add(weight[e], sent, reads[e] + start, even)
                odd = multiply_add(weight[e + 1], sent, reads[e + 1] + start, odd)
                e += 2
            if e < last:
                even = multiply_add(weight[e], sent, reads[e] + start, even)
            put(total, TILE * (i - begin), even)
            put(total, TILE * (end - begin), odd)
            for t in range(TILE):
                total[TILE * (i - begin) + t] += total[TILE * (end - begin) + t]

    def sum_near(area, regions, edges, source, now, sums, phase, to, begin, end):
        """Add what is near to the sums of one step of the tile, and write them to a row."""
        first, near, reads = places(area, regions)
        weight, sent, total, row = at(weights_at(area, regions, edges)), at(source), at(sums), at(to)
        for i in range(begin, end):
            value = total[TILE * (i - begin) + phase]
            for e in range(near[i], first[i + 1]):
                value = fma(weight[e], sent[reads[e] + now], value)
            row[i - begin] = value

    def sum_now(weights, regions, block, width, source, to):
        """Of connections without delay: a block of a matrix, ``(regions, width)``, the sources in rows, times a row."""
        weight, sent, total = at(weights), at(source), at(to)
        for i in range(block):
            total[i] = one - one
        whole = regions // 4 * 4
        for j in range(0, whole, 4):
            a, b, c, d = sent[j], sent[j + 1], sent[j + 2], sent[j + 3]
            at_a, at_b, at_c, at_d = j * width, (j + 1) * width, (j + 2) * width, (j + 3) * width
            for i in range(block):
                value = fma(weight[at_a + i], a, total[i])
                value = fma(weight[at_b + i], b, value)
                value = fma(weight[at_c + i], c, value)
                total[i] = fma(weight[at_d + i], d, value)
        for j in range(whole, regions):
            for i in range(block):
                total[i] = fma(weight[j * width + i], sent[j], total[i])

    def sum_edges(area, regions, edges, source, to, begin, end):
        """Of connections without delay, in a list: from a row to a row, each sum in four parts."""
        first, _, reads = places(area, regions)
        weight, sent, total = at(weights_at(area, regions, edges)), at(source), at(to)
        for i in range(begin, end):
            a, b, c, d = one - one, one - one, one - one, one - one
            e, last = first[i], first[i + 1]
            while e + 3 < last:
                a = fma(weight[e], sent[reads[e]], a)
                b = fma(weight[e + 1], sent[reads[e + 1]], b)
                c = fma(weight[e + 2], sent[reads[e + 2]], c)
                d = fma(weight[e + 3], sent[reads[e + 3]], d)
                e += 4
            while e < last:
                a = fma(weight[e], sent[reads[e]], a)
                e += 1
            total[i - begin] = (a + b) + (c + d)

    return sum_far, sum_near, sum_now, sum_edges


def _moves(kind: str, at, one):
    """What is sent, from and to rows of time."""

    def scatter(row, target, stride, now, regions):
        """Write a row to one step of what all regions sent."""
        sent, to = at(row), at(target)
        for j in range(regions):
            to[j * stride + now] = sent[j]

    def move(source, source_stride, begin, target, stride, start, regions, count):
        """Copy ``count`` numbers of each region."""
        sent, to = at(source), at(target)
        for j in range(regions):
            for h in range(count):
                to[j * stride + start + h] = sent[j * source_stride + begin + h]

    def fill(target, count):
        to = at(target)
        for k in range(count):
            to[k] = one - one

    def add_final(row, final, depth, place, regions):
        """Add the cotangent of one place of the last history."""
        to, ct = at(row), at(final)
        for j in range(regions):
            to[j] += ct[j * depth + place]

    return scatter, move, fill, add_final


def _cotangents(kind: str, at, one):
    """Cotangents of the first history and of the weights."""

    @reordering("reassoc", "contract")
    def product(left, i, right, j, count):
        a, b = at(left), at(right)
        total = one - one
        for k in range(count):
            total += a[i + k] * b[j + k]
        return total

    def to_history(target, final, depth, steps, pushed, stride, of, others, delays, weights, edges, first, end):
        """The cotangent of the first history of some regions, from those of all sums and of the last history."""
        to, last, ct = at(target), at(final), at(pushed)
        row, column, delay, weight = i32_at(of), i32_at(others), i32_at(delays), at(weights)
        for j in range(first, end):
            for h in range(depth):
                to[j * depth + h] = last[j * depth + h - steps] if h >= steps else one - one
        for e in range(edges):
            if first <= column[e] and column[e] < end:
                begin, source, w = column[e] * depth + depth - delay[e], row[e] * stride, weight[e]
                for t in range(delay[e]):
                    to[begin + t] = fma(w, ct[source + t], to[begin + t])

    def to_weights(target, sent, sent_stride, depth, pushed, stride, steps, of, others, delays, first, end):
        """The cotangent of each weight, of some edges, by spans of time."""
        to = at(target)
        row, column, delay = i32_at(of), i32_at(others), i32_at(delays)
        for e in range(first, end):
            to[e] = one - one
        for start in range(0, steps, SPAN):
            count = min(SPAN, steps - start)
            for e in range(first, end):
                to[e] += product(
                    pushed, row[e] * stride + start, sent, column[e] * sent_stride + depth - delay[e] + start, count
                )

    return to_history, to_weights


for _group in (_lists, _sums, _moves, _cotangents):
    for _kind, _at, _one in (("f32", f32_at, f32(1.0)), ("f64", f64_at, f64(1.0))):
        globals().update({function.__name__: function for function in named(_kind, *_group(_kind, _at, _one))})
