/* AVX2, without FMA: a fused multiply-add rounds once, ggml's two operations round twice. */
#include "levels.h"
#ifdef QUANT_X86_LEVELS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define LANES 8
#define GROUPS 4
#define LEVEL quant_kernels_avx2
#include "level.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int quant_no_avx2; /* a translation unit must not be empty */
#endif
