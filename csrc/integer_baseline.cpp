// The integer convolution with no more than the architecture's own instruction set (SSE2, NEON).
#define ADQ_ISA baseline
#include "integer_impl.h"
