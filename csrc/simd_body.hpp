// The inner loops themselves, included once per instruction set: no include guard, no headers.
// `Floats` and `Doubles` are that set's vectors; SEARCH_FROM, the number of thresholds from which a
// search is faster, is defined there too.

constexpr int STEP = 64;  // elements searched for side by side

// place[j] = how many of the k sorted thresholds v[j] is not at most (not below, if `BELOW`), by
// halving, j < m <= STEP. The compiler turns the inner loops into gathers.
template <bool BELOW, class T>
inline void find_places(const T* v, int m, const T* thresholds, std::int64_t k,
                        std::int32_t* place) {
    const auto stays = [](T x, T t) { return BELOW ? x < t : x <= t; };
    std::int64_t half = 1;
    while (half * 2 <= k) half *= 2;
    // The first step may overlap the second half, so that k need not be a power of two.
    const auto rest = static_cast<std::int32_t>(k - half);
    for (int j = 0; j < m; ++j) place[j] = stays(v[j], thresholds[half - 1]) ? 0 : rest;
    for (std::int64_t step = half / 2; step > 0; step /= 2) {
        const auto s = static_cast<std::int32_t>(step);
        for (int j = 0; j < m; ++j) {
            place[j] += stays(v[j], thresholds[place[j] + s - 1]) ? 0 : s;
        }
    }
    for (int j = 0; j < m; ++j) place[j] += stays(v[j], thresholds[place[j]]) ? 0 : 1;
}

// The search counts elements by place; the result is the running sums of these counts. Earlier
// counts of the caller are first turned into differences, so that the sums include them.
inline void differences(std::int64_t* counts, std::int64_t k) {
    for (std::int64_t i = k - 1; i > 0; --i) counts[i] -= counts[i - 1];
}
inline void sums(std::int64_t* counts, std::int64_t k) {
    for (std::int64_t i = 1; i < k; ++i) counts[i] += counts[i - 1];
}

#include "simd_count.hpp"

template <class V, int K>
inline void screen_few(const float* x, std::int64_t n, const float* low, const float* high,
                       std::int64_t* counts, std::uint8_t* unsure) {
    typename V::Vector lo[K], hi[K];
    typename V::Counter c[K];
    for (int k = 0; k < K; ++k) {
        lo[k] = V::same(low[k]);
        hi[k] = V::same(high[k]);
        c[k] = V::zero();
    }
    std::int64_t j = 0;
    for (; j + V::WIDTH <= n; j += V::WIDTH) {
        const typename V::Vector v = V::load(x + j);
        if (!V::bits(V::not_above(v, hi[K - 1]))) continue;  // most are beyond all
        typename V::Mask within = V::none();
        for (int k = 0; k < K; ++k) {
            const typename V::Mask before = V::less(v, lo[k]);
            c[k] = V::add(c[k], before);
            within = V::either(within, V::unless(before, V::not_above(v, hi[k])));
        }
        for (unsigned bits = V::bits(within); bits != 0; bits &= bits - 1) {
            unsure[j + lowest_bit(bits)] = 1;
        }
    }
    for (int k = 0; k < K; ++k) counts[k] += V::sum(c[k]);
    for (; j < n; ++j) {
        for (int k = 0; k < K; ++k) {
            const bool before = x[j] < low[k];
            counts[k] += before;
            if (!before && !(x[j] > high[k])) unsure[j] = 1;
        }
    }
}

inline void screen_by_search(const float* x, std::int64_t n, const float* low, const float* high,
                             std::int64_t k, std::int64_t* counts, std::uint8_t* unsure) {
    std::int32_t not_below[STEP], above[STEP];
    for (std::int64_t begin = 0; begin < n; begin += STEP) {
        const int m = static_cast<int>(n - begin < STEP ? n - begin : STEP);
        const float* v = x + begin;
        find_places<true>(v, m, low, k, not_below);
        find_places<false>(v, m, high, k, above);
        for (int j = 0; j < m; ++j) {
            if (not_below[j] < k) ++counts[not_below[j]];
            unsure[begin + j] = not_below[j] > above[j] || v[j] != v[j];
        }
    }
}

