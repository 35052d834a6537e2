/* Blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL. */
#ifndef QUANT_ENCODE_32_H
#define QUANT_ENCODE_32_H

#include "encode_k.h"

/* TRUNC of the specification, as far as its low 8 bits go: toward zero; NaN and what is outside int32 give 0 there
 * (x86 gives INT_MIN). */
INLINE vi truncate_low(vf v) {
    const vf inside = from_bits(bits(v) & LESS(magnitude(v), splat(2147483648.0f)));
#if LANES > 1
    return __builtin_convertvector(inside, vi);
#else
    return (int32_t)inside;
#endif
}
INLINE vi signed_byte(vi i) { return ((i & 255) ^ 128) - 128; }

/* 1 / d, or 0 for a zero d */
INLINE vf inverse(vf d) { return select(EQUAL(d, splat(0)), splat(0), splat(1) / d); }

/* Statistics of LANES blocks, one in a lane, then codes along the row: fields d (and m) as F16 bits, r and lo for the codes.
 * A single vector, not GROUPS of them: these formats wait for memory, and the tile should leave the first cache to it. */
struct direct {
    int32_t d[LANES], m[LANES];
    float r[LANES], lo[LANES];
};

/* The value of largest magnitude where v and -v both have it: the first of them */
NOINLINE vf first_extreme(const vf *x) {
    vf a = splat(0), m = splat(0);
    for (int i = 0; i < 32; i++) {
        const vf size = magnitude(x[i]);
        m = select(GREATER(size, a), x[i], m);
        a = larger(size, a);
    }
    return m;
}
/* d = m / -N from the value of largest magnitude (Q4_0, Q5_0) */
INLINE void direct_symmetric(const vf *x, int N, struct direct *out) {
    vf lo = splat(0), hi = splat(0);
    for (int i = 0; i < 32; i++) {
        lo = smaller(x[i], lo);
        hi = larger(x[i], hi);
    }
    vf m = select(GREATER(hi, -lo), hi, lo);
    if (any(EQUAL(hi, -lo) & GREATER(hi, splat(0))))
        m = first_extreme(x);
    const vf d = m / splat((float)-N);
    store_int(out->d, half_bits(d));
    store(out->r, inverse(d));
}
/* d = (hi - lo) / N, m = lo (Q4_1, Q5_1) */
INLINE void direct_affine(const vf *x, int N, struct direct *out) {
    vf lo = splat(3.402823466e+38f), hi = splat(-3.402823466e+38f);
    for (int i = 0; i < 32; i++) {
        lo = smaller(x[i], lo);
        hi = larger(x[i], hi);
    }
    const vf d = (hi - lo) / splat((float)N);
    store_int(out->d, half_bits(d));
    store_int(out->m, half_bits(lo));
    store(out->r, inverse(d));
    store(out->lo, lo);
}
/* d = amax / 127 (Q8_0); the operand order decides what a NaN does */
INLINE void direct_q8(const vf *x, struct direct *out) {
    vf a = splat(0);
    for (int i = 0; i < 32; i++)
        a = larger(a, magnitude(x[i]));
    const vf d = a / splat(127);
    store_int(out->d, half_bits(d));
    store(out->r, inverse(d));
}

INLINE vi q8_code(vf v) { /* halves away from zero */
    const vf size = magnitude(v);
    const vi whole = truncate_low(size);
    const vi rounded = whole - (LESS(size, splat(8388608.0f)) & ~LESS(size - to_float(whole), splat(0.5f)));
    const vi negative = GREATER(splat(0), v);
    return (rounded ^ negative) - negative;
}

/* Codes of one block, not yet reduced to 8 bits */
INLINE void direct_codes(int format, const float *x, float r, float lo, int32_t *L) {
    const vf factor = splat(r);
    for (int i = 0; i < 32; i += LANES) {
        const vf v = load(x + i);
        vi l;
        if (format == QUANT_Q8_0)
            l = q8_code(v * factor);
        else if (format == QUANT_Q4_1)
            l = smaller_int(signed_byte(truncate_low((v - splat(lo)) * factor + splat(0.5f))), splat_int(15));
        else if (format == QUANT_Q5_1)
            l = truncate_low((v - splat(lo)) * factor + splat(0.5f));
        else if (format == QUANT_Q4_0)
            l = smaller_int(signed_byte(truncate_low(v * factor + splat(8.5f))), splat_int(15));
        else
            l = smaller_int(signed_byte(truncate_low(v * factor + splat(16.5f))), splat_int(31));
        store_int(L + i, l);
    }
}

