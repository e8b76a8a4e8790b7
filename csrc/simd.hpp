// The inner loops, compiled once per instruction set (simd_*.cpp) and chosen at run time. Each of
// them gives the same bits at every level, but for those of the mutual loss (simd_loss.hpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.hpp"

namespace dml_fast {

#if defined(__GNUC__)
inline void prefetch(const void* where) { __builtin_prefetch(where); }
inline void prefetch_second(const void* where) { __builtin_prefetch(where, 0, 2); }  // level
#else
inline void prefetch(const void*) {}
inline void prefetch_second(const void*) {}
#endif

// Partial sums of a dot product: element i goes to number i mod DOT_LANES, and these are then
// added by halves. The order is part of the result's definition.
constexpr int DOT_LANES = 32;

struct Counted {
    std::int64_t equal;  // elements equal to a threshold
    std::int64_t nans;
};

// At least one threshold; they rise strictly, and a NaN may come first (nothing is <= NaN).
// counts[k] += the number of x[j] <= thresholds[k]. A NaN in x is never counted there.
template <class T>
using CountAtMost = Counted (*)(const T* x, std::int64_t n, const T* thresholds, std::int64_t k,
                             std::int64_t* counts);

// A row of approximate scores against intervals [low[k], high[k]], both sorted:
// counts[k] += the number of x[j] < low[k]; unsure[j] = 1 where x[j] is in an interval or NaN,
// else 0. Returns the number of unsure elements.
using Screen = std::int64_t (*)(const float* x, std::int64_t n, const float* low, const float* high,
                                std::int64_t k, std::int64_t* counts, std::uint8_t* unsure);

// x[j] = offset[j] - scores[j], from float32 or from bfloat16 bits.
template <class S>
using Widen = void (*)(const S* scores, const float* offset, std::int64_t n, float* x);

template <class T>
using Dot = double (*)(const T* a, const T* b, std::int64_t n);

// out[r * stride + c] = Dot of row r of a (rows, n), already widened to float64, and row c of
// b (columns, n), bit for bit.
template <class T>
using Dots = void (*)(const double* a, std::int64_t rows, const T* b, std::int64_t columns,
                      std::int64_t n, double* out, std::int64_t stride);

// out[j] = the number of bits in which code and codes[j] differ, j = 0..n-1, of `words` each.
using Hamming = void (*)(const std::uint64_t* code, const std::uint64_t* codes, std::int64_t n,
                         std::int64_t words, std::uint16_t* out);

// A row of the mutual loss. NaN or an infinite logit makes the sum NaN or infinite.
constexpr std::int32_t ROOT_OF_HALF = 0x3f3504f3;  // the bits of sqrt(1/2) as float32

struct Peak {
    float largest;  // NaN is passed over
    double sum;     // of z
};
using PeakOf = Peak (*)(const float* z, std::int64_t n);

// a[j] = (z[j] - largest) / temperature, w[j] = exp(a[j]).
struct SoftSums {
    double whole, less_one;  // of w; if asked for, of w - 1 without cancellation where w is near 1
    double products;         // of w * a; NaN where an a is infinite
};

// What is needed next and is fetched meanwhile, as many elements as are worked on. Null: nothing.
struct Ahead {
    const char *read, *write;
    std::int64_t item, written;  // bytes of an element of each
    void fetch(std::int64_t j) const {
        if (!read) return;
        for (std::int64_t b = 0; b < DOT_LANES * item; b += 64) {
            prefetch_second(read + j * item + b);
        }
        for (std::int64_t b = 0; write && b < DOT_LANES * written; b += 64) {
            prefetch_second(write + j * written + b);
        }
    }
};

// Writes w, and the sums.
using Soften = void (*)(const float* z, std::int64_t n, float largest, float per_temperature,
                        bool flat, const Ahead& ahead, float* w, SoftSums& sums);

// v[j] = the sum over l of w[l][j] * factor[l], l = 0..count-1, in this order.
using MixPeers = void (*)(const float* const* w, const float* factor, std::int64_t count,
                          std::int64_t n, float* v);

// A part of a student's row: the gradient is by_q q - by_v v + by_p p - by_t t.
struct Learner {
    const float* z;
    float largest, per_temperature;
    const float* v;  // the peers' mixture
    const float* q;  // exponentials at temperature 1
    const float* p;  // those at the temperature, or null where it is 1
    const float* t;  // the dense part of the target, or null
    float by_q, by_p, by_v, by_t;
    float* grad;  // or null
    bool stream;  // write it past the caches: then it begins at a multiple of 64 bytes
};
struct LearnSums {
    double mixed;     // of v[j] * a[j]
    double labelled;  // of t[j] * (z[j] - largest)
};

// Adds to the sums, and writes the gradient if there is one. At most a few thousand elements: their
// sums are taken in float32.
using Learn = void (*)(const Learner& k, std::int64_t n, LearnSums& sums);

// Labels that do not exclude each other: t = z / temperature, a = |t|. At most LABEL_STRIP
// elements, so that `factor` is finite.
constexpr std::int64_t LABEL_STRIP = 960;
struct CoinSums {
    double factor;    // the product of 1 + exp(-a)
    double sizes;     // of a
    double products;  // of a * sigmoid(-a)
};

// Writes p = sigmoid(t), less = 1 - p without cancellation, and the sums.
using Toss = void (*)(const float* z, std::int64_t n, float per_temperature, float* p, float* less,
                      CoinSums& sums);

// A part of a student's row: the gradient is by_q (q - y) + by_p p - by_v v.
struct LabelLearner {
    const float* z;
    float per_temperature;
    const float* v;  // the sum of the peers' p
    const float* u;  // that of 1 - p
    const float* q;  // sigmoid(z)
    const float* p;  // sigmoid(t)
    const float* y;  // the labels
    float by_q, by_p, by_v;
    float* grad;  // or null
};
struct LabelSums {
    double mixed;  // of a * (t >= 0 ? u : v)
    double away;   // of |z| * (z >= 0 ? 1 - y : y)
};

// Adds to the sums, and writes the gradient if there is one.
using LearnLabels = void (*)(const LabelLearner& k, std::int64_t n, LabelSums& sums);

// The other divergences: a[j] = (z[j] - largest) / temperature, which is log p but for a constant.
// At most a few thousand elements: their sums are taken in float32.
struct LogView {
    const float* z;
    float largest, shift;
};

// With d[j] = a[j] - first a[j] - shift, which is small where students agree:
// sum[j] = the sum over the views of d[j], the first of which is 0.
using AddLogs = void (*)(const LogView* views, std::int64_t count, std::int64_t n,
                         float per_temperature, float* sum);

// gap[j] = count d[j] - sum[j]; returns the sum of w[j] gap[j].
using GapOf = double (*)(const LogView& view, const LogView& first, float count, const float* sum,
                         const float* w, std::int64_t n, float per_temperature, float* gap);

// mean[k][j] = the sum over l != k of w[l][j] * factor[l], without a difference.
using MixOthers = void (*)(const float* const* w, const float* factor, std::int64_t count,
                           std::int64_t students, std::int64_t n, float* const* mean);

// With p = w * reciprocal, m = beta mean + rest p and rest = 1 - beta: writes log(m / p) over the
// mean, and adds to the sums.
struct MixtureSums {
    double divergence;  // of -beta mean log(m / mean) - rest p log(m / p)
    double middle;      // of p log(m / p)
};
using MixtureLogs = void (*)(const float* w, float reciprocal, float beta, float rest,
                             std::int64_t n, float* mean, MixtureSums& sums);

// grad[j] += by * w[j] * (x[j] - middle).
using Pull = void (*)(const float* w, const float* x, float middle, float by, std::int64_t n,
                      float* grad);

// bfloat16 as bits, to float32 and, rounded to the nearest (no NaN), back.
using FloatsOf = void (*)(const std::uint16_t* bf16, std::int64_t n, float* x);
using Bf16Of = void (*)(const float* x, std::int64_t n, std::uint16_t* bf16);

struct Simd {
    CountAtMost<float> count_at_most_f32;
    CountAtMost<double> count_at_most_f64;
    Screen screen;
    Widen<float> widen_f32;
    Widen<std::uint16_t> widen_bf16;
    Dot<float> dot_f32;
    Dot<double> dot_f64;
    Dots<float> dots_f32;
    Dots<double> dots_f64;
    Hamming hamming;
    PeakOf peak_of;
    Soften soften;
    MixPeers mix_peers;
    Learn learn;
    FloatsOf floats_of;
    Bf16Of bf16_of;
    Toss toss;
    LearnLabels learn_labels;
    AddLogs add_logs;
    GapOf gap_of;
    MixOthers mix_others;
    MixtureLogs mixture_logs;
    Pull pull;

