// The inner loops with AVX2. Only called where isa.hpp has found it.
#include "simd.hpp"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

// After the standard headers: their inline functions must run on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,popcnt")
#endif

namespace dml_fast {
namespace avx2 {

#include "simd_tools.hpp"

struct Floats {
    using Scalar = float;
    using Vector = __m256;
    using Mask = __m256;
    using Counter = __m256i;
    static constexpr int WIDTH = 8;
    static Vector load(const float* p) { return _mm256_loadu_ps(p); }
    static Vector same(float x) { return _mm256_set1_ps(x); }
    static Mask at_most(Vector x, Vector t) { return _mm256_cmp_ps(x, t, _CMP_LE_OQ); }
    static Mask less(Vector x, Vector t) { return _mm256_cmp_ps(x, t, _CMP_LT_OQ); }
    static Mask not_above(Vector x, Vector t) { return _mm256_cmp_ps(x, t, _CMP_NGT_UQ); }
    static Mask equal(Vector x, Vector t) { return _mm256_cmp_ps(x, t, _CMP_EQ_OQ); }
    static Mask none() { return _mm256_setzero_ps(); }
    static Mask unless(Mask out, Mask in) { return _mm256_andnot_ps(out, in); }
    static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
    static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
    static Counter zero() { return _mm256_setzero_si256(); }
    static Counter add(Counter c, Mask m) { return _mm256_sub_epi32(c, _mm256_castps_si256(m)); }
    static std::int64_t sum(Counter c) {
        alignas(32) std::int32_t parts[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts), c);
        std::int64_t total = 0;
        for (std::int32_t part : parts) total += part;
        return total;
    }
    static std::int64_t keep(const float* x, Mask m, float* out) {
        return keep_bits(x, bits(m), out);
    }

    // For the loss (simd_loss.hpp).
    static void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
    // The first n elements of a vector; the others are 0, and are not touched in memory.
    using Part = __m256i;
    static Part part(std::int64_t n) {
        alignas(32) static constexpr std::int32_t ONES[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
        return _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(ONES + 8 - (n < WIDTH ? n : WIDTH)));
    }
    static Vector load(const float* p, Part m) { return _mm256_maskload_ps(p, m); }
    static void store(float* p, Vector x, Part m) { _mm256_maskstore_ps(p, m, x); }
    static Vector only(Vector x, Part m) { return _mm256_and_ps(x, _mm256_castsi256_ps(m)); }
    static Vector plus(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector minus(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
    static Vector times(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
    static Vector fused(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
    static void stream(float* p, Vector x) { _mm256_stream_ps(p, x); }
    template <int HALF>
    static __m256d widen(Vector x) {
        return _mm256_cvtps_pd(_mm256_extractf128_ps(x, HALF));
    }
    static Vector over(Vector a, Vector b) { return _mm256_div_ps(a, b); }
    static Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
    static Vector zero_below(Vector x, Vector a, Vector least) {
        return _mm256_and_ps(_mm256_cmp_ps(a, least, _CMP_NLT_UQ), x);
    }
    static Vector power_of_two(Vector shifted) {
        const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23)));
    }
    // y = 2^n m, m in [sqrt(1/2), sqrt(2)): returns m.
    static Vector mantissa(Vector y, Vector& n) {
        const __m256i bits = _mm256_castps_si256(y);
        const __m256i power =
            _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(ROOT_OF_HALF)), 23);
        n = _mm256_cvtepi32_ps(power);
        return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
    }

    // For tables (simd_count.hpp).
    static Counter plus(Counter a, Counter b) { return _mm256_add_epi32(a, b); }
    static Counter fields(Counter c, int mask) {
        return _mm256_and_si256(c, _mm256_set1_epi32(mask));
    }
    template <int BITS>
    static Counter down(Counter c) {
        return _mm256_srli_epi32(c, BITS);
    }
    static Mask above(Vector x, Vector t) { return _mm256_cmp_ps(x, t, _CMP_NLE_UQ); }
    static Counter move(Counter place, Mask m, int by) {
        const Counter step = _mm256_and_si256(_mm256_castps_si256(m), _mm256_set1_epi32(by));
        return _mm256_or_si256(place, step);
    }

    struct Narrow {
        static constexpr int WORDS = 1, MOST = 14;
        struct Table {
            Vector low, high;
        };
        Vector middle;
        Table by4, by2, by1, exact;
        Narrow(const float* thresholds, std::int64_t k) {
            const Padded<16> t(thresholds, k);
            middle = same(t.search[7]);
            by4 = {load(t.search + 3), load(t.search + 11)};
            by2 = {load(t.search + 1), load(t.search + 9)};
            by1 = {load(t.search), load(t.search + 8)};
            exact = {load(t.exact), load(t.exact + 8)};
        }
        static Vector at(Counter place, Mask second, const Table& table) {
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, place),
                                    _mm256_permutevar8x32_ps(table.high, place), second);
        }
        void add(Vector x, Counter* pairs, Counter& found) const {
            const Mask second = above(x, middle);
            Counter place = move(zero(), second, 8);
            place = move(place, above(x, at(place, second, by4)), 4);
            place = move(place, above(x, at(place, second, by2)), 2);
            place = move(place, above(x, at(place, second, by1)), 1);
            found = Floats::add(found, equal(x, at(place, second, exact)));
            pairs[0] = plus(pairs[0],
                            _mm256_sllv_epi32(_mm256_set1_epi32(1), plus(place, place)));
        }
    };
    static constexpr int TABLES = 1;
};

struct Doubles {
    using Scalar = double;
    using Vector = __m256d;
    using Mask = __m256d;
    using Counter = __m256i;
    static constexpr int WIDTH = 4;
    static Vector load(const double* p) { return _mm256_loadu_pd(p); }
    static Vector same(double x) { return _mm256_set1_pd(x); }
    static Vector widen(const double* p) { return load(p); }
    static Vector widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
    static void store(double* p, Vector x) { _mm256_storeu_pd(p, x); }
    static Vector plus(Vector a, Vector b) { return _mm256_add_pd(a, b); }
    // Of all elements: those half a vector apart first, and so on.
    static double total(Vector x) {
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    template <bool>
    static Vector add_product(Vector sum, Vector a, Vector b) {
        return _mm256_add_pd(sum, _mm256_mul_pd(a, b));
    }
    static Mask at_most(Vector x, Vector t) { return _mm256_cmp_pd(x, t, _CMP_LE_OQ); }
    static Mask equal(Vector x, Vector t) { return _mm256_cmp_pd(x, t, _CMP_EQ_OQ); }
    static Mask not_above(Vector x, Vector t) { return _mm256_cmp_pd(x, t, _CMP_NGT_UQ); }
    static Mask none() { return _mm256_setzero_pd(); }
    static Mask either(Mask a, Mask b) { return _mm256_or_pd(a, b); }
    static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
    static Counter zero() { return _mm256_setzero_si256(); }
    static Counter add(Counter c, Mask m) { return _mm256_sub_epi64(c, _mm256_castpd_si256(m)); }
    static std::int64_t sum(Counter c) {
        alignas(32) std::int64_t parts[4];
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts), c);
        return parts[0] + parts[1] + parts[2] + parts[3];
    }
    static std::int64_t keep(const double* x, Mask m, double* out) {
        return keep_bits(x, bits(m), out);
    }
    static constexpr int TABLES = 0;
};

constexpr std::int64_t SEARCH_FROM = 64, TABLES_UP_TO = 64;
constexpr int DOT_ROWS = 4, DOT_COLUMNS = 2;

#include "simd_body.hpp"

}  // namespace avx2
}  // namespace dml_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
