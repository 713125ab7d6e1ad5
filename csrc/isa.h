// Which instruction set's kernels run.
#pragma once

#include "kernels.h"

namespace adq {

const Kernels& kernels();  // the chosen ones

}  // namespace adq
