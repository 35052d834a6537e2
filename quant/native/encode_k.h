/* Blocks of 256 weights: Q2_K .. Q6_K and IQ4_XS. Each takes a filled batch: search all sub-blocks, quantize the block's
 * scales, requantize the weights along the row, pack. */
#ifndef QUANT_ENCODE_K_H
#define QUANT_ENCODE_K_H

#include "batch.h"
#include "pack.h"

/* --- second level: the sub-block scales of one block --- */

INLINE float largest(const float *v, int n) {
    float m = 0;
    for (int j = 0; j < n; j++)
        if (v[j] > m)
            m = v[j];
    return m;
}
/* value of largest magnitude, signed, first of equals */
INLINE float extreme(const float *v, int n) {
    float a = 0, m = 0;
    for (int j = 0; j < n; j++)
        if (fabsf(v[j]) > a) {
            a = fabsf(v[j]);
            m = v[j];
        }
    return m;
}
/* Codes 0..N of non-negative scales by the largest; returns the scale of these codes. In 8 bits first, then cut. */
INLINE float quantize_scales(const float *v, int n, int N, uint8_t *codes) {
    const float m = largest(v, n), inverse = m > 0 ? (float)N / m : 0;
    for (int j = 0; j < n; j++)
        codes[j] = (uint8_t)near_one(inverse * v[j]);
    return m / (float)N;
}

/* Two-level affine formats: codes and block scales of all blocks, [block][16] */
struct block_scales {
    float d[BATCH], dmin[BATCH];
    uint8_t s[BATCH][16], m[BATCH][16];
};

static void scales_by_largest(const struct batch *b, int N, struct block_scales *out) {
    const int each = 256 / b->n;
    for (int k = 0; k < b->blocks; k++) {
        out->d[k] = quantize_scales(b->scale + k * each, each, N, out->s[k]);
        out->dmin[k] = quantize_scales(b->offset + k * each, each, N, out->m[k]);
    }
}

static void scales_by_importance(const struct batch *b, int N, struct block_scales *out) {
    const int each = 256 / b->n;
    vf v[2 * 16] = {splat(0)}, w[16] = {splat(0)}, fit[2];
    vi L[2 * 16];
    for (int i = 0; i < each; i++) { /* one block in a lane */
        float column[3][LANES] = {{0}};
        for (int k = 0; k < b->blocks; k++) {
            column[0][k] = b->scale[k * each + i];
            column[1][k] = b->offset[k * each + i];
            column[2][k] = b->weight[k * each + i];
        }
        v[2 * i] = load(column[0]);
        v[2 * i + 1] = load(column[1]);
        w[i] = load(column[2]);
    }
    positive_fit(each, N, v, w, fit, L);
    for (int k = 0; k < b->blocks; k++) {
        float d[2][LANES];
        store(d[0], fit[0]);
        store(d[1], fit[1]);
        out->d[k] = d[0][k];
        out->dmin[k] = d[1][k];
        for (int i = 0; i < each; i++) {
            int32_t code[2][LANES];
            store_int(code[0], L[2 * i]);
            store_int(code[1], L[2 * i + 1]);
            out->s[k][i] = (uint8_t)code[0][k];
            out->m[k][i] = (uint8_t)code[1][k];
        }
    }
}

/* --- last level: the weights of block k, along the row --- */

/* codes of x = delta * q - mu; a sub-block whose delta is 0 keeps those of the search */
static void requantize_affine(const struct batch *b, int k, int N, float d, float dmin, const uint8_t *s,
                              const uint8_t *m, int32_t *L) {
    const int n = b->n, each = 256 / n;
    for (int j = 0; j < each; j++) {
        const float delta = d * (float)s[j], mu = dmin * (float)m[j];
        const float *x = b->x + (k * each + j) * n;
        if (delta == 0) {
            affine_codes(b, k * each + j, N, L + j * n);
            continue;
        }
        const vf divisor = splat(delta), shift = splat(mu);
        for (int i = 0; i < n; i += LANES)
            store_int(L + j * n + i, clamp_int(near_bits((load(x + i) + shift) / divisor), 0, N));
    }
}

/* codes of x = (d * s) * (q - N). Returns 0 if delta is 0: then nothing is written. */
INLINE int requantize_symmetric(const struct batch *b, int sub, int N, float delta, int32_t *L) {
    const float *x = b->x + sub * b->n;
    if (delta == 0)
        return 0;
    const vf divisor = splat(delta);
    for (int i = 0; i < b->n; i += LANES)
        store_int(L + i, clamp_int(near_bits(load(x + i) / divisor), -N, N - 1) + splat_int(N));
    return 1;
}

