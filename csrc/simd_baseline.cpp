// The inner loops for any CPU: with SSE2 on x86-64, else in plain C++.
#include "simd.hpp"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace dml_fast {
namespace baseline {

#include "simd_tools.hpp"

#if defined(__SSE2__) || defined(_M_X64)

struct Floats {
    using Scalar = float;
    using Vector = __m128;
    using Mask = __m128;
    using Counter = __m128i;
    static constexpr int WIDTH = 4;
    static Vector load(const float* p) { return _mm_loadu_ps(p); }
    static Vector same(float x) { return _mm_set1_ps(x); }
    static Mask at_most(Vector x, Vector t) { return _mm_cmple_ps(x, t); }
    static Mask less(Vector x, Vector t) { return _mm_cmplt_ps(x, t); }
    static Mask not_above(Vector x, Vector t) { return _mm_cmpngt_ps(x, t); }
    static Mask equal(Vector x, Vector t) { return _mm_cmpeq_ps(x, t); }
    static Mask none() { return _mm_setzero_ps(); }
    static Mask unless(Mask out, Mask in) { return _mm_andnot_ps(out, in); }
    static Mask either(Mask a, Mask b) { return _mm_or_ps(a, b); }
    static unsigned bits(Mask m) { return static_cast<unsigned>(_mm_movemask_ps(m)); }
    static Counter zero() { return _mm_setzero_si128(); }
    static Counter add(Counter c, Mask m) { return _mm_sub_epi32(c, _mm_castps_si128(m)); }
    static std::int64_t sum(Counter c) {
        alignas(16) std::int32_t parts[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(parts), c);
        return std::int64_t{parts[0]} + parts[1] + parts[2] + parts[3];
    }
    static std::int64_t keep(const float* x, Mask m, float* out) {
        return keep_bits(x, bits(m), out);
    }

    // For the loss (simd_loss.hpp).
    static void store(float* p, Vector x) { _mm_storeu_ps(p, x); }
    // The first n elements of a vector; the others are 0, and are not touched in memory.
    using Part = std::size_t;
    static Part part(std::int64_t n) {
        return static_cast<Part>(n < WIDTH ? n : WIDTH) * sizeof(float);
    }
    static Vector load(const float* p, Part bytes) {
        float all[WIDTH] = {};
        std::memcpy(all, p, bytes);
        return load(all);
    }
    static void store(float* p, Vector x, Part bytes) {
        float all[WIDTH];
        store(all, x);
        std::memcpy(p, all, bytes);
    }
    static Vector only(Vector x, Part bytes) {
        float all[WIDTH];
        store(all, x);
        return load(all, bytes);
    }
    static Vector plus(Vector a, Vector b) { return _mm_add_ps(a, b); }
    static Vector minus(Vector a, Vector b) { return _mm_sub_ps(a, b); }
    static Vector times(Vector a, Vector b) { return _mm_mul_ps(a, b); }
    static Vector fused(Vector a, Vector b, Vector c) { return plus(times(a, b), c); }
    static void stream(float* p, Vector x) { _mm_stream_ps(p, x); }
    template <int HALF>
    static __m128d widen(Vector x) {
        return _mm_cvtps_pd(HALF ? _mm_movehl_ps(x, x) : x);
    }
    static Vector over(Vector a, Vector b) { return _mm_div_ps(a, b); }
    static Vector larger(Vector a, Vector b) { return _mm_max_ps(a, b); }
    static Vector zero_below(Vector x, Vector a, Vector least) {
        return _mm_and_ps(_mm_cmpnlt_ps(a, least), x);
    }
    static Vector power_of_two(Vector shifted) {
        const __m128i n = _mm_slli_epi32(_mm_castps_si128(shifted), 23);
        return _mm_castsi128_ps(_mm_add_epi32(n, _mm_set1_epi32(127 << 23)));
    }
    // y = 2^n m, m in [sqrt(1/2), sqrt(2)): returns m.
    static Vector mantissa(Vector y, Vector& n) {
        const __m128i bits = _mm_castps_si128(y);
        const __m128i power =
            _mm_srai_epi32(_mm_sub_epi32(bits, _mm_set1_epi32(ROOT_OF_HALF)), 23);
        n = _mm_cvtepi32_ps(power);
        return _mm_castsi128_ps(_mm_sub_epi32(bits, _mm_slli_epi32(power, 23)));
    }
    static constexpr int TABLES = 0;
};

struct Doubles {
    using Scalar = double;
    using Vector = __m128d;
    using Mask = __m128d;
    using Counter = __m128i;
    static constexpr int WIDTH = 2;
    static Vector load(const double* p) { return _mm_loadu_pd(p); }
    static Vector same(double x) { return _mm_set1_pd(x); }
    static Vector widen(const double* p) { return load(p); }
    static Vector widen(const float* p) { return _mm_setr_pd(p[0], p[1]); }
    static void store(double* p, Vector x) { _mm_storeu_pd(p, x); }
    static Vector plus(Vector a, Vector b) { return _mm_add_pd(a, b); }
    static double total(Vector x) { return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x))); }
    template <bool>
    static Vector add_product(Vector sum, Vector a, Vector b) {
        return _mm_add_pd(sum, _mm_mul_pd(a, b));
    }
    static Mask at_most(Vector x, Vector t) { return _mm_cmple_pd(x, t); }
    static Mask equal(Vector x, Vector t) { return _mm_cmpeq_pd(x, t); }
    static Mask not_above(Vector x, Vector t) { return _mm_cmpngt_pd(x, t); }
    static Mask none() { return _mm_setzero_pd(); }
    static Mask either(Mask a, Mask b) { return _mm_or_pd(a, b); }
    static unsigned bits(Mask m) { return static_cast<unsigned>(_mm_movemask_pd(m)); }
    static Counter zero() { return _mm_setzero_si128(); }
    static Counter add(Counter c, Mask m) { return _mm_sub_epi64(c, _mm_castpd_si128(m)); }
    static std::int64_t sum(Counter c) {
        alignas(16) std::int64_t parts[2];
        _mm_store_si128(reinterpret_cast<__m128i*>(parts), c);
        return parts[0] + parts[1];
    }
    static std::int64_t keep(const double* x, Mask m, double* out) {
        return keep_bits(x, bits(m), out);
    }
    static constexpr int TABLES = 0;
};

