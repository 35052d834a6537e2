/* F16 and BF16 in lanes, and one at a time. */
#ifndef QUANT_FLOATS_H
#define QUANT_FLOATS_H

#include "lanes.h"

/* binary32 -> binary16 bits (in 32): nearest, ties to even, subnormals; any NaN becomes sign | 0x7E00. */
INLINE vi half_bits(vf x) {
    const vi u = bits(x), sign = u & splat_int((int32_t)0x80000000), a = u ^ sign;
    const vf size = from_bits(a);
    /* normal: rebias the exponent (-112), round the 13 bits that go away */
    const vi b = smaller_int(a, splat_int(0x47800000)); /* larger ones are not used, and must not overflow */
    const vi normal = ((b + splat_int(0xFFF) + ((b >> 13) & 1)) >> 13) - splat_int(112 << 10);
    /* subnormal: 0.5 has the last place of a subnormal half, so the addition rounds */
    const vi small = bits(size + splat(0.5f)) - bits(splat(0.5f));
    vi h = select_int(LESS(size, splat(6.103515625e-05f)), small, normal);
    h = select_int(LESS(size, splat(65520.0f)), h, splat_int(0x7C00));
    h = select_int(EQUAL(size, size), h, splat_int(0x7E00));
    return h | ((sign >> 16) & 0x8000);
}
/* binary16 bits -> binary32, exact; NaN becomes quiet */
INLINE vf half_value(vi h) {
    const vi sign = -((h >> 15) & 1) & splat_int((int32_t)0x80000000), a = (h & 0x7FFF) * 8192;
    /* the exponent is 112 too small; the multiplication also makes subnormal halves normal */
    const vi finite = bits(from_bits(a) * splat(5.192296858534828e+33f));
    const vi special = a | splat_int(0x7F800000) | (GREATER(a, splat_int(0x7C00 * 8192)) & 0x00400000);
    return from_bits(select_int(GREATER(a, splat_int(0x7BFF * 8192 + 8191)), special, finite) | sign);
}
INLINE vi bfloat_bits(vf x) {
    const vi u = bits(x), top = (u >> 16) & 0xFFFF;
    const vi a = u & 0x7FFFFFFF, nan = GREATER(a, splat_int(0x7F800000));
    const vi rounded = (((a & ~nan) + splat_int(0x7FFF) + (top & 1)) >> 16) | (top & 0x8000);
    return select_int(nan, top | 0x40, rounded);
}

INLINE uint16_t half_one(float f) { return (uint16_t)LANE(half_bits(splat(f)), 0); }
INLINE float half_float(uint16_t h) { return LANE(half_value(splat_int(h)), 0); }

INLINE void put_half(uint8_t *p, uint16_t h) {
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}
INLINE float get_half(const uint8_t *p) { return half_float((uint16_t)(p[0] | p[1] << 8)); }

/* n values from 16-bit (or 32-bit) memory to floats; the remainder goes through a padded vector */
INLINE void widen_lanes(int type_half, const uint8_t *src, int count, float *dst) {
    uint16_t h[LANES] = {0};
    int32_t wide[LANES];
    float out[LANES];
    memcpy(h, src, 2 * (size_t)count);
    for (int k = 0; k < LANES; k++)
        wide[k] = type_half ? h[k] : (int32_t)((uint32_t)h[k] << 16);
    vi v;
    memcpy(&v, wide, sizeof v);
    store(out, type_half ? half_value(v) : from_bits(v));
    memcpy(dst, out, sizeof(float) * (size_t)count);
}
NOINLINE void widen(int type_half, const uint8_t *src, int64_t n, float *dst) {
    int64_t i = 0;
    if (type_half)
        for (; i + LANES <= n; i += LANES)
            widen_lanes(1, src + 2 * i, LANES, dst + i);
    else
        for (; i + LANES <= n; i += LANES)
            widen_lanes(0, src + 2 * i, LANES, dst + i);
    if (i < n)
        widen_lanes(type_half, src + 2 * i, (int)(n - i), dst + i);
}
INLINE void narrow_lanes(int type_half, const float *src, int count, uint8_t *dst) {
    float in[LANES] = {0};
    int32_t wide[LANES];
    uint16_t h[LANES];
    memcpy(in, src, sizeof(float) * (size_t)count);
    const vf v = load(in);
    store_int(wide, type_half ? half_bits(v) : bfloat_bits(v));
    for (int k = 0; k < LANES; k++)
        h[k] = (uint16_t)wide[k];
    memcpy(dst, h, 2 * (size_t)count);
}
NOINLINE void narrow(int type_half, const float *src, int64_t n, uint8_t *dst) {
    int64_t i = 0;
    if (type_half)
        for (; i + LANES <= n; i += LANES)
            narrow_lanes(1, src + i, LANES, dst + 2 * i);
    else
        for (; i + LANES <= n; i += LANES)
            narrow_lanes(0, src + i, LANES, dst + 2 * i);
    if (i < n)
        narrow_lanes(type_half, src + i, (int)(n - i), dst + 2 * i);
}

/* Is a weight among n of them infinite or NaN: all exponent bits set? Integers only, so the compiler vectorizes the loops. */
#define ANY_NONFINITE(name, type, exponent) \
    NOINLINE int name(const uint8_t *src, int64_t n) { \
        int found = 0; \
        for (int64_t i = 0; i < n; i++) { \
            type u; \
            memcpy(&u, src + i * (int64_t)sizeof u, sizeof u); \
            found |= (u & exponent) == exponent; \
        } \
        return found; \
    }
ANY_NONFINITE(any_nonfinite_f32, uint32_t, 0x7F800000)
ANY_NONFINITE(any_nonfinite_f16, uint16_t, 0x7C00)
ANY_NONFINITE(any_nonfinite_bf16, uint16_t, 0x7F80)

#endif
