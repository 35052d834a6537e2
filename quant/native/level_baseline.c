/* What every CPU of the target has: SSE2 on x86-64, NEON on Arm; plain C where the compiler has no vector types. */
#if (defined(__GNUC__) || defined(__clang__)) && !defined(QUANT_SCALAR)
#define LANES 4
#define GROUPS 4
#else
#define LANES 1
#define GROUPS 1
#endif
#define LEVEL quant_kernels_baseline
#include "level.h"
