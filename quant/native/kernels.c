/* The C interface: checks, the table of formats, and the choice of the CPU level. */
#include "kernels.h"
#include "levels.h"

#include <stddef.h>

struct format {
    int id, length, bytes;
};
static const struct format formats[] = {
    {QUANT_F32, 1, 4},       {QUANT_F16, 1, 2},       {QUANT_BF16, 1, 2},      {QUANT_Q4_0, 32, 18},   {QUANT_Q4_1, 32, 20},
    {QUANT_Q5_0, 32, 22},    {QUANT_Q5_1, 32, 24},    {QUANT_Q8_0, 32, 34},    {QUANT_Q2_K, 256, 84},  {QUANT_Q3_K, 256, 110},
    {QUANT_Q4_K, 256, 144},  {QUANT_Q5_K, 256, 176},  {QUANT_Q6_K, 256, 210},  {QUANT_IQ4_NL, 32, 18}, {QUANT_IQ4_XS, 256, 136},
};

static const struct format *find(int id) {
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (formats[i].id == id)
            return &formats[i];
    return NULL;
}
int quant_block_length(int format) {
    const struct format *f = find(format);
    return f ? f->length : 0;
}
int quant_block_bytes(int format) {
    const struct format *f = find(format);
    return f ? f->bytes : 0;
}

struct level {
    const char *name;
    const struct quant_kernels *kernels;
};
static const struct level levels[] = {
    {"baseline", &quant_kernels_baseline},
#ifdef QUANT_X86_LEVELS
    {"avx2", &quant_kernels_avx2},
    {"avx512", &quant_kernels_avx512},
#endif
};

int quant_level_count(void) { return (int)(sizeof levels / sizeof *levels); }

const char *quant_level_name(int level) { return level >= 0 && level < quant_level_count() ? levels[level].name : NULL; }

int quant_level_supported(int level) {
#ifdef QUANT_X86_LEVELS
    __builtin_cpu_init();
    if (level == 1)
        return __builtin_cpu_supports("avx2") != 0;
    if (level == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return level == 0;
}

int quant_best_level(void) {
    int level = quant_level_count() - 1;
    while (!quant_level_supported(level))
        level--;
    return level;
}

static int check(int level, int format, int64_t rows, int64_t columns) {
    const struct format *f = find(format);
    if (level < 0 || level >= quant_level_count() || !quant_level_supported(level))
        return QUANT_BAD_LEVEL;
    if (!f)
        return QUANT_BAD_FORMAT;
    if (rows < 0 || columns < 0 || columns % f->length)
        return QUANT_BAD_SHAPE;
    return QUANT_OK;
}

static int is_source(int type) { return type == QUANT_F32 || type == QUANT_F16 || type == QUANT_BF16; }

int quant_encode(int level, int format, const void *src, int src_type, int64_t rows, int64_t columns,
                 int64_t row_stride_bytes, const float *importance, uint8_t *dst) {
    const struct quant_source source = {src, src_type, rows, columns, row_stride_bytes, importance};
    const int status = check(level, format, rows, columns);
    if (status != QUANT_OK)
        return status;
    if (!is_source(src_type))
        return QUANT_BAD_TYPE;
    if (rows > 0 && columns > 0)
        levels[level].kernels->encode(format, &source, dst);
    return QUANT_OK;
}

int quant_decode(int level, int format, const uint8_t *src, int64_t rows, int64_t columns, int64_t row_stride_bytes,
                 float *dst) {
    const int status = check(level, format, rows, columns);
    if (status != QUANT_OK)
        return status;
    for (int64_t row = 0; row < rows && columns > 0; row++) {
        levels[level].kernels->decode(format, src, columns, dst);
        src += row_stride_bytes;
        dst += columns;
    }
    return QUANT_OK;
}

int64_t quant_first_nonfinite(int level, const void *src, int src_type, int64_t rows, int64_t columns, int64_t row_stride_bytes) {
    const uint8_t *base = src;
    const int status = is_source(src_type) ? check(level, src_type, rows, columns) : QUANT_BAD_TYPE;
    if (status != QUANT_OK)
        return status - 1; /* -1 is an answer */
    for (int64_t row = 0; row < rows && columns > 0; row++) {
        const int64_t found = levels[level].kernels->first_nonfinite(src_type, base + row * row_stride_bytes, columns);
        if (found >= 0)
            return row * columns + found;
    }
    return -1;
}
