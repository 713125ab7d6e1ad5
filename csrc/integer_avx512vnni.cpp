// The integer convolution in AVX-512 and its VNNI; compiled with the flags for it, and run only where the
// processor has it.
#if defined(__x86_64__)
#define ADQ_ISA avx512vnni
#include "integer_impl.h"
#endif
