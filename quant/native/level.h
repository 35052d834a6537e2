/* Everything for one CPU level: included by level_*.c, which set LANES, GROUPS and the name of the table at the end. */
#include "decode.h"
#include "encode_32.h"

static void encode_batch(struct batch *b, int format, uint8_t *dst) {
    switch (format) {
    case QUANT_Q2_K: encode_q2_k(b, dst); break;
    case QUANT_Q3_K: encode_q3_k(b, dst); break;
    case QUANT_Q4_K: encode_q4_q5_k(b, 4, dst); break;
    case QUANT_Q5_K: encode_q4_q5_k(b, 5, dst); break;
    case QUANT_Q6_K: encode_q6_k(b, dst); break;
    case QUANT_IQ4_NL: encode_iq4_nl(b, dst); break;
    case QUANT_IQ4_XS: encode_iq4_xs(b, dst); break;
    default:
        if (b->searched)
            encode_searched(b, format, dst);
        else
            encode_direct(b, format, dst);
    }
}

/* Rows first .. first + rows - 1, batch by batch. sigma2: of these rows, or NULL */
static void encode_rows(struct batch *b, int format, const struct quant_source *src, int64_t first, int64_t rows,
                        const float *sigma2, uint8_t *dst) {
    const int64_t row_blocks = src->columns / b->block;
    struct cursor at = {src, first, 0};
    dst += first * row_blocks * quant_block_bytes(format);
    for (int64_t left = rows * row_blocks; left > 0; left -= b->blocks) {
        fill_batch(b, &at, left, sigma2, first);
        encode_batch(b, format, dst);
        dst += (int64_t)b->blocks * quant_block_bytes(format);
    }
}

/* F32, F16, BF16: one weight is one block */
static void encode_floats(int format, const struct quant_source *src, uint8_t *dst) {
    const int64_t out = item_bytes(format);
    float x[256];
    for (int64_t row = 0; row < src->rows; row++)
        for (int64_t c = 0; c < src->columns; c += 256) {
            const int64_t n = src->columns - c < 256 ? src->columns - c : 256;
            if (format == src->type) /* as it is, NaNs too */
                memcpy(dst, src->base + row * src->row_stride + c * out, (size_t)(n * out));
            else {
                widen_run(src, row, c, n, x);
                if (format == QUANT_F32)
                    memcpy(dst, x, sizeof(float) * (size_t)n);
                else
                    narrow(format == QUANT_F16, x, n, dst);
            }
            dst += n * out;
        }
}

static void encode(int format, const struct quant_source *src, uint8_t *dst) {
    struct batch b;
    if (quant_block_length(format) == 1) {
        encode_floats(format, src, dst);
        return;
    }
    b.block = quant_block_length(format);
    b.n = format == QUANT_Q2_K || format == QUANT_Q3_K || format == QUANT_Q6_K ? 16 : 32;
    b.importance = src->importance != NULL && format != QUANT_Q8_0;
    b.im_column = -1;
    b.im_count = 0;
    b.searched = b.importance || b.block == 256 || format == QUANT_IQ4_NL;
    if (b.importance && b.block == 32 && format != QUANT_IQ4_NL) { /* their statistic is that of the whole row */
        for (int64_t row = 0; row < src->rows; row += LANES) {
            float sigma2[LANES];
            row_sigma2(src, row, sigma2);
            encode_rows(&b, format, src, row, src->rows - row < LANES ? src->rows - row : LANES, sigma2, dst);
        }
    } else {
        encode_rows(&b, format, src, 0, src->rows, NULL, dst);
    }
}

static void decode(int format, const uint8_t *src, int64_t n, float *dst) {
    const int length = quant_block_length(format), bytes = quant_block_bytes(format);
    float y[256];
    if (format == QUANT_F32) {
        memcpy(dst, src, sizeof(float) * (size_t)n);
    } else if (length == 1) {
        widen(format == QUANT_F16, src, n, dst);
    } else {
        for (; n > 0; n -= length, src += bytes, dst += length) {
            decode_block(format, src, y);
            memcpy(dst, y, sizeof(float) * (size_t)length); /* dst may be unaligned */
        }
    }
}

/* In pieces, so that the place is found soon */
static int64_t first_nonfinite(int type, const uint8_t *src, int64_t n) {
    int (*const any)(const uint8_t *, int64_t) =
        type == QUANT_F32 ? any_nonfinite_f32 : type == QUANT_F16 ? any_nonfinite_f16 : any_nonfinite_bf16;
    const int64_t size = item_bytes(type);
    for (int64_t i = 0; i < n; i += 1024) {
        if (!any(src + i * size, n - i < 1024 ? n - i : 1024))
            continue;
        while (!any(src + i * size, 1))
            i++;
        return i;
    }
    return -1;
}

const struct quant_kernels LEVEL = {LANES, encode, decode, first_nonfinite};