    Counted count_at_most(const float* x, std::int64_t n, const float* t, std::int64_t k,
                          std::int64_t* counts) const {
        return count_at_most_f32(x, n, t, k, counts);
    }
    Counted count_at_most(const double* x, std::int64_t n, const double* t, std::int64_t k,
                          std::int64_t* counts) const {
        return count_at_most_f64(x, n, t, k, counts);
    }
    void widen(const float* s, const float* o, std::int64_t n, float* x) const {
        widen_f32(s, o, n, x);
    }
    void widen(const std::uint16_t* s, const float* o, std::int64_t n, float* x) const {
        widen_bf16(s, o, n, x);
    }
    double dot(const float* a, const float* b, std::int64_t n) const { return dot_f32(a, b, n); }
    double dot(const double* a, const double* b, std::int64_t n) const { return dot_f64(a, b, n); }
    void dots(const double* a, std::int64_t rows, const float* b, std::int64_t columns,
              std::int64_t n, double* out, std::int64_t stride) const {
        dots_f32(a, rows, b, columns, n, out, stride);
    }
    void dots(const double* a, std::int64_t rows, const double* b, std::int64_t columns,
              std::int64_t n, double* out, std::int64_t stride) const {
        dots_f64(a, rows, b, columns, n, out, stride);
    }
};

namespace baseline {
extern const Simd SIMD;
}
#if defined(__GNUC__) && defined(__x86_64__)
namespace avx2 {
extern const Simd SIMD;
}
namespace avx512 {
extern const Simd SIMD;
}
#endif

// The inner loops of the instruction set in use (isa.hpp).
inline const Simd& active_simd() {
#if defined(__GNUC__) && defined(__x86_64__)
    switch (active_isa()) {
        case Isa::avx512:
            return avx512::SIMD;
        case Isa::avx2:
            return avx2::SIMD;
        default:
            break;
    }
#endif
    return baseline::SIMD;
}

}  // namespace dml_fast
