/* Which CPU levels this build has besides the baseline. QUANT_SCALAR: plain C everywhere (for tests of that path). */
#ifndef QUANT_LEVELS_H
#define QUANT_LEVELS_H
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(QUANT_SCALAR)
#define QUANT_X86_LEVELS 1
#endif
#endif
