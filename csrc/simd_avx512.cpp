// The inner loops with AVX-512. Only called where isa.hpp has found it.
#include "simd.hpp"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

// After the standard headers: their inline functions must run on any CPU.
#define DML_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,popcnt"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(DML_FAST_AVX512))), apply_to = function)
#else
// Registers that GCC 12's own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,popcnt,prefer-vector-width=512")
#endif

namespace dml_fast {
namespace avx512 {

#include "simd_tools.hpp"

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
    static Mask equal(Vector x, Vector t) { return _mm512_cmp_ps_mask(x, t, _CMP_EQ_OQ); }
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
    static std::int64_t keep(const float* x, Mask m, float* out) {
        _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, load(x)));
        return bits_set(m);
    }

    // For the loss (simd_loss.hpp).
    static void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
    // The first n elements of a vector; the others are 0, and are not touched in memory.
    using Part = __mmask16;
    static Part part(std::int64_t n) {
        return static_cast<Part>(n < WIDTH ? (1u << n) - 1u : 0xffffu);
    }
    static Vector load(const float* p, Part m) { return _mm512_maskz_loadu_ps(m, p); }
    static void store(float* p, Vector x, Part m) { _mm512_mask_storeu_ps(p, m, x); }
    static Vector only(Vector x, Part m) { return _mm512_maskz_mov_ps(m, x); }
    static Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector minus(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
    static Vector times(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
    static Vector fused(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
    static void stream(float* p, Vector x) { _mm512_stream_ps(p, x); }
    template <int HALF>
    static __m512d widen(Vector x) {
        const __m512d pairs = _mm512_castps_pd(x);
        return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(pairs, HALF)));
    }
    static Vector over(Vector a, Vector b) { return _mm512_div_ps(a, b); }
    static Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
    static Vector zero_below(Vector x, Vector a, Vector least) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, least, _CMP_NLT_UQ), x);
    }
    static Vector power_of_two(Vector shifted) {
        const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23)));
    }
    // y = 2^n m, m in [sqrt(1/2), sqrt(2)): returns m.
    static Vector mantissa(Vector y, Vector& n) {
        const __m512i bits = _mm512_castps_si512(y);
        const __m512i power =
            _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(ROOT_OF_HALF)), 23);
        n = _mm512_cvtepi32_ps(power);
        return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
    }

    // For tables (simd_count.hpp).
    static Counter plus(Counter a, Counter b) { return _mm512_add_epi32(a, b); }
    static Counter fields(Counter c, int mask) {
        return _mm512_and_si512(c, _mm512_set1_epi32(mask));
    }
    template <int BITS>
    static Counter down(Counter c) {
        return _mm512_srli_epi32(c, BITS);
    }
    static Mask above(Vector x, Vector t) { return _mm512_cmp_ps_mask(x, t, _CMP_NLE_UQ); }
    static Counter move(Counter place, Mask m, int by) {
        return _mm512_mask_or_epi32(place, m, place, _mm512_set1_epi32(by));
    }
    static Counter hot() {
        return _mm512_sllv_epi32(_mm512_set1_epi32(1),
                                 _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24,
                                                   26, 28, 30));
    }

    struct Narrow {
        static constexpr int WORDS = 1, MOST = 14;
        Vector middle, by4, by2, by1, exact;
        Narrow(const float* thresholds, std::int64_t k) {
            const Padded<16> t(thresholds, k);
            middle = same(t.search[7]);
            by4 = load(t.search + 3);
            by2 = load(t.search + 1);
            by1 = load(t.search);
            exact = load(t.exact);
        }
        static Vector at(Counter place, Vector table) {
            return _mm512_permutexvar_ps(place, table);
        }
        void add(Vector x, Counter* pairs, Counter& found) const {
            Counter place = _mm512_maskz_set1_epi32(above(x, middle), 8);
            place = move(place, above(x, at(place, by4)), 4);
            place = move(place, above(x, at(place, by2)), 2);
            place = move(place, above(x, at(place, by1)), 1);
            found = Floats::add(found, equal(x, at(place, exact)));
            pairs[0] = plus(pairs[0], _mm512_permutexvar_epi32(place, hot()));
        }
    };

    struct Wide {
        static constexpr int WORDS = 2, MOST = 30;
        struct Table {
            Vector low, high;
        };
        Vector middle;
        Table by8, by4, by2, by1, exact;
        Wide(const float* thresholds, std::int64_t k) {
            const Padded<32> t(thresholds, k);
            middle = same(t.search[15]);
            by8 = {load(t.search + 7), load(t.search + 23)};
            by4 = {load(t.search + 3), load(t.search + 19)};
            by2 = {load(t.search + 1), load(t.search + 17)};
            by1 = {load(t.search), load(t.search + 16)};
            exact = {load(t.exact), load(t.exact + 16)};
        }
        static Vector at(Counter place, const Table& table) {
            return _mm512_permutex2var_ps(table.low, place, table.high);
        }
        void add(Vector x, Counter* pairs, Counter& found) const {
            const Mask second = above(x, middle);
            Counter place = _mm512_maskz_set1_epi32(second, 16);
            place = move(place, above(x, at(place, by8)), 8);
            place = move(place, above(x, at(place, by4)), 4);
            place = move(place, above(x, at(place, by2)), 2);
            place = move(place, above(x, at(place, by1)), 1);
            found = Floats::add(found, equal(x, at(place, exact)));
            const Mask first = static_cast<Mask>(~second);
            pairs[0] = plus(pairs[0], _mm512_maskz_permutexvar_epi32(first, place, hot()));
            pairs[1] = plus(pairs[1], _mm512_maskz_permutexvar_epi32(second, place, hot()));
        }
    };
    static constexpr int TABLES = 2;
};

struct Doubles {
    using Scalar = double;
    using Vector = __m512d;
    using Mask = __mmask8;
    using Counter = __m512i;
    static constexpr int WIDTH = 8;
    static Vector load(const double* p) { return _mm512_loadu_pd(p); }
    static Vector same(double x) { return _mm512_set1_pd(x); }
    static Vector widen(const double* p) { return load(p); }
    static Vector widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
    static void store(double* p, Vector x) { _mm512_storeu_pd(p, x); }
    static Vector plus(Vector a, Vector b) { return _mm512_add_pd(a, b); }
    // Of all elements: those half a vector apart first, and so on.
    static double total(Vector x) {
        const __m256d four =
            _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
        const __m128d two =
            _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    template <bool EXACT>
    static Vector add_product(Vector sum, Vector a, Vector b) {
        if (EXACT) return _mm512_fmadd_pd(a, b, sum);
        return _mm512_add_pd(sum, _mm512_mul_pd(a, b));
    }
    static Mask at_most(Vector x, Vector t) { return _mm512_cmp_pd_mask(x, t, _CMP_LE_OQ); }
    static Mask equal(Vector x, Vector t) { return _mm512_cmp_pd_mask(x, t, _CMP_EQ_OQ); }
    static Mask not_above(Vector x, Vector t) { return _mm512_cmp_pd_mask(x, t, _CMP_NGT_UQ); }
    static Mask none() { return 0; }
    static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
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
    static std::int64_t keep(const double* x, Mask m, double* out) {
        _mm512_storeu_pd(out, _mm512_maskz_compress_pd(m, load(x)));
        return bits_set(m);
    }
    static constexpr int TABLES = 0;
};

constexpr std::int64_t SEARCH_FROM = 96, TABLES_UP_TO = 480;
constexpr int DOT_ROWS = 4, DOT_COLUMNS = 6;

#include "simd_body.hpp"

}  // namespace avx512
}  // namespace dml_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
