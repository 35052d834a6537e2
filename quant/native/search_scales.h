/* Three more searches: over a table of values (IQ4), by coordinates (Q3_K), and for scales that are positive (POS). */
#ifndef QUANT_SEARCH_SCALES_H
#define QUANT_SEARCH_SCALES_H

#include "search.h"

/* --- table search: quantize_row_iq4_nl_impl --- */

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
/* halves between neighbours: the index of v is how many of them are <= v (a tie goes up) */
static const float iq4_middles[15] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f, 7, 19, 31.5f, 45.5f, 61, 79, 101};

/* best_index_int8 and the table in one: the value next to v. NaN takes the last, as ggml's comparisons do, so count down
 * from it. */
INLINE vf iq4_nearest(vf v) {
    vf value = splat(113);
    UNROLL for (int j = 0; j < 15; j++) {
        const vf step = splat((float)(iq4_values[j + 1] - iq4_values[j]));
        value -= from_bits(LESS(v, splat(iq4_middles[j])) & bits(step));
    }
    return value;
}
INLINE vi iq4_index(vf v) {
    vi index = splat_int(15);
    UNROLL for (int j = 0; j < 15; j++) index += LESS(v, splat(iq4_middles[j]));
    return index;
}

NOINLINE void table_search(const vf *x, const vf *w, float *scales) {
    const vf zero = splat(0);
    vf m[GROUPS], scale[GROUPS], best[GROUPS];
    vi tiny[GROUPS];
    EACH_GROUP {
        vf amax;
        signed_extreme(32, x, g, &amax, &m[g]);
        tiny[g] = LESS(amax, splat(EPSILON));
        m[g] = select(tiny[g], splat(1), m[g]);
        scale[g] = best[g] = zero;
    }
    for (int k = -8; k <= 7; k++) { /* -8 stands for the first fit */
        vf p[GROUPS], q[GROUPS], s[GROUPS];
        EACH_GROUP {
            s[g] = k == -8 ? splat(1) / (-m[g] / splat(-127)) : splat((float)(k - 127)) / m[g];
            p[g] = q[g] = zero;
        }
        for (int i = 0; i < 32; i++) {
            EACH_GROUP {
                const vf xi = x[i * GROUPS + g], a = iq4_nearest(s[g] * xi), wa = w[i * GROUPS + g] * a;
                p[g] += wa * xi;
                q[g] += wa * a;
            }
        }
        EACH_GROUP {
            vi better = GREATER(q[g], zero);
            if (k != -8)
                better &= GREATER(p[g] * p[g], best[g] * q[g]);
            scale[g] = select(better, p[g] / q[g], scale[g]);
            if (k == -8)
                best[g] = scale[g] * p[g]; /* also where q is 0: 0 times p may be NaN */
            else
                best[g] = select(better, scale[g] * p[g], best[g]);
        }
    }
    EACH_GROUP store(scales + g * LANES, select(tiny[g], zero, scale[g]));
}

/* --- coordinate search: make_q3_quants --- */

/* One sweep over the codes L (here still -N .. N-1); returns which lanes changed, in any group. */
INLINE void coordinate_sweep(int n, int N, const vf *x, vf *L, vf *p, vf *q, vi *changed) {
    const vf zero = splat(0);
    EACH_GROUP changed[g] = splat_int(0);
    for (int i = 0; i < n; i++) {
        EACH_GROUP {
            const vf xi = x[i * GROUPS + g], old = L[i * GROUPS + g], w = xi * xi;
            vf p2 = p[g] - w * xi * old;
            vf q2 = q[g] - w * old * old;
            const vi possible = GREATER(p2, zero);
            const vf l = to_float(clamp_int(near_bits(xi * q2 / p2), -N, N - 1));
            p2 += w * xi * l;
            q2 += w * l * l;
            const vi better =
                possible & ~EQUAL(l, old) & GREATER(q2, zero) & GREATER(p2 * p2 * q[g], p[g] * p[g] * q2);
            L[i * GROUPS + g] = select(better, l, old);
            p[g] = select(better, p2, p[g]);
            q[g] = select(better, q2, q[g]);
            changed[g] |= better;
        }
    }
}

