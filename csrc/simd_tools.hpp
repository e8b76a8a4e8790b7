// Small tools that the vectors (simd_*.cpp) and the inner loops (simd_body.hpp) share. Included
// once per instruction set: no include guard.

#if defined(__GNUC__)
inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }
inline int bits_set(std::uint64_t word) { return __builtin_popcountll(word); }
#else
inline int bits_set(std::uint64_t word) {
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return static_cast<int>(word * 0x0101010101010101u >> 56);
}
inline int lowest_bit(unsigned bits) { return bits_set((bits & (0u - bits)) - 1u); }
#endif

// Elements one by one, for sets without an instruction that would bring them together.
template <class T>
inline std::int64_t keep_bits(const T* x, unsigned bits, T* out) {
    T* const begin = out;
    for (; bits != 0; bits &= bits - 1) *out++ = x[lowest_bit(bits)];
    return out - begin;
}

// Thresholds in a table of N. Above the last one come +inf for the search, so that only NaN has the
// last place, and NaN for the comparison, as it equals nothing.
template <int N>
struct Padded {
    float search[2 * N], exact[N];
    Padded(const float* thresholds, std::int64_t k) {
        for (float& value : search) value = std::numeric_limits<float>::infinity();
        for (float& value : exact) value = std::numeric_limits<float>::quiet_NaN();
        for (std::int64_t i = 0; i < k; ++i) search[i] = exact[i] = thresholds[i];
    }
};
