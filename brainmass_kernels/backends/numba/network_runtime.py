"""What emitted CPU kernels of networks are made with besides `runtime`.

The sum of a region is over its connections, of each one multiply-add for every step. Where a delay has `TILE` steps or
more, what arrives in the next `TILE` steps was sent before them: those sums are made for all these steps at once, in
SIMD over time, as what a region sent lies together in time. How many cache lines are read is what binds, so delays of
`LONG` steps or more are summed for as many. Delays shorter than a tile are summed step by step. The order of each sum
is fixed: long, far, near.

A step writes and reads rows of regions, and sums of tiles rows of time. So a tile of steps is written to a window of
rows of regions and then turned, and the sums of a tile are turned when they are made. The window holds two tiles, and
what is near is read from it.
"""

# pyright: reportCallIssue=false, reportReturnType=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from .intrinsics import f32_at, f64_at, fma, i32_at, i64_at, multiply_add, pack_at, put, turn_tile, zeros
from .language import PACK, f32, f64, i64, reordering
from .runtime import named

# Steps that are summed at once.
TILE = PACK
# And of connections with delays as long as that.
LONG = 4 * TILE
# Steps of the window, which a list of connections knows when it is made.
WINDOW = 2 * TILE
# Steps over which a gradient by the weights reads what all regions sent, so that it stays in cache.
SPAN = 512


