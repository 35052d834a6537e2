/* A batch: some consecutive blocks, widened to floats, and what the searches find out about their sub-blocks. */
#ifndef QUANT_BATCH_H
#define QUANT_BATCH_H

#include "floats.h"
#include "kernels.h"
#include "search_scales.h"
#include "tile.h"

/* As many blocks of 256 as there are lanes: the second-level searches (POS, SYM over scales) have one block in a lane.
 * Formats with 32 weights a block take eight times as many blocks. */
#define BATCH LANES
#define BATCH_WEIGHTS (256 * BATCH)
#define SUBS (16 * BATCH) /* sub-blocks, at most */
#if BATCH_WEIGHTS % (SUB_MAX * WIDTH)
#error "a batch must be whole tiles: GROUPS may be 1, 2, 4 or 8"
#endif

struct batch {
    int n;          /* weights in a sub-block */
    int block;      /* weights in a block */
    int blocks;     /* blocks in use */
    int subs;       /* sub-blocks in use */
    int importance; /* given */
    int searched;   /* or encoded directly */
    const float *x; /* of `own`, or where the caller has them */
    float own[BATCH_WEIGHTS];
    vf im[BATCH_WEIGHTS / LANES]; /* lane-major, of `im_count` weights from column `im_column` on */
    int64_t im_column;
    int im_count;
    float sigma2[SUBS]; /* one for each sub-block, the same within a block */
    float scale[SUBS], offset[SUBS], weight[SUBS];
    float s[SUBS], shift[SUBS]; /* the rule for the codes, see search.h */
    int32_t guarded[SUBS];
    vf codes[BATCH_WEIGHTS / LANES]; /* of the coordinate search, lane-major */
};

/* Where the next block is taken from */
struct cursor {
    const struct quant_source *src;
    int64_t row, column;
};

static int64_t item_bytes(int type) { return type == QUANT_F32 ? 4 : 2; }

static const uint8_t *place(const struct quant_source *src, int64_t row, int64_t column) {
    return src->base + row * src->row_stride + column * item_bytes(src->type);
}

/* Are the n weights from there on aligned floats, one after the other? */
static int in_place(const struct quant_source *src, const struct cursor *at, int64_t n) {
    return src->type == QUANT_F32 && (uintptr_t)place(src, at->row, at->column) % sizeof(float) == 0 &&
           (src->row_stride == src->columns * (int64_t)sizeof(float) || src->columns - at->column >= n);
}

static void widen_run(const struct quant_source *src, int64_t row, int64_t column, int64_t n, float *dst) {
    const uint8_t *p = place(src, row, column);
    if (src->type == QUANT_F32)
        memcpy(dst, p, sizeof(float) * (size_t)n);
    else
        widen(src->type == QUANT_F16, p, n, dst);
}

/* The importance of the n weights from a column on, going round the row; the same for all rows, so often there already */
static void fill_importance(struct batch *b, const struct quant_source *src, int64_t column, int n) {
    const int tile = WIDTH * b->n;
    float rows[SUB_MAX * WIDTH];
    if (b->im_column == column && b->im_count >= n)
        return;
    b->im_column = column;
    b->im_count = n;
    for (int t = 0; t * tile < n; t++) {
        for (int filled = 0; filled < tile;) { /* the last tile is filled up, for lanes that nobody looks at */
            int64_t run = src->columns - column;
            if (run > tile - filled)
                run = tile - filled;
            memcpy(rows + filled, src->importance + column, sizeof(float) * (size_t)run);
            filled += (int)run;
            column = (column + run) % src->columns;
        }
        to_lanes(b->n, rows, b->im + t * b->n * GROUPS);
    }
}

/* Fill the batch with up to `blocks` blocks, moving the cursor; the rest up to a whole tile is zeros. row_sigma2: of rows
 * row0, row0 + 1, ... for the formats whose statistic is that of the row, or NULL. */
static void fill_batch(struct batch *b, struct cursor *at, int64_t blocks, const float *row_sigma2, int64_t row0) {
    const struct quant_source *src = at->src;
    const int tile = WIDTH * b->n;
    int filled = 0, wanted, padded, copied;
    if (blocks > BATCH_WEIGHTS / b->block)
        blocks = BATCH_WEIGHTS / b->block;
    b->blocks = (int)blocks;
    wanted = b->blocks * b->block;
    b->subs = wanted / b->n;
    /* what is to be padded must be ours; and for a search copying pays as prefetching */
    copied = b->searched || wanted < BATCH_WEIGHTS || !in_place(src, at, wanted);
    b->x = copied ? b->own : (const float *)(const void *)place(src, at->row, at->column);
    if (b->importance)
        fill_importance(b, src, at->column, wanted);
    while (filled < wanted) {
        int64_t run = src->columns - at->column;
        if (run > wanted - filled)
            run = wanted - filled;
        if (copied)
            widen_run(src, at->row, at->column, run, b->own + filled);
        if (row_sigma2)
            for (int64_t j = filled / b->n; j < (filled + run) / b->n; j++)
                b->sigma2[j] = row_sigma2[at->row - row0];
        filled += (int)run;
        at->column += run;
        if (at->column == src->columns) {
            at->column = 0;
            at->row++;
        }
    }
    padded = (wanted + tile - 1) / tile * tile;
    if (padded < LANES * b->block)
        padded = LANES * b->block; /* block statistics take LANES blocks at a time */
    if (padded > BATCH_WEIGHTS)
        padded = BATCH_WEIGHTS;
    memset(b->own + wanted, 0, sizeof(float) * (size_t)(padded - wanted));
    for (int j = b->subs; j < padded / b->n; j++)
        b->sigma2[j] = 0;
}

