// Operators as torch's dispatcher calls them, without a detour through Python.
//
// A native operator takes the arguments that are common and small: the right dtypes, dense memory, results
// that do not come from the pool. It leaves all others, wrong ones among them, to the operator's Python
// function (adq/backends/cpu.py), which is the whole of it, and has the messages.
#pragma once

#include "torch_abi.h"

namespace adq {

struct NativeOperator {
    const char* name;
    // One letter each: t tensor, o optional tensor, l list of tensors, i int, n list of ints, f float, b
    // bool.
    const char* arguments;
    const char* results;
    // Fills the results, whose handles then belong to the caller; false: not for it, and nothing has been
    // done.
    bool (*run)(const Value* arguments, Value* results);
};

constexpr int kNativeOperators = 8;
constexpr int kMaxResults = 5;
extern const NativeOperator kNative[kNativeOperators];

// The handles among an operator's arguments, deleted at the end of the scope.
class HeldArguments {
 public:
    HeldArguments(const Value* values, const char* letters) : values_(values), letters_(letters) {}
    ~HeldArguments();
    HeldArguments(const HeldArguments&) = delete;
    HeldArguments& operator=(const HeldArguments&) = delete;

 private:
    const Value* values_;
    const char* letters_;
};

}  // namespace adq