#else

template <class T>
struct Single {
    using Scalar = T;
    using Vector = T;
    using Mask = bool;
    using Counter = std::int64_t;
    static constexpr int WIDTH = 1;
    static Vector load(const T* p) { return *p; }
    static Vector same(T x) { return x; }
    template <class S>
    static Vector widen(const S* p) {
        return static_cast<T>(*p);
    }
    static void store(T* p, T x) { *p = x; }
    template <bool>
    static Vector add_product(T sum, T a, T b) {
        return sum + a * b;
    }
    static Mask at_most(T x, T t) { return x <= t; }
    static Mask less(T x, T t) { return x < t; }
    static Mask not_above(T x, T t) { return !(x > t); }
    static Mask none() { return false; }
    static Mask unless(Mask out, Mask in) { return in && !out; }
    static Mask either(Mask a, Mask b) { return a || b; }
    static unsigned bits(Mask m) { return m ? 1u : 0u; }
    static Counter zero() { return 0; }
    static Counter add(Counter c, Mask m) { return c + (m ? 1 : 0); }
    static Mask equal(T x, T t) { return x == t; }
    static std::int64_t sum(Counter c) { return c; }
    static std::int64_t keep(const T* x, Mask m, T* out) { return keep_bits(x, bits(m), out); }
    using Part = bool;
    static Part part(std::int64_t n) { return n > 0; }
    static Vector load(const T* p, Part m) { return m ? *p : T{0}; }
    static void store(T* p, T x, Part m) {
        if (m) *p = x;
    }
    static Vector only(T x, Part m) { return m ? x : T{0}; }
    static Vector plus(T a, T b) { return a + b; }
    static Vector minus(T a, T b) { return a - b; }
    static Vector times(T a, T b) { return a * b; }
    static Vector fused(T a, T b, T c) { return a * b + c; }
    static void stream(T* p, T x) { *p = x; }
    template <int>
    static double widen(T x) {
        return static_cast<double>(x);
    }
    static double total(T x) { return static_cast<double>(x); }
    static Vector over(T a, T b) { return a / b; }
    static Vector larger(T a, T b) { return a > b ? a : b; }
    static Vector zero_below(T x, T a, T least) { return a < least ? T{0} : x; }
    static Vector power_of_two(T shifted) {
        std::uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits = (bits << 23) + (127u << 23);
        float power;
        std::memcpy(&power, &bits, sizeof power);
        return power;
    }
    static Vector mantissa(T y, T& n) {
        std::int32_t bits;
        float x = static_cast<float>(y);
        std::memcpy(&bits, &x, sizeof bits);
        const std::int32_t power = (bits - ROOT_OF_HALF) >> 23;
        n = static_cast<T>(power);
        bits -= power * (1 << 23);
        std::memcpy(&x, &bits, sizeof bits);
        return static_cast<T>(x);
    }
    static constexpr int TABLES = 0;
};
using Floats = Single<float>;
using Doubles = Single<double>;

#endif

constexpr std::int64_t SEARCH_FROM = 24, TABLES_UP_TO = 0;
constexpr int DOT_ROWS = 4, DOT_COLUMNS = 2;

#include "simd_body.hpp"

}  // namespace baseline
}  // namespace dml_fast
