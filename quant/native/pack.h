/* Codes of a block (one byte each, in weight order) to the block's bit fields. Plain loops: the compiler vectorizes them. */
#ifndef QUANT_PACK_H
#define QUANT_PACK_H

#include "lanes.h"

/* 32 weights: byte j holds q(j) low and q(j + 16) high */
INLINE void pack_nibbles(const uint8_t *L, uint8_t *qs) {
    for (int j = 0; j < 16; j++)
        qs[j] = (uint8_t)((L[j] & 15) | L[j + 16] << 4);
}
/* bit 4 of q(e) is bit e of the little-endian qh */
INLINE void pack_fifth_bits(const uint8_t *L, uint8_t *qh) {
    for (int j = 0; j < 4; j++) {
        uint64_t v = 0;
        UNROLL for (int k = 0; k < 8; k++) v |= (uint64_t)L[8 * j + k] << 8 * k; /* one load */
        /* bit 8k times 2^(56 - 7k) lands on 56 + k; no two products meet below */
        qh[j] = (uint8_t)((v >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
}
/* The codes of a block of 32: fifth bits (if any), nibbles. Returns the end. */
INLINE uint8_t *pack_32(int five, const uint8_t *L, uint8_t *dst) {
    if (five) {
        pack_fifth_bits(L, dst);
        dst += 4;
    }
    pack_nibbles(L, dst);
    return dst + 16;
}
/* 256 weights, two bits each: Q2_K, Q3_K (low bits), Q6_K (high bits, shift 4) */
INLINE void pack_two_bits(const uint8_t *L, int shift, uint8_t *qs) {
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 32; l++) {
            const uint8_t *q = L + 128 * h + l;
            qs[32 * h + l] = (uint8_t)((q[0] >> shift & 3) | (q[32] >> shift & 3) << 2 | (q[64] >> shift & 3) << 4 |
                                       (q[96] >> shift & 3) << 6);
        }
}
/* 256 weights, bit `bit` of q(e) to bit e / 32 of byte e % 32: Q3_K's hmask, Q5_K's qh */
INLINE void pack_bit_plane(const uint8_t *L, int bit, uint8_t *plane) {
    for (int l = 0; l < 32; l++) {
        int byte = 0;
        UNROLL for (int k = 0; k < 8; k++) byte |= (L[32 * k + l] >> bit & 1) << k;
        plane[l] = (uint8_t)byte;
    }
}
/* 256 weights, low nibbles: q(64h + l) low, q(64h + 32 + l) high (Q4_K, Q5_K) */
INLINE void pack_nibble_pairs(const uint8_t *L, uint8_t *qs) {
    for (int h = 0; h < 4; h++)
        for (int l = 0; l < 32; l++)
            qs[32 * h + l] = (uint8_t)((L[64 * h + l] & 15) | L[64 * h + 32 + l] << 4);
}
/* 256 weights, low nibbles: 64 h + l low, 64 bytes apart high (Q6_K's ql) */
INLINE void pack_nibble_quarters(const uint8_t *L, uint8_t *ql) {
    for (int h = 0; h < 2; h++)
        for (int l = 0; l < 64; l++)
            ql[64 * h + l] = (uint8_t)((L[128 * h + l] & 15) | L[128 * h + 64 + l] << 4);
}

/* Eight scales and eight mins of 6 bits in 12 bytes (Q4_K, Q5_K), as ggml writes them: a scale above 63 spills over. */
INLINE void pack_scales_12(const uint8_t *s, const uint8_t *m, uint8_t *out) {
    for (int j = 0; j < 4; j++) {
        out[j] = s[j];
        out[j + 4] = m[j];
    }
    for (int j = 4; j < 8; j++) {
        out[j + 4] = (uint8_t)((s[j] & 15) | (m[j] & 15) << 4);
        out[j - 4] |= (uint8_t)(s[j] >> 4 << 6);
        out[j] |= (uint8_t)(m[j] >> 4 << 6);
    }
}
INLINE void unpack_scales_12(const uint8_t *in, uint8_t *s, uint8_t *m) {
    for (int j = 0; j < 4; j++) {
        s[j] = in[j] & 63;
        m[j] = in[j + 4] & 63;
    }
    for (int j = 4; j < 8; j++) {
        s[j] = (uint8_t)((in[j + 4] & 15) | in[j - 4] >> 6 << 4);
        m[j] = (uint8_t)(in[j + 4] >> 4 | in[j] >> 6 << 4);
    }
}
/* Sixteen 6-bit numbers in 12 bytes (Q3_K) */
INLINE void pack_scales_16(const uint8_t *u, uint8_t *out) {
    for (int j = 0; j < 8; j++)
        out[j] = (uint8_t)((u[j] & 15) | (u[j + 8] & 15) << 4);
    for (int j = 0; j < 4; j++)
        out[8 + j] = (uint8_t)(u[j] >> 4 | u[j + 4] >> 4 << 2 | u[j + 8] >> 4 << 4 | u[j + 12] >> 4 << 6);
}
INLINE void unpack_scales_16(const uint8_t *in, uint8_t *u) {
    for (int j = 0; j < 16; j++)
        u[j] = (uint8_t)((in[j % 8] >> (j / 8 * 4) & 15) | (in[8 + j % 4] >> (j / 4 * 2) & 3) << 4);
}

#endif
