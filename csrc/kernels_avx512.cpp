// The inner loops with AVX-512. Only called where isa.hpp has found it.
#include "kernels.hpp"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

// After the standard headers: their inline functions must run on any CPU.
#define DML_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2,popcnt"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(DML_FAST_AVX512))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2,popcnt,prefer-vector-width=512")
#endif

namespace dml_fast {
namespace avx512 {

struct Floats {
    using Scalar = float;
    using Vector = __m512;
    using Mask = __mmask16;
    using Counter = __m512i;
    static constexpr int WIDTH = 16;
    static Vector load(const float* p) { return _mm512_loadu_ps(p); }
    static Vector same(float x) { return _mm512_set1_ps(x); }
    static Mask at_most(Vector x, Vector t) { return _mm512_cmp_ps_mask(x, t, _CMP_LE_OQ); }
    static Mask less(Vector x, Vector t) { return _mm512_cmp_ps_mask(x, t, _CMP_LT_OQ); }
    static Mask not_above(Vector x, Vector t) { return _mm512_cmp_ps_mask(x, t, _CMP_NGT_UQ); }
    static Mask none() { return 0; }
    static Mask unless(Mask out, Mask in) { return static_cast<Mask>(in & ~out); }
    static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
    static unsigned bits(Mask m) { return m; }
    static Counter zero() { return _mm512_setzero_si512(); }
    static Counter add(Counter c, Mask m) {
        return _mm512_mask_sub_epi32(c, m, c, _mm512_set1_epi32(-1));
    }
    static std::int64_t sum(Counter c) {
        alignas(64) std::int32_t parts[16];
        _mm512_store_si512(parts, c);
        std::int64_t total = 0;
        for (std::int32_t part : parts) total += part;
        return total;
    }
};

struct Doubles {
    using Scalar = double;
    using Vector = __m512d;
    using Mask = __mmask8;
    using Counter = __m512i;
    static constexpr int WIDTH = 8;
    static Vector load(const double* p) { return _mm512_loadu_pd(p); }
    static Vector same(double x) { return _mm512_set1_pd(x); }
    static Mask at_most(Vector x, Vector t) { return _mm512_cmp_pd_mask(x, t, _CMP_LE_OQ); }
    static unsigned bits(Mask m) { return m; }
    static Counter zero() { return _mm512_setzero_si512(); }
    static Counter add(Counter c, Mask m) {
        return _mm512_mask_sub_epi64(c, m, c, _mm512_set1_epi64(-1));
    }
    static std::int64_t sum(Counter c) {
        alignas(64) std::int64_t parts[8];
        _mm512_store_si512(parts, c);
        std::int64_t total = 0;
        for (std::int64_t part : parts) total += part;
        return total;
    }
};

constexpr std::int64_t SEARCH_FROM = 96;

#include "kernels_body.hpp"

}  // namespace avx512
}  // namespace dml_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
