/* The searches all formats share. Lane-major: x[i * GROUPS + g] holds element i of LANES sub-blocks, so each lane does
 * exactly ggml's operations on one sub-block in ggml's order. Letters follow ggml and docs/codecs.
 *
 * A search returns scales, and for each lane the rule its codes came from (the factor s, the shift): codes are cheap to
 * make again along a row, and the K formats need them only where a quantized scale is zero. */
#ifndef QUANT_SEARCH_H
#define QUANT_SEARCH_H

#include "lanes.h"

#define SUB_MAX 32      /* weights in a sub-block, at most */
#define EPSILON 1e-15f  /* GROUP_MAX_EPS */
#define ALL_ZERO INFINITY /* a factor s that says: codes are all 0 (no search can end with it) */

/* --- affine: make_qkx2_quants (without importance), make_qkx3_quants (with) --- */

struct affine {
    int n, N;
    float r0, r1;
    int T;         /* last step */
    int absolute;  /* error |delta| instead of delta * delta */
    int guarded;   /* steps clamp before rounding (current ggml, with importance) */
};

struct affine_fit { /* one value for each lane */
    float scale[WIDTH], offset[WIDTH];
    float s[WIDTH], shift[WIDTH]; /* codes = NEAR(s * (x - shift)), clamped */
    int32_t guarded[WIDTH];       /* clamped before rounding */
};

struct sums {
    vf a[GROUPS], b[GROUPS], c[GROUPS];
};

/* How a step rounds: FAST needs |s * (x - lo)| < 2^22; GUARDED bounds the value first, EXACT rounds by the bit formula. */
enum rounding { FAST, GUARDED, EXACT };

/* Codes of one step and the sums over them */
INLINE void affine_sums(enum rounding rounding, int n, int N, const vf *x, const vf *w, const vf *s, const vf *lo, vf *l,
                        struct sums *sum) {
    const vf top = splat_limit((float)N), zero = splat_limit(0);
    vf a[GROUPS], b[GROUPS], c[GROUPS], f[GROUPS], t[GROUPS];
    EACH_GROUP {
        a[g] = b[g] = c[g] = zero;
        f[g] = s[g];
        t[g] = lo[g];
    }
    for (int i = 0; i < n; i++) {
        EACH_GROUP {
            const vf xi = x[i * GROUPS + g];
            vf v = f[g] * (xi - t[g]);
            if (rounding == EXACT)
                v = to_float(clamp_int(near_bits(v), 0, N));
            else
                v = near_small(rounding == FAST ? cap(floor_zero(v, zero), top) : smaller(larger(v, zero), top));
            l[i * GROUPS + g] = v;
            const vf wl = w[i * GROUPS + g] * v;
            a[g] += wl;
            b[g] += wl * v;
            c[g] += wl * xi;
        }
    }
    EACH_GROUP {
        sum->a[g] = a[g];
        sum->b[g] = b[g];
        sum->c[g] = c[g];
    }
}

NOINLINE void affine_sums_slow(int guarded, int n, int N, const vf *x, const vf *w, const vf *s, const vf *lo, vf *l,
                               struct sums *sum) {
    if (guarded)
        affine_sums(GUARDED, n, N, x, w, s, lo, l, sum);
    else
        affine_sums(EXACT, n, N, x, w, s, lo, l, sum);
}

/* E = sum of w * |delta| or w * delta^2 with delta = scale * l + lo - x */
INLINE void affine_error(int absolute, int n, const vf *x, const vf *w, const vf *l, const vf *scale, const vf *lo,
                         vf *error) {
    vf e[GROUPS], f[GROUPS], t[GROUPS];
    EACH_GROUP {
        e[g] = splat(0);
        f[g] = scale[g];
        t[g] = lo[g];
    }
    for (int i = 0; i < n; i++) {
        EACH_GROUP {
            const vf delta = f[g] * l[i * GROUPS + g] + t[g] - x[i * GROUPS + g];
            e[g] += w[i * GROUPS + g] * (absolute ? magnitude(delta) : delta * delta);
        }
    }
    EACH_GROUP error[g] = e[g];
}

/* May s * (x - lo) be 2^22 or more, infinite or NaN anywhere? It is monotonic in x: the ends decide. */
INLINE vi affine_out_of_range(vf s, vf lo, vf least, vf hi) {
    const vf limit = splat(4194304.0f);
    return ~(LESS(magnitude(s * (least - lo)), limit) & LESS(magnitude(s * (hi - lo)), limit));
}

