// The integer convolution in AVX2; compiled with the flags for it, and run only where the processor has it.
#if defined(__x86_64__)
#define ADQ_ISA avx2
#include "integer_impl.h"
#endif
