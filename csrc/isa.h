// Which instruction set's kernels run.
#pragma once

#include "integer.h"

namespace adq {

// The chosen ones.
const Kernels& kernels();
const IntegerKernels& integer_kernels();

}  // namespace adq
