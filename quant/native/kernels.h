/* Encoders and decoders for GGUF block formats: the bytes of llama.cpp / ggml, one CPU level chosen by the caller.
 *
 * Nothing here allocates, locks, keeps state or knows Python. Every function is safe to call from many threads.
 * Pointers may be unaligned. */
#ifndef QUANT_KERNELS_H
#define QUANT_KERNELS_H

#include <stdint.h>

/* ggml's tensor type numbers */
enum quant_format {
    QUANT_F32 = 0,
    QUANT_F16 = 1,
    QUANT_Q4_0 = 2,
    QUANT_Q4_1 = 3,
    QUANT_Q5_0 = 6,
    QUANT_Q5_1 = 7,
    QUANT_Q8_0 = 8,
    QUANT_Q2_K = 10,
    QUANT_Q3_K = 11,
    QUANT_Q4_K = 12,
    QUANT_Q5_K = 13,
    QUANT_Q6_K = 14,
    QUANT_IQ4_NL = 20,
    QUANT_IQ4_XS = 23,
    QUANT_BF16 = 30
};

enum quant_status { QUANT_OK = 0, QUANT_BAD_LEVEL = -1, QUANT_BAD_FORMAT = -2, QUANT_BAD_TYPE = -3, QUANT_BAD_SHAPE = -4 };

/* Encode rows x columns weights. src_type is QUANT_F32, QUANT_F16 or QUANT_BF16; the weights of one row are contiguous, rows
 * are row_stride_bytes apart (any sign). importance: NULL, or one float for each column, shared by all rows. dst receives the
 * blocks of all rows without padding. `columns` must be a multiple of the block length. */
int quant_encode(int level, int format, const void *src, int src_type, int64_t rows, int64_t columns,
                 int64_t row_stride_bytes, const float *importance, uint8_t *dst);

/* Decode rows of columns/block_length blocks, row_stride_bytes apart, to rows x columns contiguous floats. */
int quant_decode(int level, int format, const uint8_t *src, int64_t rows, int64_t columns, int64_t row_stride_bytes,
                 float *dst);

/* Number of the first infinity or NaN, counted along the rows from 0; -1 if there is none; a status less 1
 * if it fails. Arguments as of quant_encode. */
int64_t quant_first_nonfinite(int level, const void *src, int src_type, int64_t rows, int64_t columns, int64_t row_stride_bytes);

/* Levels are numbered 0 (baseline: runs everywhere) to quant_level_count() - 1; a number is usable if supported. */
int quant_level_count(void);
const char *quant_level_name(int level); /* NULL if there is no such level */
int quant_level_supported(int level);    /* by this build and this CPU */
int quant_best_level(void);

int quant_block_length(int format); /* weights in a block, 0 if the format is unknown */
int quant_block_bytes(int format);

/* What one CPU level provides. Encoders with importance need `importance`, others ignore NULL. */
struct quant_source {
    const uint8_t *base;
    int type;
    int64_t rows, columns, row_stride;
    const float *importance;
};
struct quant_kernels {
    int lanes;
    void (*encode)(int format, const struct quant_source *src, uint8_t *dst);
    void (*decode)(int format, const uint8_t *src, int64_t n, float *dst); /* one row of n weights */
    int64_t (*first_nonfinite)(int type, const uint8_t *src, int64_t n);
};
extern const struct quant_kernels quant_kernels_baseline, quant_kernels_avx2, quant_kernels_avx512;

#endif
