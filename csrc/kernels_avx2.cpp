// The kernels in AVX2 and F16C; compiled with the flags for it, and run only where the processor has it.
#if defined(__x86_64__)
#define ADQ_ISA avx2
#include "kernels_impl.h"
#endif
