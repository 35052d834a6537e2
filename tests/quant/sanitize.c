/* Every format, level and source type on awkward input, for a build with -fsanitize=address,undefined: exact-size buffers, odd
 * addresses, strides of both signs, 0 and few blocks, NaN, infinities, denormals, huge and zero importances. Decodes random bytes.
 * Prints nothing but a count; the sanitizers do the talking. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static uint64_t state = 88172645463325252u;
static uint32_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static const uint32_t special[] = {0,          0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F800001,
                                   0x00000001, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x4F000000, 0xCF000000, 0x4B7FFFFF, 0x3F800000};

/* flavour 0: ordinary, 1: any bits, 2: ordinary with specials, 3: zeros with specials, 4: specials, 5: huge or tiny */
static uint32_t value(int flavour) {
    float f = (float)(int32_t)next() * 1e-11f;
    uint32_t u;
    if (flavour == 1)
        return next();
    if (flavour == 4 || (flavour >= 2 && flavour <= 3 && next() % 50 == 0))
        return special[next() % 16];
    if (flavour == 3)
        return 0;
    if (flavour == 5)
        f = f * 100 * (next() % 2 ? 3e38f : 1e-40f);
    memcpy(&u, &f, 4);
    return u;
}

static void fill(uint8_t *p, int64_t n, int bytes, int flavour) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = value(flavour);
        const uint16_t h = (uint16_t)(flavour == 1 ? u : bytes == 2 ? u >> 16 : 0);
        memcpy(p + i * bytes, bytes == 2 ? (const void *)&h : (const void *)&u, (size_t)bytes);
    }
}

static long calls;

static void one(int level, int format, int type, int64_t rows, int64_t blocks, int odd, int flavour, int importance) {
    const int64_t columns = blocks * quant_block_length(format), size = blocks * quant_block_bytes(format);
    const int bytes = type == QUANT_F32 ? 4 : 2;
    const int64_t pitch = columns * bytes + odd * 3; /* rows are not aligned either */
    uint8_t *src = malloc((size_t)(rows * pitch + odd)), *im = malloc((size_t)(columns * 4 + odd));
    uint8_t *dst = malloc((size_t)(rows * size + odd)), *out = malloc((size_t)(rows * columns * 4 + odd));
    const int backward = next() % 2 && rows > 0;
    const uint8_t *first = src + odd + (backward ? (rows - 1) * pitch : 0);
    for (int64_t r = 0; r < rows; r++)
        fill(src + odd + r * pitch, columns, bytes, flavour);
    fill(im + odd, columns, 4, importance);
    if (quant_first_nonfinite(level, first, type, rows, columns, backward ? -pitch : pitch) >= rows * columns + (rows * columns == 0))
        abort();
    if (quant_encode(level, format, first, type, rows, columns, backward ? -pitch : pitch,
                     importance < 0 ? NULL : (const float *)(const void *)(im + odd), dst + odd) != QUANT_OK)
        abort();
    if (quant_decode(level, format, dst + odd, rows, columns, size, (float *)(void *)(out + odd)) != QUANT_OK)
        abort();
    fill(dst + odd, rows * size / 2, 2, 1);
    if (quant_decode(level, format, dst + odd, rows, columns, size, (float *)(void *)(out + odd)) != QUANT_OK)
        abort();
    calls++;
    free(src);
    free(im);
    free(dst);
    free(out);
}

int main(void) {
    static const int formats[] = {0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23}, types[] = {QUANT_F32, QUANT_F16, QUANT_BF16};
    static const int counts[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33};
    for (int level = 0; level < quant_level_count(); level++)
        for (int f = 0; f < 15 && quant_level_supported(level); f++)
            for (int c = 0; c < 14; c++)
                for (int rows = 0; rows < 4; rows++)
                    for (int flavour = 0; flavour < 6; flavour++)
                        one(level, formats[f], types[next() % 3], rows == 3 ? 17 : rows, counts[c] > 9 && rows == 3 ? 1 : counts[c],
                            (int)(next() % 4), flavour, (int)(next() % 7) - 1);
    if (quant_encode(0, 99, NULL, 0, 1, 32, 0, NULL, NULL) != QUANT_BAD_FORMAT || quant_encode(99, 2, NULL, 0, 1, 32, 0, NULL, NULL) != QUANT_BAD_LEVEL ||
        quant_encode(0, 2, NULL, 7, 1, 32, 0, NULL, NULL) != QUANT_BAD_TYPE || quant_encode(0, 2, NULL, 0, 1, 33, 0, NULL, NULL) != QUANT_BAD_SHAPE ||
        quant_encode(0, 2, NULL, 0, -1, 32, 0, NULL, NULL) != QUANT_BAD_SHAPE || quant_level_name(-1) || quant_level_name(99) ||
        quant_first_nonfinite(0, NULL, 7, 1, 32, 0) != QUANT_BAD_TYPE - 1)
        return 1;
    printf("%ld calls\n", calls);
    return 0;
}
