// The integer convolution in AVX2 and AVX-VNNI; compiled with the flags for it, and run only where the
// processor has it.
#if defined(__x86_64__)
#define ADQ_ISA avx2vnni
#include "integer_impl.h"
#endif