/* With at most `sweeps` sweeps; last_changed: -1 for each lane that the last one changed, else 0 */
NOINLINE void coordinate_search(int n, int N, int sweeps, const vf *x, float *scales, vf *L, int32_t *last_changed) {
    const vf zero = splat(0);
    vf p[GROUPS], q[GROUPS];
    vi tiny[GROUPS], changed[GROUPS], some;
    EACH_GROUP {
        vf amax, m;
        signed_extreme(n, x, g, &amax, &m);
        tiny[g] = LESS(amax, splat(EPSILON));
        const vf s = splat((float)-N) / select(tiny[g], splat(1), m);
        p[g] = q[g] = zero;
        for (int i = 0; i < n; i++) {
            const vf xi = x[i * GROUPS + g], w = xi * xi;
            const vf l = to_float(clamp_int(near_bits(s * xi), -N, N - 1));
            L[i * GROUPS + g] = l;
            p[g] += w * xi * l;
            q[g] += w * l * l;
        }
    }
    do { /* a lane without a change stays as it is: no freezing */
        coordinate_sweep(n, N, x, L, p, q, changed);
        some = splat_int(0);
        EACH_GROUP some |= changed[g];
    } while (--sweeps > 0 && any(some));
    EACH_GROUP {
        const vf scale = select(GREATER(q[g], zero), p[g] / q[g], zero);
        store(scales + g * LANES, select(tiny[g], zero, scale));
        store_int(last_changed + g * LANES, changed[g]);
        for (int i = 0; i < n; i++)
            L[i * GROUPS + g] = select(tiny[g], zero, L[i * GROUPS + g] + splat((float)N));
    }
}

/* --- positive-scale fit of the sub-block scales and mins: make_qp_quants --- */

/* Two fits side by side in the same lanes (one block a lane): of the scales, and of the mins. v[2 * i + f], L likewise;
 * the weights w[i] are shared. */
INLINE vi positive_codes(vf s, vf v, int N) { return smaller_int(near_bits(s * v), splat_int(N)); }

INLINE int positive_sweep(int n, int N, const vf *v, const vf *w, vi *L, vf *p, vf *q) {
    const vf zero = splat(0);
    vi changed = splat_int(0);
    for (int i = 0; i < n; i++) {
        UNROLL for (int f = 0; f < 2; f++) {
            const vf vi_ = v[2 * i + f];
            const vi old_code = L[2 * i + f];
            const vf old = to_float(old_code);
            vf p2 = p[f] - w[i] * vi_ * old;
            vf q2 = q[f] - w[i] * old * old;
            const vi possible = GREATER(p2, zero) & GREATER(q2, zero);
            const vi code = smaller_int(near_bits(vi_ * q2 / p2), splat_int(N));
            const vf l = to_float(code);
            p2 += w[i] * vi_ * l;
            q2 += w[i] * l * l;
            const vi better = possible & ~EQUAL(code, old_code) & GREATER(p2 * p2 * q[f], p[f] * p[f] * q2);
            L[2 * i + f] = select_int(better, code & 255, old_code);
            p[f] = select(better, p2, p[f]);
            q[f] = select(better, q2, q[f]);
            changed |= better;
        }
    }
    return any(changed);
}

NOINLINE void positive_fit(int n, int N, const vf *v, const vf *w, vf *scale, vi *L) {
    const vf zero = splat(0), one = splat(1);
    vf p[2], q[2];
    vi tiny[2];
    for (int f = 0; f < 2; f++) {
        vf m = zero, best = zero;
        for (int i = 0; i < n; i++)
            m = larger(m, v[2 * i + f]);
        tiny[f] = LESS(m, splat(EPSILON));
        m = select(tiny[f], one, m);
        vf s = splat((float)N) / m;
        const vf r = one / s;
        for (int i = 0; i < n; i++) {
            const vf delta = v[2 * i + f] - r * to_float(near_bits(s * v[2 * i + f]) & 255);
            best += w[i] * delta * delta;
        }
        for (int k = -4; k <= 4; k++) {
            if (k == 0)
                continue;
            const vf sk = splat(0.1f * (float)k + (float)N) / m, rk = one / sk;
            vf error = zero;
            for (int i = 0; i < n; i++) {
                const vf delta = v[2 * i + f] - rk * to_float(positive_codes(sk, v[2 * i + f], N));
                error += w[i] * delta * delta;
            }
            const vi better = LESS(error, best);
            best = select(better, error, best);
            s = select(better, sk, s);
        }
        p[f] = q[f] = zero;
        for (int i = 0; i < n; i++) {
            const vi code = positive_codes(s, v[2 * i + f], N);
            const vf l = to_float(code);
            L[2 * i + f] = code & 255; /* stored in 8 bits; the sums take it whole */
            p[f] += w[i] * v[2 * i + f] * l;
            q[f] += w[i] * l * l;
        }
    }
    for (int sweep = 0; sweep < 5; sweep++)
        if (!positive_sweep(n, N, v, w, L, p, q))
            break;
    for (int f = 0; f < 2; f++) {
        scale[f] = select(~tiny[f] & GREATER(q[f], zero), p[f] / q[f], zero);
        for (int i = 0; i < n; i++)
            L[2 * i + f] &= ~tiny[f];
    }
}

#endif
