// The instruction set that code may use on this machine, decided at run time, so that one wheel
// serves every CPU. The environment variable DML_FAST_ISA lowers it, for example in tests.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dml_fast {

// A value in the environment that cannot be: in Python a UserError.
struct BadEnvironment : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// Each level includes those before it.
enum class Isa { baseline, avx2, avx512 };

inline const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

// The highest level that CPU, operating system and compiler support.
inline Isa detect_isa() {
#if defined(__GNUC__) && defined(__x86_64__)
    // The steps are those of the x86-64 psABI: v3, and v4 on top of it.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::baseline;
}

// Whether products of bfloat16 are faster than those of float32 here.
inline bool has_fast_bf16() {
#if defined(__GNUC__) && defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// The level to use: `requested` by name, or `highest` where `requested` is null or empty.
// Throws BadEnvironment on a name that is unknown or above `highest`.
inline Isa choose_isa(const char* requested, Isa highest) {
    if (requested == nullptr || *requested == '\0') return highest;
    const std::string name(requested);
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
        if (name != isa_name(isa)) continue;
        if (isa <= highest) return isa;
        throw BadEnvironment("DML_FAST_ISA=" + name +
                             " is not supported here: unset it, or choose at most " +
                             isa_name(highest));
    }
    throw BadEnvironment("DML_FAST_ISA=" + name +
                         " is not an instruction set: choose baseline, avx2 or avx512");
}

// What this process uses. Read at each call, since tests change the variable.
inline Isa active_isa() { return choose_isa(std::getenv("DML_FAST_ISA"), detect_isa()); }

}  // namespace dml_fast