def columns_of(count):
    """The width of rows of so many numbers: whole tiles, an odd number, so that rows share no set of the cache."""
    return ((count + TILE - 1) // TILE | 1) * TILE


def places(area, regions):
    """Of a list of connections: where those of a region begin, its far ones and its near ones, and what they read."""
    return (
        i64_at(area),
        i64_at(area + 8 * (regions + 1)),
        i64_at(area + 16 * (regions + 1)),
        i64_at(area + 32 * (regions + 1)),
    )


def next_nears(area, regions):
    """Of each region the first from it on that has near connections, or the number of regions."""
    return i64_at(area + 24 * (regions + 1))


def weights_at(area, regions, edges):
    return area + 32 * (regions + 1) + 8 * edges


def long_sums(sums, size, regions):
    """Where, behind the sums of a tile, those of long connections are."""
    return sums + size * TILE * (columns_of(regions) + TILE)


def copy(to, numbers, begin, count):
    """Copy numbers, by packs, of which the last may have some of those before."""
    if count < TILE:
        for i in range(count):
            to[i] = numbers[begin + i]
    else:
        for i in range(0, count, TILE):
            place = min(i, count - TILE)
            put(to, place, pack_at(numbers, begin + place))


def _lists(kind: str, at, one):
    """The connections of a network, sorted."""

    def list_connections(area, of, others, delays, weights, edges, regions, nearest, longest, stride, sign, width):
        """Sort connections by the region they are ``of``, and those of each: long, far, and under ``nearest``.

        What one reads of is a place in rows of time, or where it is near in the window, whose rows have this width.
        """
        row, column, delay, of_edge = i32_at(of), i32_at(others), i32_at(delays), at(weights)
        first, far, near, reads = places(area, regions)
        next_of = next_nears(area, regions)
        weight = at(weights_at(area, regions, edges))
        for i in range(regions + 1):
            first[i] = 0
        for e in range(edges):
            first[row[e] + 1] += 1
        for i in range(regions):
            first[i + 1] += first[i]
            next_of[i] = first[i]
        for kind in range(3):
            for e in range(edges):
                if i64(delay[e] < longest) + i64(delay[e] < nearest) == kind:
                    k = next_of[row[e]]
                    reads[k] = column[e] * stride + sign * delay[e] if kind < 2 else column[e] - width * delay[e]
                    weight[k] = of_edge[e]
                    next_of[row[e]] = k + 1
            if kind == 0:
                for i in range(regions):
                    far[i] = next_of[i]
            if kind == 1:
                for i in range(regions):
                    near[i] = next_of[i]
        next_of[regions] = regions
        for i in range(regions - 1, -1, -1):
            next_of[i] = i if near[i] < first[i + 1] else next_of[i + 1]

    return (list_connections,)


def _sums(kind: str, at, one):
    """What arrives at regions."""
    size = 4 if kind == "f32" else 8

    def sum_long(area, regions, edges, source, start, sums, tiles, begin, end):
        """The sums of some tiles over long connections, a row of `LONG` steps a region; of some regions."""
        first, far, _, reads = places(area, regions)
        weight, sent = at(weights_at(area, regions, edges)), at(source)
        total = at(long_sums(sums, size, end - begin))
        for i in range(begin, end):
            to = LONG * (i - begin)
            if tiles == LONG // TILE:
                a, b, c, d = zeros(one), zeros(one), zeros(one), zeros(one)
                for e in range(first[i], far[i]):
                    place = reads[e] + start
                    a = multiply_add(weight[e], sent, place, a)
                    b = multiply_add(weight[e], sent, place + TILE, b)
                    c = multiply_add(weight[e], sent, place + 2 * TILE, c)
                    d = multiply_add(weight[e], sent, place + 3 * TILE, d)
                put(total, to, a)
                put(total, to + TILE, b)
                put(total, to + 2 * TILE, c)
                put(total, to + 3 * TILE, d)
            else:
                for k in range(tiles):
                    a = zeros(one)
                    for e in range(first[i], far[i]):
                        a = multiply_add(weight[e], sent, reads[e] + start + TILE * k, a)
                    put(total, to + TILE * k, a)

    def sum_far(area, regions, edges, source, start, sums, tile, begin, end):
        """The sums of a tile over the connections that are not near, a row a step; of some regions.

        ``tile`` says which of those that there are long sums of. Behind the sums are those of the last regions, a row a
        region, until they are turned.
        """
        _, far, near, reads = places(area, regions)
        weight, sent, total = at(weights_at(area, regions, edges)), at(source), at(sums)
        long = at(long_sums(sums, size, end - begin))
        width = columns_of(end - begin)
        for i in range(begin, end):
            value = pack_at(long, LONG * (i - begin) + TILE * tile)
            for e in range(far[i], near[i]):
                value = multiply_add(weight[e], sent, reads[e] + start, value)
            put(total, TILE * width + TILE * ((i - begin) & (TILE - 1)), value)
            if (i - begin) & (TILE - 1) == TILE - 1 or i == end - 1:
                turn_tile(total, TILE * width, TILE, total, (i - begin) & -TILE, width)

    def sum_near(area, regions, edges, window, step, columns, sums, phase, to, begin, end):
        """Write the sums of one step of the tile to a row, and add what is near."""
        first, _, near, reads = places(area, regions)
        next_near = next_nears(area, regions)
        weight, sent, total, row = at(weights_at(area, regions, edges)), at(window), at(sums), at(to)
        copy(row, total, phase * columns_of(end - begin), end - begin)
        now, all_rows = (step & (WINDOW - 1)) * columns, WINDOW * columns
        i = next_near[begin]
        while i < end:
            value = row[i - begin]
            for e in range(near[i], first[i + 1]):
                place = reads[e] + now
                value = fma(weight[e], sent[place if place >= 0 else place + all_rows], value)
            row[i - begin] = value
            i = next_near[i + 1]

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
        first, _, _, reads = places(area, regions)
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

    return sum_long, sum_far, sum_near, sum_now, sum_edges


def _moves(kind: str, at, one):
    """What is sent, from and to rows of time."""

    def to_window(window, row, regions):
        copy(at(window), at(row), 0, regions)

    def turn(window, step, target, stride, regions):
        """Write a tile of steps, rows of regions that begin every ``step`` numbers, to rows of time."""
        rows, to = at(window), at(target)
        if regions < TILE:
            for j in range(regions):
                for t in range(TILE):
                    to[j * stride + t] = rows[t * step + j]
        else:
            for j in range(0, regions, TILE):
                # The last tile of regions has some of those before.
                begin = min(j, regions - TILE)
                turn_tile(rows, begin, step, to, begin * stride, stride)

    def turn_some(window, step, target, stride, regions, first, end):
        """Write only some steps of the tile."""
        rows, to = at(window), at(target)
        for j in range(regions):
            for t in range(first, end):
                to[j * stride + t] = rows[t * step + j]

    def remember(window, columns, history, depth, regions):
        """Write the last steps of a history to the end of the window."""
        rows, past = at(window), at(history)
        for h in range(1, min(depth, TILE - 1) + 1):
            for j in range(regions):
                rows[(WINDOW - h) * columns + j] = past[j * depth + depth - h]

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

    return to_window, turn, turn_some, remember, move, fill, add_final


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
