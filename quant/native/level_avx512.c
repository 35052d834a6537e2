/* AVX-512 F, BW, DQ, VL. This level has fused multiply-add: only -ffp-contract=off keeps the compiler from using it. */
#include "levels.h"
#ifdef QUANT_X86_LEVELS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define LANES 16
#define GROUPS 4
#define LEVEL quant_kernels_avx512
#include "level.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int quant_no_avx512; /* a translation unit must not be empty */
#endif
