// Scaled and rounded copies of features, and a rigorous account of what rounding them has lost.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace dml_fast {

// Rounded to nearest, ties to even; the caller has no NaN.
inline std::uint16_t to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(double value, float* out) { *out = static_cast<float>(value); }
inline void store(double value, std::uint16_t* out) { *out = to_bf16(static_cast<float>(value)); }
inline double load(float value) { return value; }
inline double load(std::uint16_t value) { return from_bf16(value); }
inline void store_nan(float* out) { *out = std::numeric_limits<float>::quiet_NaN(); }
inline void store_nan(std::uint16_t* out) { *out = 0x7fc0; }

struct Rounded {
    double norm, slip;
};

// out = scale * row, rounded; what the norm is then, and how far off it is at most.
template <class T, class S>
Rounded round_row(const T* row, std::int64_t dims, double scale, bool loose, S* out) {
    double norm = 0.0, slip = 0.0, loose_slip = 0.0;
    for (std::int64_t d = 0; d < dims; ++d) {
        const double value = scale * static_cast<double>(row[d]);
        store(value, out + d);
        const double kept = load(out[d]);
        norm += kept * kept;
        slip += (kept - value) * (kept - value);
        if (loose) {
            const double off = from_bf16(to_bf16(static_cast<float>(kept))) - kept;
            loose_slip += off * off;
        }
    }
    // The sums themselves are rounded, by far less than this; so is scale * row, absolutely.
    constexpr double UP = 1.0 + 1e-9;
    const double extra = std::sqrt(loose_slip) * UP;
    const double kept_norm = std::sqrt(norm) * UP;
    return {kept_norm + extra, std::sqrt(slip) * UP + extra + 1e-15 * kept_norm};
}

// A row that can be approximated: its products with another such row are finite.
inline bool usable(double squared_norm) { return squared_norm < 1e300; }

inline double one_over_norm(double squared) {
    return squared > 0.0 && usable(squared) ? 1.0 / std::sqrt(squared) : 1.0;
}

// The power of two that brings the largest usable norm into 1/2..1.
inline double power_for(const std::vector<double>& squared_norms) {
    double largest = 0.0;
    for (double squared : squared_norms) {
        if (usable(squared)) largest = std::max(largest, squared);
    }
    if (largest == 0.0) return 1.0;
    return std::ldexp(1.0, std::clamp(-std::ilogb(std::sqrt(largest)) - 1, -500, 500));
}

}  // namespace dml_fast