/* --- formats --- */

static void encode_q2_k(struct batch *b, uint8_t *dst) {
    static const struct affine plain = {16, 3, -0.5f, 0.1f, 15, 1, 0}, weighted = {16, 3, -0.9f, 0.05f, 36, 0, 1};
    struct block_scales two;
    if (b->importance) {
        block_sigma2(b, 1, 1.0f / 256);
        search_affine(b, &weighted, BY_STATISTIC);
        scales_by_importance(b, 15, &two);
    } else {
        search_affine(b, &plain, BY_MAGNITUDE);
        scales_by_largest(b, 15, &two);
    }
    for (int k = 0; k < b->blocks; k++, dst += 84) {
        uint8_t s[16], m[16], q[256];
        int32_t L[256];
        put_half(dst + 80, half_one(two.d[k]));
        put_half(dst + 82, half_one(two.dmin[k]));
        for (int j = 0; j < 16; j++) { /* a code above 15 spills into the min, and is read back so */
            dst[j] = (uint8_t)(two.s[k][j] | two.m[k][j] << 4);
            s[j] = dst[j] & 15;
            m[j] = dst[j] >> 4;
        }
        requantize_affine(b, k, 3, get_half(dst + 80), get_half(dst + 82), s, m, L);
        narrow_codes(256, L, q);
        pack_two_bits(q, 0, dst + 16);
    }
}

static void encode_q4_q5_k(struct batch *b, int bits, uint8_t *dst) {
    static const struct affine plain[2] = {{32, 15, -1, 0.1f, 20, 0, 0}, {32, 31, -0.5f, 0.1f, 15, 0, 0}};
    static const struct affine weighted[2] = {{32, 15, -0.9f, 0.05f, 36, 0, 1}, {32, 31, -0.9f, 0.05f, 36, 0, 1}};
    const int N = bits == 5 ? 31 : 15, size = bits == 5 ? 176 : 144;
    struct block_scales two;
    if (b->importance) {
        block_sigma2(b, 2, 1.0f / 256);
        search_affine(b, &weighted[bits == 5], BY_STATISTIC);
        scales_by_importance(b, 63, &two);
    } else {
        search_affine(b, &plain[bits == 5], BY_RMS);
        scales_by_largest(b, 63, &two);
    }
    for (int k = 0; k < b->blocks; k++, dst += size) {
        uint8_t s[8], m[8], q[256];
        int32_t L[256];
        if (!b->importance || bits == 5) /* ggml leaves Q4_K's codes unclamped with importance */
            for (int j = 0; j < 8; j++) {
                two.s[k][j] = two.s[k][j] > 63 ? 63 : two.s[k][j];
                two.m[k][j] = two.m[k][j] > 63 ? 63 : two.m[k][j];
            }
        put_half(dst, half_one(two.d[k]));
        put_half(dst + 2, half_one(two.dmin[k]));
        pack_scales_12(two.s[k], two.m[k], dst + 4);
        unpack_scales_12(dst + 4, s, m);
        requantize_affine(b, k, N, get_half(dst), get_half(dst + 2), s, m, L);
        narrow_codes(256, L, q);
        if (bits == 5)
            pack_bit_plane(q, 4, dst + 16);
        pack_nibble_pairs(q, dst + size - 128);
    }
}

/* The 16 scales of each block by a second symmetric search, one block in a lane (Q3_K with importance) */
static void symmetric_scales(const struct batch *b, float *d, uint8_t u[][16]) {
    float rows[16 * WIDTH] = {0}; /* a tile has room for more blocks than a batch holds */
    vf v[16 * GROUPS], w[16 * GROUPS];
    struct scale_fit fit;
    memcpy(rows, b->weight, sizeof b->weight);
    to_lanes(16, rows, w);
    memcpy(rows, b->scale, sizeof b->scale);
    to_lanes(16, rows, v);
    symmetric_search(16, 32, v, w, &fit);
    for (int k = 0; k < b->blocks; k++) {
        int32_t L[16];
        d[k] = fit.scale[k];
        symmetric_codes(16, 32, rows + 16 * k, fit.s[k], L);
        narrow_codes(16, L, u[k]);
    }
}