/* Sequential sums of x * x over LANES rows, `stride` floats apart, of n weights each, going on from `sum`. */
static vf add_squares(const float *rows, int64_t stride, int n, vf sum) {
    vf x[LANES];
    for (int i = 0; i < n; i += LANES) {
        transpose_square(rows + i, stride, x, 1);
        EACH_LANE sum += x[k] * x[k];
    }
    return sum;
}

/* sigma2 of each block, (times * sum) * over, spread over its sub-blocks */
static void block_sigma2(struct batch *b, float times, float over) {
    const int each = b->block / b->n;
    for (int j = 0; j < b->blocks; j += LANES) {
        float sum[LANES];
        store(sum, splat(times) * add_squares(b->x + j * b->block, b->block, b->block, splat(0)) * splat(over));
        for (int k = 0; k < LANES; k++)
            for (int i = 0; i < each; i++)
                b->sigma2[(j + k) * each + i] = sum[k];
    }
}

/* sigma2 of LANES rows from row0 on (those past the end repeat the last): sum over the row / columns */
static void row_sigma2(const struct quant_source *src, int64_t row0, float *out) {
    float chunk[LANES * 256];
    const struct cursor first = {src, row0, 0};
    const int direct = in_place(src, &first, src->columns) && src->row_stride % (int64_t)sizeof(float) == 0 &&
                       src->rows - row0 >= LANES;
    vf sum = splat(0);
    for (int64_t c = 0; c < src->columns; c += 256) {
        const int n = src->columns - c < 256 ? (int)(src->columns - c) : 256;
        for (int k = 0; k < LANES && !direct; k++)
            widen_run(src, row0 + k < src->rows ? row0 + k : src->rows - 1, c, n, chunk + k * 256);
        if (direct)
            sum = add_squares((const float *)(const void *)place(src, row0, c), src->row_stride / (int64_t)sizeof(float), n, sum);
        else
            sum = add_squares(chunk, 256, n, sum);
    }
    store(out, sum / splat((float)src->columns));
}

/* --- weights of the searches --- */

enum weighing { BY_MAGNITUDE, BY_SQUARE, BY_RMS, BY_IMPORTANCE, BY_STATISTIC };

/* Weights of tile number `tile` with values x; sums over each sub-block to b->weight where importance is given. */
static void weigh(struct batch *b, int tile, enum weighing kind, const vf *x, vf *w) {
    const int n = b->n;
    if (kind == BY_MAGNITUDE) {
        for (int i = 0; i < n * GROUPS; i++)
            w[i] = magnitude(x[i]);
    } else if (kind == BY_SQUARE) {
        for (int i = 0; i < n * GROUPS; i++)
            w[i] = x[i] * x[i];
    } else if (kind == BY_RMS) {
        vf sum[GROUPS];
        EACH_GROUP sum[g] = splat(0);
        for (int i = 0; i < n; i++)
            EACH_GROUP sum[g] += x[i * GROUPS + g] * x[i * GROUPS + g];
        EACH_GROUP sum[g] = root(sum[g] / splat((float)n));
        for (int i = 0; i < n; i++)
            EACH_GROUP w[i * GROUPS + g] = sum[g] + magnitude(x[i * GROUPS + g]);
    } else {
        const vf *im = b->im + tile * n * GROUPS;
        for (int i = 0; i < n; i++)
            EACH_GROUP {
                const vf xi = x[i * GROUPS + g];
                w[i * GROUPS + g] = im[i * GROUPS + g];
                if (kind == BY_STATISTIC)
                    w[i * GROUPS + g] *= root(load(b->sigma2 + tile * WIDTH + g * LANES) + xi * xi);
            }
    }
    if (b->importance)
        EACH_GROUP {
            vf sum = splat(0);
            for (int i = 0; i < n; i++)
                sum += w[i * GROUPS + g];
            store(b->weight + tile * WIDTH + g * LANES, sum);
        }
}

/* --- the searches over all tiles of a batch --- */

