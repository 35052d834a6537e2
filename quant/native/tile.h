/* From rows to lanes: widening of the source types, and the transposition. */
#ifndef QUANT_TILE_H
#define QUANT_TILE_H

#include "lanes.h"

#if LANES > 1
#if LANES == 4
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#elif LANES == 8
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif LANES == 16
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#ifdef __clang__
#define ZIP(a, b, order) __builtin_shufflevector(a, b, order)
#else
#define ZIP(a, b, order) __builtin_shuffle(a, b, (vi){order})
#endif
#endif

/* LANES vectors from LANES rows that are `stride` floats apart: column i of them in out[i * apart]. After log2(LANES) rounds of
 * zipping row i with row i + LANES/2, row i holds what was column i. */
INLINE void transpose_square(const float *rows, int64_t stride, vf *out, int apart) {
    vf r[LANES];
    EACH_LANE r[k] = load(rows + k * stride);
#if LANES > 1
    UNROLL for (int round = 1; round < LANES; round *= 2) {
        vf z[LANES];
        UNROLL for (int k = 0; k < LANES / 2; k++) {
            z[2 * k] = ZIP(r[k], r[k + LANES / 2], ZIP_LOW);
            z[2 * k + 1] = ZIP(r[k], r[k + LANES / 2], ZIP_HIGH);
        }
        EACH_LANE r[k] = z[k];
    }
#endif
    EACH_LANE out[k * apart] = r[k];
}

/* WIDTH sub-blocks of n weights that follow each other in memory -> lane-major (n a multiple of LANES). */
NOINLINE void to_lanes(int n, const float *rows, vf *out) {
    for (int g = 0; g < GROUPS; g++)
        for (int i = 0; i < n; i += LANES)
            transpose_square(rows + g * LANES * n + i, n, out + i * GROUPS + g, GROUPS);
}

#endif