NOINLINE void affine_search(const struct affine *p, const vf *x, const vf *w, struct affine_fit *fit) {
    const int n = p->n, N = p->N;
    const vf zero = splat(0), one = splat(1);
    vf l[SUB_MAX * GROUPS];
    vf least[GROUPS], lo[GROUPS], hi[GROUPS], W[GROUPS], X[GROUPS], s[GROUPS];
    vf best[GROUPS], scale[GROUPS], best_s[GROUPS], best_shift[GROUPS];
    vi flat[GROUPS], best_guarded[GROUPS], range = splat_int(0);
    struct sums sum;

    EACH_GROUP {
        lo[g] = hi[g] = x[g];
        W[g] = w[g];
        X[g] = w[g] * x[g];
        for (int i = 1; i < n; i++) {
            const vf xi = x[i * GROUPS + g], wi = w[i * GROUPS + g];
            lo[g] = smaller(xi, lo[g]);
            hi[g] = larger(xi, hi[g]);
            W[g] += wi;
            X[g] += wi * xi;
        }
        least[g] = lo[g];
        lo[g] = select(GREATER(lo[g], zero), zero, lo[g]);
        flat[g] = EQUAL(hi[g], lo[g]);
        s[g] = splat((float)N) / select(flat[g], one, hi[g] - lo[g]);
        scale[g] = one / s[g];
        best_s[g] = s[g];
        best_shift[g] = lo[g];
        best_guarded[g] = splat_int(0);
        range |= affine_out_of_range(s[g], lo[g], least[g], hi[g]);
    }
    if (any(range))
        affine_sums_slow(0, n, N, x, w, s, lo, l, &sum);
    else
        affine_sums(FAST, n, N, x, w, s, lo, l, &sum);
    if (p->absolute)
        affine_error(1, n, x, w, l, scale, lo, best);
    else
        affine_error(0, n, x, w, l, scale, lo, best);
    EACH_GROUP best[g] = select(flat[g], splat(-1), best[g]); /* a flat lane runs along and accepts nothing */

    for (int t = 0; t <= p->T; t++) {
        const vf numerator = splat(p->r0 + p->r1 * (float)t + (float)N);
        vf sigma[GROUPS], mu[GROUPS], error[GROUPS];
        vi proper[GROUPS], better[GROUPS], some = splat_int(0);
        range = splat_int(0);
        EACH_GROUP {
            s[g] = numerator / select(flat[g], one, hi[g] - lo[g]);
            range |= affine_out_of_range(s[g], lo[g], least[g], hi[g]);
        }
        if (any(range))
            affine_sums_slow(p->guarded, n, N, x, w, s, lo, l, &sum);
        else
            affine_sums(FAST, n, N, x, w, s, lo, l, &sum);
        EACH_GROUP {
            const vf a = sum.a[g], b = sum.b[g], c = sum.c[g];
            const vf D = W[g] * b - a * a;
            proper[g] = GREATER(D, zero);
            sigma[g] = (W[g] * c - X[g] * a) / D;
            mu[g] = (b * X[g] - a * c) / D;
            const vi positive = GREATER(mu[g], zero);
            mu[g] = select(positive, zero, mu[g]);
            sigma[g] = select(positive, c / b, sigma[g]);
        }
        if (p->absolute)
            affine_error(1, n, x, w, l, sigma, mu, error);
        else
            affine_error(0, n, x, w, l, sigma, mu, error);
        EACH_GROUP {
            better[g] = proper[g] & LESS(error[g], best[g]);
            some |= better[g];
        }
        if (!any(some))
            continue;
        EACH_GROUP {
            best[g] = select(better[g], error[g], best[g]);
            scale[g] = select(better[g], sigma[g], scale[g]);
            best_s[g] = select(better[g], s[g], best_s[g]);
            best_shift[g] = select(better[g], lo[g], best_shift[g]); /* before lo moves */
            best_guarded[g] |= better[g] & splat_int(-p->guarded);
            lo[g] = select(better[g], mu[g], lo[g]);
        }
    }
    EACH_GROUP {
        store(fit->scale + g * LANES, select(flat[g], zero, scale[g]));
        store(fit->offset + g * LANES, -lo[g]);
        store(fit->s + g * LANES, select(flat[g], zero, best_s[g]));
        store(fit->shift + g * LANES, best_shift[g]);
        store_int(fit->guarded + g * LANES, best_guarded[g]);
    }
}

/* --- symmetric: make_qx_quants --- */

struct scale_fit {
    float scale[WIDTH];
    float s[WIDTH]; /* codes = NEAR(s * x), clamped, plus N; or ALL_ZERO */
};