/* Fields and codes of up to LANES blocks; `format` is a constant in each call, so each gets its own loop */
INLINE void direct_tile(int format, int blocks, const float *rows, const vf *x, struct direct *f, int32_t *L) {
    if (format == QUANT_Q8_0)
        direct_q8(x, f);
    else if (format == QUANT_Q4_0 || format == QUANT_Q5_0)
        direct_symmetric(x, format == QUANT_Q4_0 ? 8 : 16, f);
    else
        direct_affine(x, format == QUANT_Q4_1 ? 15 : 31, f);
    for (int k = 0; k < blocks; k++)
        direct_codes(format, rows + 32 * k, f->r[k], f->lo[k], L + 32 * k);
}

INLINE int has_fifth_bit(int format) { return format == QUANT_Q5_0 || format == QUANT_Q5_1; }
INLINE int has_offset(int format) { return format == QUANT_Q4_1 || format == QUANT_Q5_1; }

/* Blocks from their fields d (and m) as F16 bits and their codes, not yet reduced to 8 bits. Returns the end. */
static uint8_t *put_blocks(int format, int blocks, const int32_t *d, const int32_t *m, const int32_t *L, uint8_t *dst) {
    uint8_t codes[32 * WIDTH];
    narrow_codes(32 * blocks, L, codes);
    for (int k = 0; k < blocks; k++) {
        put_half(dst, (uint16_t)d[k]);
        dst += 2;
        if (has_offset(format)) {
            put_half(dst, (uint16_t)m[k]);
            dst += 2;
        }
        if (format == QUANT_Q8_0) {
            memcpy(dst, codes + 32 * k, 32);
            dst += 32;
        } else {
            dst = pack_32(has_fifth_bit(format), codes + 32 * k, dst);
        }
    }
    return dst;
}

static void encode_direct(struct batch *b, int format, uint8_t *dst) {
    vf x[32];
    struct direct fields = {{0}, {0}, {0}, {0}};
    int32_t L[32 * LANES];
    for (int first = 0; first < b->blocks; first += LANES) {
        const int blocks = b->blocks - first < LANES ? b->blocks - first : LANES;
        const float *rows = b->x + first * 32;
        for (int i = 0; i < 32; i += LANES)
            transpose_square(rows + i, 32, x + i, 1);
        switch (format) {
        case QUANT_Q4_0: direct_tile(QUANT_Q4_0, blocks, rows, x, &fields, L); break;
        case QUANT_Q4_1: direct_tile(QUANT_Q4_1, blocks, rows, x, &fields, L); break;
        case QUANT_Q5_0: direct_tile(QUANT_Q5_0, blocks, rows, x, &fields, L); break;
        case QUANT_Q5_1: direct_tile(QUANT_Q5_1, blocks, rows, x, &fields, L); break;
        default: direct_tile(QUANT_Q8_0, blocks, rows, x, &fields, L);
        }
        dst = put_blocks(format, blocks, fields.d, fields.m, L, dst);
    }
}

/* Q4_0, Q5_0, Q4_1, Q5_1 with importance: codes and float32 scale of the search as they are */
static void encode_searched(struct batch *b, int format, uint8_t *dst) {
    static const struct affine search[2] = {{32, 15, -0.9f, 0.05f, 36, 0, 1}, {32, 31, -0.9f, 0.05f, 36, 0, 1}};
    const int N = has_fifth_bit(format) ? 16 : 8;
    int32_t d[WIDTH], m[WIDTH], L[32 * WIDTH];
    if (has_offset(format))
        search_affine(b, &search[has_fifth_bit(format)], BY_STATISTIC);
    else
        search_symmetric(b, N, BY_STATISTIC);
    for (int first = 0; first < b->blocks; first += WIDTH) {
        const int blocks = b->blocks - first < WIDTH ? b->blocks - first : WIDTH;
        for (int k = 0; k < WIDTH; k += LANES) {
            store_int(d + k, half_bits(load(b->scale + first + k)));
            store_int(m + k, half_bits(-load(b->offset + first + k)));
        }
        for (int k = 0; k < blocks; k++) {
            if (has_offset(format))
                affine_codes(b, first + k, 2 * N - 1, L + 32 * k);
            else
                symmetric_codes(32, N, b->x + 32 * (first + k), b->s[first + k], L + 32 * k);
        }
        dst = put_blocks(format, blocks, d, m, L, dst);
    }
}

static void encode_iq4_nl(struct batch *b, uint8_t *dst) {
    if (b->importance)
        block_sigma2(b, 1, 2.0f / 32);
    search_table(b, b->importance ? BY_STATISTIC : BY_SQUARE);
    for (int k = 0; k < b->blocks; k++, dst += 18) {
        uint8_t q[32];
        put_half(dst, half_one(b->scale[k]));
        table_codes(b->x + k * 32, b->scale[k], q);
        pack_nibbles(q, dst + 2);
    }
}

#endif
