// Run-time choice of the instruction set: the best that was compiled and that the processor has.
#include "isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace adq {
namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
    const IntegerKernels* integer;
};

#if defined(ADQ_HAVE_AVX2) && defined(__x86_64__)
bool has_avx2() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
    return f16c && __builtin_cpu_supports("avx2");
}
#endif

#if defined(ADQ_HAVE_AVX512) && defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(ADQ_HAVE_AVX2VNNI) && defined(__x86_64__)
bool has_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned kAvxVnni = 1 << 4;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
}
#endif

// Best first. Those with VNNI differ from the ones without it in the integer kernels alone.
std::vector<Isa> find_isas() {
    std::vector<Isa> found;
#if defined(ADQ_HAVE_AVX512VNNI) && defined(__x86_64__)
    if (has_avx512() && __builtin_cpu_supports("avx512vnni"))
        found.push_back({"avx512vnni", &avx512::kKernels, &avx512vnni::kIntegerKernels});
#endif
#if defined(ADQ_HAVE_AVX512) && defined(__x86_64__)
    if (has_avx512()) found.push_back({"avx512", &avx512::kKernels, &avx512::kIntegerKernels});
#endif
#if defined(ADQ_HAVE_AVX2VNNI) && defined(__x86_64__)
    if (has_avx2() && has_avx_vnni())
        found.push_back({"avx2vnni", &avx2::kKernels, &avx2vnni::kIntegerKernels});
#endif
#if defined(ADQ_HAVE_AVX2) && defined(__x86_64__)
    if (has_avx2()) found.push_back({"avx2", &avx2::kKernels, &avx2::kIntegerKernels});
#endif
    found.push_back({"baseline", &baseline::kKernels, &baseline::kIntegerKernels});
    return found;
}

const std::vector<Isa>& isas() {
    static const std::vector<Isa> found = find_isas();
    return found;
}

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{&isas().front()};
    return isa;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

const IntegerKernels& integer_kernels() { return *chosen().load(std::memory_order_relaxed)->integer; }

std::string isa() { return chosen().load()->name; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.name);
    return names;
}

void set_isa(const std::string& name) {
    std::string known;
    for (const Isa& isa : isas()) {
        if (name == isa.name) return chosen().store(&isa);
        known += (known.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("adq: instruction set '" + name +
                                "' is unknown or not available here; there are " + known);
}

}  // namespace adq