static void search_affine(struct batch *b, const struct affine *p, enum weighing kind) {
    vf x[SUB_MAX * GROUPS], w[SUB_MAX * GROUPS];
    for (int t = 0; t * WIDTH < b->subs; t++) {
        struct affine_fit fit;
        to_lanes(b->n, b->x + t * WIDTH * b->n, x);
        weigh(b, t, kind, x, w);
        affine_search(p, x, w, &fit);
        memcpy(b->scale + t * WIDTH, fit.scale, sizeof fit.scale);
        memcpy(b->offset + t * WIDTH, fit.offset, sizeof fit.offset);
        memcpy(b->s + t * WIDTH, fit.s, sizeof fit.s);
        memcpy(b->shift + t * WIDTH, fit.shift, sizeof fit.shift);
        memcpy(b->guarded + t * WIDTH, fit.guarded, sizeof fit.guarded);
    }
}

static void search_symmetric(struct batch *b, int N, enum weighing kind) {
    vf x[SUB_MAX * GROUPS], w[SUB_MAX * GROUPS];
    for (int t = 0; t * WIDTH < b->subs; t++) {
        struct scale_fit fit;
        to_lanes(b->n, b->x + t * WIDTH * b->n, x);
        weigh(b, t, kind, x, w);
        symmetric_search(b->n, N, x, w, &fit);
        memcpy(b->scale + t * WIDTH, fit.scale, sizeof fit.scale);
        memcpy(b->s + t * WIDTH, fit.s, sizeof fit.s);
    }
}

/* The codes of a sub-block, WIDTH floats apart */
static float *code_column(struct batch *b, int sub) {
    return (float *)(b->codes + sub / WIDTH * b->n * GROUPS) + sub % WIDTH;
}

/* One sweep over all, the others only over the sub-blocks that it changed (a quarter), taken together: a sub-block left as it
 * was stays so. */
static void search_coordinate(struct batch *b, int N) {
    vf x[SUB_MAX * GROUPS], codes[SUB_MAX * GROUPS];
    float rows[SUB_MAX * WIDTH], scale[WIDTH];
    int32_t changed[WIDTH];
    int again[SUBS], count = 0;
    for (int t = 0; t * WIDTH < b->subs; t++) {
        to_lanes(b->n, b->x + t * WIDTH * b->n, x);
        coordinate_search(b->n, N, 1, x, b->scale + t * WIDTH, b->codes + t * b->n * GROUPS, changed);
        for (int k = 0; k < WIDTH; k++)
            if (changed[k])
                again[count++] = t * WIDTH + k;
    }
    memset(rows, 0, sizeof rows);
    for (int at = 0; at < count; at += WIDTH) {
        const int here = count - at < WIDTH ? count - at : WIDTH;
        for (int k = 0; k < here; k++)
            memcpy(rows + k * b->n, b->x + again[at + k] * b->n, sizeof(float) * (size_t)b->n);
        to_lanes(b->n, rows, x);
        coordinate_search(b->n, N, 5, x, scale, codes, changed);
        for (int k = 0; k < here; k++) {
            float *to = code_column(b, again[at + k]);
            const float *from = (const float *)codes + k;
            b->scale[again[at + k]] = scale[k];
            for (int i = 0; i < b->n; i++)
                to[i * WIDTH] = from[i * WIDTH];
        }
    }
}

static void search_table(struct batch *b, enum weighing kind) {
    vf x[SUB_MAX * GROUPS], w[SUB_MAX * GROUPS];
    for (int t = 0; t * WIDTH < b->subs; t++) {
        to_lanes(b->n, b->x + t * WIDTH * b->n, x);
        weigh(b, t, kind, x, w);
        table_search(x, w, b->scale + t * WIDTH);
    }
}

/* --- codes of sub-block `sub` along the row, from the rule the search kept --- */

/* Codes stay 32-bit until the block is complete: narrowing a whole block is a loop the compiler vectorizes well. Not inlined:
 * seeing where the codes come from, GCC takes vectors apart to feed the packing byte by byte. */
NOINLINE void narrow_codes(int n, const int32_t *L, uint8_t *q) {
    for (int i = 0; i < n; i++)
        q[i] = (uint8_t)L[i];
}

static void affine_codes(const struct batch *b, int sub, int N, int32_t *L) {
    const vf s = splat(b->s[sub]), shift = splat(b->shift[sub]);
    const vf low = splat_limit(b->guarded[sub] ? 0 : -INFINITY), high = splat_limit(b->guarded[sub] ? (float)N : INFINITY);
    for (int i = 0; i < b->n; i += LANES) {
        const vf v = s * (load(b->x + sub * b->n + i) - shift);
        store_int(L + i, clamp_int(near_bits(smaller(larger(v, low), high)), 0, N)); /* a NaN gives 0 either way */
    }
}

static void symmetric_codes(int n, int N, const float *x, float s, int32_t *L) {
    if (s == ALL_ZERO) {
        memset(L, 0, sizeof *L * (size_t)n);
        return;
    }
    for (int i = 0; i < n; i += LANES)
        store_int(L + i, clamp_int(near_bits(splat(s) * load(x + i)), -N, N - 1) + splat_int(N));
}

static void coordinate_codes(struct batch *b, int sub, int32_t *L) {
    const float *column = code_column(b, sub);
    for (int i = 0; i < b->n; i++)
        L[i] = (int32_t)column[i * WIDTH];
}

#endif