/* amax, m: the value of largest magnitude, signed, the first of equals. Returns which lanes hold an infinity or NaN. */
INLINE vi signed_extreme(int n, const vf *x, int g, vf *amax, vf *m) {
    vf a = splat(0), v = splat(0), odd = splat(0);
    for (int i = 0; i < n; i++) {
        const vf xi = x[i * GROUPS + g], size = magnitude(xi);
        v = select(GREATER(size, a), xi, v);
        a = larger(size, a);
        odd += xi * splat(0);
    }
    *amax = a;
    *m = v;
    return ~EQUAL(odd, splat(0));
}

INLINE void symmetric_pass(int exact, int both, int n, int N, const vf *x, const vf *wx, const vf *w, const vf *s, vf *p, vf *q) {
    const vf bottom = splat_limit((float)-N), top = splat_limit((float)(N - 1));
    vf ps[GROUPS], qs[GROUPS], f[GROUPS];
    EACH_GROUP {
        ps[g] = qs[g] = splat(0);
        f[g] = s[g];
    }
    for (int i = 0; i < n; i++) {
        EACH_GROUP {
            vf l = f[g] * x[i * GROUPS + g];
            if (exact)
                l = to_float(clamp_int(near_bits(l), -N, N - 1));
            else
                l = near_small(cap(both ? select(LESS(l, bottom), bottom, l) : l, top));
            ps[g] += wx[i * GROUPS + g] * l;
            qs[g] += (w[i * GROUPS + g] * l) * l;
        }
    }
    EACH_GROUP {
        p[g] = ps[g];
        q[g] = qs[g];
    }
}

/* p = sum of (w * x) * l, q = sum of (w * l) * l with the codes of step k, whose |s * x| is at most N + 0.1 * k: only from
 * k = 5 on can a code be below -N */
NOINLINE void symmetric_sums(int exact, int k, int n, int N, const vf *x, const vf *wx, const vf *w, const vf *s, vf *p, vf *q) {
    if (exact)
        symmetric_pass(1, 1, n, N, x, wx, w, s, p, q);
    else if (k > 4)
        symmetric_pass(0, 1, n, N, x, wx, w, s, p, q);
    else
        symmetric_pass(0, 0, n, N, x, wx, w, s, p, q);
}

NOINLINE void symmetric_search(int n, int N, const vf *x, const vf *w, struct scale_fit *fit) {
    const vf zero = splat(0);
    vf wx[SUB_MAX * GROUPS];
    vf m[GROUPS], scale[GROUPS], best[GROUPS], best_s[GROUPS], p[GROUPS], q[GROUPS], s[GROUPS];
    vi tiny[GROUPS], odd = splat_int(0);
    for (int i = 0; i < n * GROUPS; i++)
        wx[i] = w[i] * x[i];
    EACH_GROUP {
        vf amax;
        odd |= signed_extreme(n, x, g, &amax, &m[g]);
        tiny[g] = LESS(amax, splat(EPSILON));
        m[g] = select(tiny[g], splat(1), m[g]);
    }
    const int exact = any(odd); /* with finite x, |s * x| stays below N + 1 */
    EACH_GROUP best_s[g] = splat((float)-N) / m[g];
    symmetric_sums(exact, 0, n, N, x, wx, w, best_s, p, q);
    EACH_GROUP {
        scale[g] = select(EQUAL(q[g], zero), zero, p[g] / q[g]);
        best[g] = scale[g] * p[g];
    }
    for (int k = -9; k <= 9; k++) {
        if (k == 0)
            continue;
        EACH_GROUP s[g] = splat(-((float)N + 0.1f * (float)k)) / m[g];
        symmetric_sums(exact, k, n, N, x, wx, w, s, p, q);
        vi better[GROUPS], some = splat_int(0);
        EACH_GROUP {
            better[g] = GREATER(q[g], zero) & GREATER(p[g] * p[g], best[g] * q[g]);
            some |= better[g];
        }
        if (!any(some))
            continue;
        EACH_GROUP {
            scale[g] = select(better[g], p[g] / q[g], scale[g]);
            best[g] = select(better[g], scale[g] * p[g], best[g]);
            best_s[g] = select(better[g], s[g], best_s[g]);
        }
    }
    EACH_GROUP {
        store(fit->scale + g * LANES, select(tiny[g], zero, scale[g]));
        store(fit->s + g * LANES, select(tiny[g], splat(ALL_ZERO), best_s[g]));
    }
}

#endif
