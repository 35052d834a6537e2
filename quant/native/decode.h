/* Decoders: one block's bytes to its weights, with ggml's order of float operations. Plain loops. */
#ifndef QUANT_DECODE_H
#define QUANT_DECODE_H

#include <stddef.h>

#include "floats.h"
#include "kernels.h"
#include "pack.h"
#include "search_scales.h"

/* Codes of a block of 32; qh: the fifth bits, or NULL. Not inlined: GCC would take the vectors apart to feed the products. */
NOINLINE void unpack_32(const uint8_t *qs, const uint8_t *qh, uint8_t *q) {
    for (int e = 0; e < 16; e++)
        q[e] = qs[e] & 15;
    for (int e = 0; e < 16; e++)
        q[e + 16] = qs[e] >> 4;
    if (qh) {
        const uint32_t high = (uint32_t)qh[0] | (uint32_t)qh[1] << 8 | (uint32_t)qh[2] << 16 | (uint32_t)qh[3] << 24;
        for (int e = 0; e < 32; e++)
            q[e] |= (uint8_t)((high >> e & 1) << 4);
    }
}

static void decode_32(int format, const uint8_t *in, float *y) {
    const float d = get_half(in);
    uint8_t q[32];
    if (format == QUANT_Q8_0) {
        for (int e = 0; e < 32; e++)
            y[e] = (float)(int8_t)in[2 + e] * d;
    } else if (format == QUANT_Q4_1 || format == QUANT_Q5_1) {
        const float m = d != d ? 0.0f : get_half(in + 2); /* of two NaN ggml keeps the first, compilers keep either */
        unpack_32(format == QUANT_Q5_1 ? in + 8 : in + 4, format == QUANT_Q5_1 ? in + 4 : NULL, q);
        for (int e = 0; e < 32; e++)
            y[e] = (float)q[e] * d + m;
    } else if (format == QUANT_IQ4_NL) {
        unpack_32(in + 2, NULL, q);
        for (int e = 0; e < 32; e++)
            y[e] = d * (float)iq4_values[q[e]];
    } else {
        const int five = format == QUANT_Q5_0, N = five ? 16 : 8;
        unpack_32(five ? in + 6 : in + 2, five ? in + 2 : NULL, q);
        for (int e = 0; e < 32; e++)
            y[e] = (float)(q[e] - N) * d;
    }
}

/* y = scale * q - offset over one sub-block */
INLINE void decode_affine(int n, const uint8_t *q, float scale, float offset, float *y) {
    for (int i = 0; i < n; i++)
        y[i] = scale * (float)q[i] - offset;
}
INLINE void decode_symmetric(int n, const uint8_t *q, int N, float scale, float *y) {
    for (int i = 0; i < n; i++)
        y[i] = scale * (float)(q[i] - N);
}
/* bits 2k, 2k + 1 of byte 32h + l, for weight 128h + 32k + l; added with `shift` */
INLINE void unpack_two_bits(const uint8_t *qs, int shift, uint8_t *q) {
    for (int e = 0; e < 256; e += 32)
        for (int l = 0; l < 32; l++)
            q[e + l] |= (uint8_t)((qs[e / 128 * 32 + l] >> (e % 128 / 32 * 2) & 3) << shift);
}
INLINE void unpack_bit_plane(const uint8_t *plane, int shift, uint8_t *q) {
    for (int e = 0; e < 256; e += 32)
        for (int l = 0; l < 32; l++)
            q[e + l] |= (uint8_t)((plane[l] >> (e / 32) & 1) << shift);
}

static void decode_q2_k(const uint8_t *in, float *y) {
    const float d = get_half(in + 80), dmin = get_half(in + 82);
    uint8_t q[256] = {0};
    unpack_two_bits(in + 16, 0, q);
    for (int j = 0; j < 16; j++)
        decode_affine(16, q + 16 * j, d * (float)(in[j] & 15), dmin * (float)(in[j] >> 4), y + 16 * j);
}

static void decode_q3_k(const uint8_t *in, float *y) {
    const float d = get_half(in + 108);
    uint8_t q[256] = {0}, u[16];
    unpack_bit_plane(in, 2, q);
    unpack_two_bits(in + 32, 0, q);
    unpack_scales_16(in + 96, u);
    for (int j = 0; j < 16; j++)
        decode_symmetric(16, q + 16 * j, 4, d * (float)(u[j] - 32), y + 16 * j);
}

static void decode_q4_q5_k(int bits, const uint8_t *in, float *y) {
    const float d = get_half(in), dmin = get_half(in + 2);
    const uint8_t *qs = bits == 5 ? in + 48 : in + 16;
    uint8_t q[256], s[8], m[8];
    unpack_scales_12(in + 4, s, m);
    for (int h = 0; h < 4; h++)
        for (int l = 0; l < 32; l++) {
            q[64 * h + l] = qs[32 * h + l] & 15;
            q[64 * h + 32 + l] = qs[32 * h + l] >> 4;
        }
    if (bits == 5)
        unpack_bit_plane(in + 16, 4, q);
    for (int j = 0; j < 8; j++)
        decode_affine(32, q + 32 * j, d * (float)s[j], dmin * (float)m[j], y + 32 * j);
}

static void decode_q6_k(const uint8_t *in, float *y) {
    const float d = get_half(in + 208);
    uint8_t q[256];
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 64; l++) {
            q[128 * h + l] = in[64 * h + l] & 15;
            q[128 * h + 64 + l] = in[64 * h + l] >> 4;
        }
    unpack_two_bits(in + 128, 4, q);
    for (int j = 0; j < 16; j++)
        decode_symmetric(16, q + 16 * j, 32, d * (float)(int8_t)in[192 + j], y + 16 * j);
}

static void decode_iq4_xs(const uint8_t *in, float *y) {
    const float d = get_half(in);
    for (int j = 0; j < 8; j++) {
        const int u = (in[4 + j / 2] >> (j % 2 * 4) & 15) | (in[2 + j / 4] >> (j % 4 * 2) & 3) << 4;
        const float scale = d * (float)(u - 32);
        const uint8_t *qs = in + 8 + 16 * j;
        for (int e = 0; e < 16; e++) {
            y[32 * j + e] = scale * (float)iq4_values[qs[e] & 15];
            y[32 * j + 16 + e] = scale * (float)iq4_values[qs[e] >> 4];
        }
    }
}

static void decode_block(int format, const uint8_t *in, float *y) {
    switch (format) {
    case QUANT_Q2_K: decode_q2_k(in, y); break;
    case QUANT_Q3_K: decode_q3_k(in, y); break;
    case QUANT_Q4_K: decode_q4_q5_k(4, in, y); break;
    case QUANT_Q5_K: decode_q4_q5_k(5, in, y); break;
    case QUANT_Q6_K: decode_q6_k(in, y); break;
    case QUANT_IQ4_XS: decode_iq4_xs(in, y); break;
    default: decode_32(format, in, y);
    }
}

#endif