std::int64_t screen(const float* x, std::int64_t n, const float* low, const float* high,
                    std::int64_t k, std::int64_t* counts, std::uint8_t* unsure) {
    for (std::int64_t j = 0; j < n; ++j) unsure[j] = 0;
    if (k < SEARCH_FROM) {
        std::int64_t i = 0;
        for (; i + 6 <= k; i += 6) {
            screen_few<Floats, 6>(x, n, low + i, high + i, counts + i, unsure);
        }
        for (; i < k; ++i) screen_few<Floats, 1>(x, n, low + i, high + i, counts + i, unsure);
    } else {
        differences(counts, k);
        screen_by_search(x, n, low, high, k, counts, unsure);
        sums(counts, k);
    }
    std::int64_t total = 0;
    for (std::int64_t j = 0; j < n; ++j) total += unsure[j];
    return total;
}

void widen_f32(const float* scores, const float* offset, std::int64_t n, float* x) {
    for (std::int64_t j = 0; j < n; ++j) x[j] = offset[j] - scores[j];
}

void widen_bf16(const std::uint16_t* scores, const float* offset, std::int64_t n, float* x) {
    for (std::int64_t j = 0; j < n; ++j) {
        const std::uint32_t bits = std::uint32_t{scores[j]} << 16;
        float score;
        std::memcpy(&score, &bits, sizeof score);
        x[j] = offset[j] - score;
    }
}

inline double sum_of(double (&lanes)[DOT_LANES]) {
    for (int half = DOT_LANES / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
}

// Products of float32 are exact in float64, so that fusing them would change nothing. Those of
// float64 are rounded, in the same way at every level (-ffp-contract=off).
template <class T>
double dot(const T* a, const T* b, std::int64_t n) {
    double lanes[DOT_LANES] = {};
    std::int64_t i = 0;
    for (; i + DOT_LANES <= n; i += DOT_LANES) {
        for (int l = 0; l < DOT_LANES; ++l) {
            lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
        }
    }
    for (int l = 0; i < n; ++i, ++l) {
        lanes[l] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    return sum_of(lanes);
}

#include "simd_dots.hpp"

template <int WORDS>
inline void hamming_rows(const std::uint64_t* code, const std::uint64_t* codes, std::int64_t n,
                         std::int64_t words, std::uint16_t* out) {
    const std::int64_t width = WORDS > 0 ? WORDS : words;
    for (std::int64_t j = 0; j < n; ++j) {
        int bits = 0;
        for (std::int64_t w = 0; w < width; ++w) {
            bits += bits_set(code[w] ^ codes[j * width + w]);
        }
        out[j] = static_cast<std::uint16_t>(bits);
    }
}

void hamming(const std::uint64_t* code, const std::uint64_t* codes, std::int64_t n,
             std::int64_t words, std::uint16_t* out) {
    if (words == 1) return hamming_rows<1>(code, codes, n, words, out);
    if (words == 8) return hamming_rows<8>(code, codes, n, words, out);
    hamming_rows<0>(code, codes, n, words, out);
}

#include "simd_loss.hpp"

#include "simd_labels.hpp"

#include "simd_divergences.hpp"

const Simd SIMD = {
    &count_at_most<Floats>, &count_at_most<Doubles>, &screen,     &widen_f32, &widen_bf16,
    &dot<float>,            &dot<double>,            &dots<float>, &dots<double>, &hamming,
    &peak_of,               &soften,                 &mix_peers,  &learn,     &floats_of,
    &bf16_of,               &toss,                   &learn_labels, &add_logs, &gap_of,
    &mix_others,            &mixture_logs,           &pull,
};