static void encode_q3_k(struct batch *b, uint8_t *dst) {
    float d[BATCH];
    uint8_t u[BATCH][16] = {{0}};
    if (b->importance) {
        block_sigma2(b, 2, 1.0f / 256);
        search_symmetric(b, 4, BY_STATISTIC);
        symmetric_scales(b, d, u);
    } else {
        search_coordinate(b, 4);
        for (int k = 0; k < b->blocks; k++) {
            const float *scale = b->scale + k * 16, S = extreme(scale, 16), i = -32 / S;
            d[k] = S != 0 ? 1 / i : 0;
            for (int j = 0; S != 0 && j < 16; j++)
                u[k][j] = (uint8_t)(clamp_one((int8_t)(near_one(i * scale[j]) & 255), -32, 31) + 32);
        }
    }
    for (int k = 0; k < b->blocks; k++, dst += 110) {
        const uint16_t half = half_one(d[k]);
        const float stored = half_float(half);
        uint8_t q[256];
        int32_t L[256];
        put_half(dst + 108, half);
        for (int j = 0; j < 16; j++) {
            const float delta = stored * (float)(u[k][j] - 32);
            if (requantize_symmetric(b, k * 16 + j, 4, delta, L + j * 16))
                continue;
            if (b->importance)
                symmetric_codes(16, 4, b->x + k * 256 + j * 16, b->s[k * 16 + j], L + j * 16);
            else
                coordinate_codes(b, k * 16 + j, L + j * 16);
        }
        narrow_codes(256, L, q);
        pack_bit_plane(q, 2, dst);
        pack_two_bits(q, 0, dst + 32);
        pack_scales_16(u[k], dst + 96);
    }
}

static void encode_q6_k(struct batch *b, uint8_t *dst) {
    search_symmetric(b, 32, b->importance ? BY_IMPORTANCE : BY_SQUARE);
    for (int k = 0; k < b->blocks; k++, dst += 210) {
        const float *scale = b->scale + k * 16, S = extreme(scale, 16), i = -128 / S;
        const uint16_t half = half_one(1 / i);
        const float stored = half_float(half);
        uint8_t q[256];
        int32_t L[256];
        if (fabsf(S) < EPSILON) {
            memset(dst, 0, 210);
            continue;
        }
        put_half(dst + 208, half);
        for (int j = 0; j < 16; j++) {
            const int l = near_one(i * scale[j]), s = (int8_t)((l < 127 ? l : 127) & 255);
            dst[192 + j] = (uint8_t)s;
            if (!requantize_symmetric(b, k * 16 + j, 32, stored * (float)s, L + j * 16))
                symmetric_codes(16, 32, b->x + k * 256 + j * 16, b->s[k * 16 + j], L + j * 16);
        }
        narrow_codes(256, L, q);
        pack_nibble_quarters(q, dst);
        pack_two_bits(q, 4, dst + 128);
    }
}

/* --- table formats --- */

/* codes of 32 weights: the index of x / scale (a float32 scale: the rounded field is not used) */
INLINE void table_codes(const float *x, float scale, uint8_t *q) {
    int32_t L[32];
    const vf r = splat(scale != 0 ? 1 / scale : 0);
    for (int i = 0; i < 32; i += LANES)
        store_int(L + i, iq4_index(r * load(x + i)));
    narrow_codes(32, L, q);
}

static void encode_iq4_xs(struct batch *b, uint8_t *dst) {
    if (b->importance)
        block_sigma2(b, 1, 2.0f / 256);
    search_table(b, b->importance ? BY_STATISTIC : BY_SQUARE);
    for (int k = 0; k < b->blocks; k++, dst += 136) {
        const float *scale = b->scale + k * 8, d = -extreme(scale, 8) / 32, i = d != 0 ? 1 / d : 0;
        unsigned high = 0;
        put_half(dst, half_one(d));
        memset(dst + 4, 0, 4);
        for (int j = 0; j < 8; j++) {
            const int l = clamp_one(near_one(i * scale[j]), -32, 31), u = l + 32;
            uint8_t q[32];
            table_codes(b->x + k * 256 + j * 32, d * (float)l, q);
            pack_nibbles(q, dst + 8 + 16 * j);
            dst[4 + j / 2] |= (uint8_t)((u & 15) << (j % 2 * 4));
            high |= (unsigned)(u >> 4) << 2 * j;
        }
        put_half(dst + 2, (uint16_t)high);
    }
}

#endif
