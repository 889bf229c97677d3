"""Kernels of the gradients of selective_scan.

Letters as in `selective_scan_kernels`; V  channels of a lane
A program scans its chunk again and saves the state before every STEPS-th step. Then it walks back:
it scans STEPS steps once more from a saved state, keeps their states in registers, and uses them in
reverse. SPLIT lanes share the states of a channel, and each lane serves V channels, so that sums
over states and sums over channels both need few exchanges between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvim.ops.triton.common import exp2
from fastvim.ops.triton.selective_scan_kernels import load_states

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def flow_back_kernel(
    delta, BC, p_rates, dy, flows, sums,
    G, S, E, chunk, chunks, dy_direction, dy_sequence,
    NP: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before each chunk from the chunk's own outputs.

    flows (G, chunks, NP, E): these gradients. sums (G, chunks, E): the chunk's step sizes, summed.
    """
    g = tl.program_id(0).to(tl.int64)
    k = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    p_dy = dy + direction * dy_direction + (g % (G // 2)) * dy_sequence + columns
    rates = ()
    flow = ()
    for n in tl.static_range(NP):
        rates = rates + (tl.load(p_rates + (direction * NP + n) * E + columns, mask=mask, other=0),)
        flow = flow + (tl.zeros((BLOCK,), tl.float32),)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)
    for i in range(begin, end):
        walked = begin + end - 1 - i
        s = walked + direction * (S - 1 - 2 * walked)
        step = tl.load(delta + (g * S + s) * E + columns, mask=mask, other=0.0)
        b_dy = tl.load(p_dy + s * E, mask=mask, other=0.0).to(tl.float32)
        total += step
        after = ()
        for n in tl.static_range(NP):
            c = tl.load(BC + (g * S + s) * 2 * NP + NP + n)
            after = after + (exp2(step * rates[n], FAST) * (flow[n] + c * b_dy),)
        flow = after
    tl.store(sums + (g * chunks + k) * E + columns, total, mask=mask)
    for n in tl.static_range(NP):
        tl.store(flows + ((g * chunks + k) * NP + n) * E + columns, flow[n], mask=mask)


@triton.jit
def _load_channels(p, E, columns, present, V: tl.constexpr, BLOCK: tl.constexpr):
    """V rows of BLOCK channels each, in float32."""
    values = ()
    for v in tl.static_range(V):
        mask = present & (columns + v * BLOCK < E)
        values = values + (tl.load(p + columns + v * BLOCK, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _load_steps(
    u, delta, slopes, p_dy, p_pairs, g, direction, first, end, S, E, columns, lane,
    BACK: tl.constexpr, J: tl.constexpr, NP: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """What STEPS steps need: step sizes, inputs and B; with BACK also C, dy and softplus' slopes.

    Steps from `end` on get size 0, so they change nothing.
    """
    loaded = ()
    for t in tl.static_range(STEPS):
        i = tl.minimum(first + t, end - 1)
        s = i + direction * (S - 1 - 2 * i)
        row = g * S + s
        inside = first + t < end
        steps = _load_channels(delta + row * E, E, columns, inside, V, BLOCK)
        inputs = _load_channels(u + row * E, E, columns, inside, V, BLOCK)
        b = load_states(p_pairs + row * NP, lane, 0, J, NP)
        if BACK:
            c = load_states(p_pairs + row * NP, lane, 1, J, NP)
            upstream = _load_channels(p_dy + s * E, E, columns, inside, V, BLOCK)
            slope = _load_channels(slopes + row * E, E, columns, inside, V, BLOCK)
            loaded = loaded + ((steps, inputs, b, c, upstream, slope),)
        else:
            loaded = loaded + ((steps, inputs, b),)
    return loaded


@triton.jit
def scan_backward_kernel(
    u, delta, slopes, BC, p_rates, dy, states, flows, saved, du, draw, dBC, drates,
    G, S, E, chunk, chunks, groups, dy_direction, dy_sequence,
    CARRY: tl.constexpr, NP: tl.constexpr, FAST: tl.constexpr, STEPS: tl.constexpr,
    V: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk.

    saved (G, chunks, groups, NP, E): the states before each group of STEPS steps.
    draw: the gradient of the step size before softplus.
    dBC (blocks, G, S, 2·NP) and drates (G, chunks, NP, E) are partial sums. drates lacks the
    rates as a factor.

    A lane holds J states of V channels; state j of channel v is entry v · J + j of its tuples.
    What a group needs is loaded at once.
    """
    J: tl.constexpr = NP // SPLIT
    g = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    k = tl.program_id(2)
    columns = block * V * BLOCK + tl.arange(0, BLOCK)[None, :]
    lane = tl.arange(0, SPLIT)[:, None]
    direction = (g >= G // 2).to(tl.int64)
    p_pairs = BC.to(tl.pointer_type(tl.int64))
    p_dy = dy + direction * dy_direction + (g % (G // 2)) * dy_sequence
    o_states = ((g * chunks + k) * NP + lane * J) * E + columns
    p_saved = saved + ((g * chunks + k) * groups * NP + lane * J) * E + columns
    p_dBC = dBC + (block * G + g) * S * 2 * NP + tl.arange(0, SPLIT) * J
    rates = ()
    h = ()
    flow = ()
    drate = ()
    zero = tl.zeros((SPLIT, BLOCK), tl.float32)
    for v in tl.static_range(V):
        mask = columns + v * BLOCK < E
        for j in tl.static_range(J):
            p_rate = p_rates + (direction * NP + lane * J + j) * E + columns + v * BLOCK
            rates = rates + (tl.load(p_rate, mask=mask, other=0.0),)
            drate = drate + (zero,)
            if CARRY:
                h = h + (tl.load(states + o_states + j * E + v * BLOCK, mask=mask, other=0.0),)
                flow = flow + (tl.load(flows + o_states + j * E + v * BLOCK, mask=mask, other=0.0),)
            else:
                h = h + (zero,)
                flow = flow + (zero,)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)
    last = (end - begin + STEPS - 1) // STEPS

    for group in range(last - 1):
        now = _load_steps(
            u, delta, slopes, p_dy, p_pairs, g, direction, begin + group * STEPS, end, S, E,
            columns, lane, False, J, NP, V, BLOCK, STEPS,
        )  # fmt: skip
        for v in tl.static_range(V):
            for j in tl.static_range(J):
                p_state = p_saved + (group * NP + j) * E + v * BLOCK
                tl.store(p_state, h[v * J + j], mask=columns + v * BLOCK < E)
        for t in tl.static_range(STEPS):
            after = ()
            for v in tl.static_range(V):
                step = now[t][0][v]
                inflow = step * now[t][1][v]
                for j in tl.static_range(J):
                    decay = exp2(step * rates[v * J + j], FAST)
                    after = after + (decay * h[v * J + j] + inflow * now[t][2][j],)
            h = after

    for turn in range(last):
        group = last - 1 - turn
        first = begin + group * STEPS
        path = h  # states before each step of the group and after the last
        now = _load_steps(
            u, delta, slopes, p_dy, p_pairs, g, direction, first, end, S, E,
            columns, lane, True, J, NP, V, BLOCK, STEPS,
        )  # fmt: skip
        before = ()
        for v in tl.static_range(V):
            for j in tl.static_range(J):
                p_state = p_saved + (tl.maximum(group - 1, 0) * NP + j) * E + v * BLOCK
                mask = (columns + v * BLOCK < E) & (group > 0)
                before = before + (tl.load(p_state, mask=mask, other=0.0),)
        h = before
        for t in tl.static_range(STEPS):
            for v in tl.static_range(V):
                step = now[t][0][v]
                inflow = step * now[t][1][v]
                for j in tl.static_range(J):
                    decay = exp2(step * rates[v * J + j], FAST)
                    path = path + (decay * path[(t * V + v) * J + j] + inflow * now[t][2][j],)
        for t in tl.static_range(STEPS - 1, -1, -1):
            i = tl.minimum(first + t, end - 1)
            s = i + direction * (S - 1 - 2 * i)
            inside = first + t < end
            steps = now[t][0]
            inputs = now[t][1]
            b = now[t][2]
            c = now[t][3]
            upstream = now[t][4]
            for j in tl.static_range(J):
                db = zero
                dc = zero
                for v in tl.static_range(V):
                    dh = flow[v * J + j] + c[j] * upstream[v]
                    db += dh * (steps[v] * inputs[v])
                    dc += upstream[v] * path[((t + 1) * V + v) * J + j]
                tl.store(p_dBC + s * 2 * NP + j, tl.sum(db, axis=1), mask=inside)
                tl.store(p_dBC + s * 2 * NP + NP + j, tl.sum(dc, axis=1), mask=inside)
            after = ()
            sums = ()
            for v in tl.static_range(V):
                dinflow = zero
                dstep = zero
                for j in tl.static_range(J):
                    dh = flow[v * J + j] + c[j] * upstream[v]
                    dinflow += dh * b[j]
                    dh *= exp2(steps[v] * rates[v * J + j], FAST)
                    exponent = dh * path[(t * V + v) * J + j]
                    dstep += exponent * rates[v * J + j]
                    sums = sums + (drate[v * J + j] + exponent * steps[v],)
                    after = after + (dh,)
                dinflow = tl.sum(dinflow, axis=0, keep_dims=True)
                dstep = tl.sum(dstep, axis=0, keep_dims=True) * LN_2 + dinflow * inputs[v]
                present = inside & (columns + v * BLOCK < E)
                o_row = (g * S + s) * E + columns + v * BLOCK
                tl.store(du + o_row, dinflow * steps[v], mask=present)
                tl.store(draw + o_row, dstep * now[t][5][v], mask=present)
            flow = after
            drate = sums
    for v in tl.static_range(V):
        for j in tl.static_range(J):
            p_drate = drates + o_states + j * E + v * BLOCK
            tl.store(p_drate, drate[v * J + j] * LN_2, mask=columns + v * BLOCK < E)


@triton.jit
def select_backward_kernel(
    x_proj, dt_proj, scan_du, draw, partial_dBC, du, dprojected,
    M, parts, blocks, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    R_BLOCK: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the projected values, dprojected (2, M, R_BLOCK + 2·NP), and of u.

    A program takes every `parts`-th block of channels of its steps. It projects for itself.
    """
    direction = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (rows < M)[:, None]
    places = (direction.to(tl.int64) * M + rows)[:, None]
    ranks = tl.arange(0, R_BLOCK)
    state = tl.arange(0, 2 * NP)
    source = R + state // NP * N + state % NP
    is_state = state % NP < N
    depth = tl.arange(0, DEPTH)

    dbc = tl.zeros((ROWS, 2 * NP), tl.float32)
    for block in range(blocks):
        p_dBC = partial_dBC + (block * 2 * M + places) * 2 * NP + state[None, :]
        dbc += tl.load(p_dBC, mask=present, other=0.0)
    ddt = tl.zeros((ROWS, R_BLOCK), tl.float32)
    for k in range(0, E, DEPTH):
        inside = k + depth < E
        p_draw = draw + places * E + k + depth[None, :]
        b_draw = tl.load(p_draw, mask=present & inside[None, :], other=0.0)
        p_weight = dt_proj + (direction * E + k + depth[:, None]) * R + ranks[None, :]
        mask = inside[:, None] & (ranks < R)[None, :]
        weight = tl.load(p_weight, mask=mask, other=0.0).to(tl.float32)
        # Each block is summed apart, as in `_select_kernel`.
        ddt += tl.dot(b_draw, weight, 0.0 * ddt, input_precision=PRECISION)
    if tl.program_id(2) == 0:
        p_out = dprojected + places * (R_BLOCK + 2 * NP)
        tl.store(p_out + ranks[None, :], ddt, mask=present)
        tl.store(p_out + R_BLOCK + state[None, :], dbc, mask=present)
    p_weight = x_proj + direction * (R + 2 * N) * E
    for k in range(tl.program_id(2) * DEPTH, E, parts * DEPTH):
        columns = (k + depth)[None, :]
        mask = present & (columns < E)
        b_du = tl.load(scan_du + places * E + columns, mask=mask, other=0.0)
        inside = (ranks < R)[:, None] & (columns < E)
        weight = tl.load(p_weight + ranks[:, None] * E + columns, mask=inside, other=0.0)
        b_du = tl.dot(ddt, weight.to(tl.float32), b_du, input_precision=PRECISION)
        inside = is_state[:, None] & (columns < E)
        weight = tl.load(p_weight + source[:, None] * E + columns, mask=inside, other=0.0)
        b_du = tl.dot(dbc, weight.to(tl.float32), b_du, input_precision=PRECISION)
        tl.store(du + places * E + columns, b_du, mask=mask)


@triton.jit
def weights_backward_kernel(
    u, dt, draw, dprojected, partial,
    M, E, splits,
    R_BLOCK: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of x_proj, dt_proj and dt_bias, each program from every `splits`-th block of steps.

    partial (splits, 2, 2·R_BLOCK + 2·NP + 1, E): rows of x_proj (R_BLOCK of dt, NP of B, NP of C),
    columns of dt_proj (R_BLOCK), and the bias.
    """
    direction = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    ranks = tl.arange(0, R_BLOCK)
    state = tl.arange(0, 2 * NP)
    of_dt = tl.zeros((R_BLOCK, DEPTH), tl.float32)
    of_states = tl.zeros((2 * NP, DEPTH), tl.float32)
    of_ranks = tl.zeros((R_BLOCK, DEPTH), tl.float32)
    of_bias = tl.zeros((ROWS, DEPTH), tl.float32)
    # b_dt and b_draw are both float32, so TF32 would round both: this product always takes three.
    # In the others one factor has the dtype of u, which TF32 does not round.
    both: tl.constexpr = "tf32x3" if PRECISION == "tf32" else PRECISION
    for first in range(tl.program_id(2) * ROWS, M, splits * ROWS):
        rows = first + tl.arange(0, ROWS)
        present = (rows < M)[:, None]
        places = direction * M + rows
        mask = present & (columns < E)[None, :]
        p_tile = places[:, None] * E + columns[None, :]
        b_u = tl.load(u + p_tile, mask=mask, other=0.0).to(tl.float32)
        b_draw = tl.load(draw + p_tile, mask=mask, other=0.0)
        p_row = dprojected + places[:, None] * (R_BLOCK + 2 * NP)
        ddt = tl.load(p_row + ranks[None, :], mask=present, other=0.0)
        dbc = tl.load(p_row + R_BLOCK + state[None, :], mask=present, other=0.0)
        b_dt = tl.load(dt + places[:, None] * R_BLOCK + ranks[None, :], mask=present, other=0.0)
        of_dt = tl.dot(tl.trans(ddt), b_u, of_dt, input_precision=PRECISION)
        of_states = tl.dot(tl.trans(dbc), b_u, of_states, input_precision=PRECISION)
        of_ranks = tl.dot(tl.trans(b_dt), b_draw, of_ranks, input_precision=both)
        of_bias += b_draw
    count: tl.constexpr = 2 * R_BLOCK + 2 * NP + 1
    p_partial = partial + (tl.program_id(2) * 2 + direction) * count * E + columns[None, :]
    mask = (columns < E)[None, :]
    tl.store(p_partial + ranks[:, None] * E, of_dt, mask=mask)
    tl.store(p_partial + (R_BLOCK + state[:, None]) * E, of_states, mask=mask)
    tl.store(p_partial + (R_BLOCK + 2 * NP + ranks[:, None]) * E, of_ranks, mask=mask)
    of_bias = tl.sum(of_bias, axis=0)
    tl.store(p_partial + (count - 1) * E, of_bias[None, :], mask=mask)
