/* Vectors of LANES floats or integers, one block or sub-block in each lane, and the few operations the searches need.
 *
 * Only compiler vector types: GCC and Clang choose the instructions of the level being compiled. LANES 1 is plain C.
 * A mask is an integer vector of 0 (false) and -1 (true). */
#ifndef QUANT_LANES_H
#define QUANT_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* GCC and MSVC take it from the command line */
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline, unused))
#define NOINLINE static __attribute__((noinline, unused))
#define UNROLL _Pragma("GCC unroll 16")
#else
#define INLINE static __forceinline
#define NOINLINE static
#define UNROLL
#endif

/* GROUPS vectors are worked on side by side: the sums of one lane are sequential, so a single vector would wait for the
 * latency of each addition. */
#define WIDTH (LANES * GROUPS)
#define EACH_GROUP UNROLL for (int g = 0; g < GROUPS; g++)
#define EACH_LANE UNROLL for (int k = 0; k < LANES; k++)

#if LANES > 1
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef int32_t v8 __attribute__((vector_size(32)));
typedef int32_t v4 __attribute__((vector_size(16)));
#define LANE(v, k) ((v)[k])
#define LESS(a, b) ((a) < (b))
#define GREATER(a, b) ((a) > (b))
#define EQUAL(a, b) ((a) == (b))
#else
typedef float vf;
typedef int32_t vi;
#define LANE(v, k) (v)
#define LESS(a, b) (-((a) < (b)))
#define GREATER(a, b) (-((a) > (b)))
#define EQUAL(a, b) (-((a) == (b)))
#endif

INLINE int32_t float_bits(float f) {
    int32_t i;
    memcpy(&i, &f, sizeof i);
    return i;
}
INLINE float bits_float(uint32_t i) {
    float f;
    memcpy(&f, &i, sizeof f);
    return f;
}

INLINE vf splat(float f) {
#if LANES > 1
    return f - (vf){0};
#else
    return f;
#endif
}
/* The same, of a value the compiler cannot see: GCC makes one instruction of larger() and smaller() only between variables. */
INLINE vf splat_limit(float f) {
    volatile float hidden = f;
    return splat(hidden);
}
INLINE vi splat_int(int32_t i) {
#if LANES > 1
    return i + (vi){0};
#else
    return i;
#endif
}
INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE void store_int(int32_t *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE vi bits(vf v) {
#if LANES > 1
    return (vi)v;
#else
    return float_bits(v);
#endif
}
INLINE vf from_bits(vi i) {
#if LANES > 1
    return (vf)i;
#else
    return bits_float((uint32_t)i);
#endif
}
INLINE vf to_float(vi i) {
#if LANES > 1
    return __builtin_convertvector(i, vf);
#else
    return (float)i;
#endif
}
/* v behind an empty instruction. GCC makes one vector instruction of a loop over lanes, but of two in a row, seen together,
 * instructions for every lane. */
INLINE vf settled(vf v) {
    vi i = bits(v);
#if LANES >= 8
    __asm__("" : "+v"(i));
#endif
    return from_bits(i);
}
INLINE vf root(vf a) {
    vf r = a;
    EACH_LANE LANE(r, k) = sqrtf(LANE(a, k));
    return r;
}
INLINE vi select_int(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }
INLINE vf select(vi mask, vf a, vf b) { return from_bits(select_int(mask, bits(a), bits(b))); }
/* a > b ? a : b and a < b ? a : b, in this order: b when either is NaN. GCC 12 and Clang make one instruction of the loop over
 * lanes; older GCC would take the lanes apart, and gets a comparison and a selection. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12 && LANES > 1
INLINE vf larger(vf a, vf b) { return select(GREATER(a, b), a, b); }
INLINE vf smaller(vf a, vf b) { return select(LESS(a, b), a, b); }
INLINE vi larger_int(vi a, vi b) { return select_int(GREATER(a, b), a, b); }
INLINE vi smaller_int(vi a, vi b) { return select_int(LESS(a, b), a, b); }
#else
#define EITHER(type, a, compare, b) \
    type r = a; \
    EACH_LANE LANE(r, k) = LANE(a, k) compare LANE(b, k) ? LANE(a, k) : LANE(b, k); \
    return r
INLINE vf larger(vf a, vf b) { EITHER(vf, a, >, b); }
INLINE vf smaller(vf a, vf b) { EITHER(vf, a, <, b); }
INLINE vi larger_int(vi a, vi b) { EITHER(vi, a, >, b); }
INLINE vi smaller_int(vi a, vi b) { EITHER(vi, a, <, b); }
#endif
INLINE vf magnitude(vf v) { return from_bits(bits(v) & 0x7FFFFFFF); }
INLINE int any(vi mask) {
#if LANES == 16 /* halving by hand: left to itself the compiler takes the lanes out one by one */
    v8 half[2];
    memcpy(half, &mask, sizeof half);
    half[0] |= half[1];
#elif LANES == 8
    v8 half[1] = {mask};
#endif
#if LANES >= 8
    v4 quarter[2];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] |= quarter[1];
#elif LANES == 4
    v4 quarter[1] = {mask};
#endif
#if LANES >= 4
    uint64_t r[2];
    memcpy(r, quarter, sizeof r);
    return (r[0] | r[1]) != 0;
#else
    return mask != 0;
#endif
}

/* One value */

/* --- rounding: ggml's nearest_int, NEAR in the specification --- */

#define MAGIC 12582912.0f /* 1.5 * 2^23: adding it leaves the integer in the low mantissa bits */

/* As defined: the bits after the addition, also out of range; NaN counts as 0, whatever its payload. */
INLINE vi near_bits(vf v) { return ((bits(v + splat(MAGIC)) & 0x7FFFFF) - 0x400000) & EQUAL(v, v); }
/* The same as a float, for |v| < 2^22 only; a negative v that rounds to 0 may keep its sign. */
INLINE vf near_small(vf v) {
#if LANES >= 8 /* AVX2 and AVX-512 round in one instruction */
    vf r = settled(v);
    EACH_LANE LANE(r, k) = nearbyintf(LANE(r, k));
    return r;
#else
    return (v + splat(MAGIC)) - splat(MAGIC);
#endif
}
/* Bounds 0 and top > 0 for a v that is no NaN. Where integer units would idle, by the bits: they compare as the floats do,
 * but for negative ones among themselves. */
#if LANES >= 8
INLINE vf floor_zero(vf v, vf zero) { return from_bits(larger_int(bits(v), bits(zero))); }
INLINE vf cap(vf v, vf top) { return from_bits(smaller_int(bits(v), bits(top))); }
#else
INLINE vf floor_zero(vf v, vf zero) { return larger(v, zero); }
INLINE vf cap(vf v, vf top) { return smaller(v, top); }
#endif
INLINE vi clamp_int(vi i, int lo, int hi) { return smaller_int(larger_int(i, splat_int(lo)), splat_int(hi)); }

/* One value */
INLINE int32_t near_one(float f) { return f == f ? (float_bits(f + MAGIC) & 0x7FFFFF) - 0x400000 : 0; }
INLINE int clamp_one(int i, int lo, int hi) { return i < lo ? lo : i > hi ? hi : i; }

#endif
