#include "resize.hpp"

#include <algorithm>
#include <cmath>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.hpp"
#include "parallel.hpp"

namespace dml_fast {
namespace {

constexpr int BITS = 22;  // of a weight: the sum of products with 8-bit pixels fits into 32
constexpr std::int32_t HALF = 1 << (BITS - 1);
constexpr int CHANNELS = 3;

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

ALWAYS_INLINE std::uint8_t rounded(std::int32_t sum) {
    return static_cast<std::uint8_t>(std::min(sum >> BITS, 255));
}

// The weights of the inputs of each output, in Pillow's arithmetic, and zeros: equally many for all.
struct Filter {
    void make(std::int64_t from, std::int64_t to) {
        const double scale = static_cast<double>(from) / static_cast<double>(to);
        const double support = std::max(scale, 1.0);
        first.resize(static_cast<std::size_t>(to));
        last_.resize(static_cast<std::size_t>(to));
        taps = 1;
        for (std::int64_t i = 0; i < to; ++i) {
            const double centre = (static_cast<double>(i) + 0.5) * scale;
            const auto at = static_cast<std::size_t>(i);
            first[at] = std::max<std::int64_t>(static_cast<std::int64_t>(centre - support + 0.5), 0);
            last_[at] = std::min(static_cast<std::int64_t>(centre + support + 0.5), from);
            taps = std::max(taps, last_[at] - first[at]);
        }
        weights.assign(static_cast<std::size_t>(to * taps), 0);
        exact_.resize(static_cast<std::size_t>(taps));
        for (std::int64_t i = 0; i < to; ++i) {
            const auto at = static_cast<std::size_t>(i);
            const double centre = (static_cast<double>(i) + 0.5) * scale, step = 1.0 / support;
            const std::int64_t count = last_[at] - first[at];
            double sum = 0.0;
            for (std::int64_t t = 0; t < count; ++t) {
                const double away =
                    std::abs((static_cast<double>(t + first[at]) - centre + 0.5) * step);
                exact_[static_cast<std::size_t>(t)] = away < 1.0 ? 1.0 - away : 0.0;
                sum += exact_[static_cast<std::size_t>(t)];
            }
            const double one = sum != 0.0 ? 1.0 / sum : 1.0;
            // the zeros come first where they would be outside
            const std::int64_t begin = std::min(first[at], from - taps);
            std::int32_t* w = weights.data() + i * taps + (first[at] - begin);
            for (std::int64_t t = 0; t < count; ++t) {
                const double weight = exact_[static_cast<std::size_t>(t)] * one;
                w[t] = static_cast<std::int32_t>(0.5 + weight * (1 << BITS));
            }
            first[at] = begin;
        }
    }

    std::int64_t taps = 0;
    std::vector<std::int64_t> first;    // (to,) the first input of each output
    std::vector<std::int32_t> weights;  // (to, taps)

   private:
    std::vector<std::int64_t> last_;
    std::vector<double> exact_;
};

ALWAYS_INLINE void row_body(const std::uint8_t* from, const Filter& filter, std::int64_t width,
                            std::uint8_t* to) {
    const std::int64_t taps = filter.taps;
    const std::int32_t* w = filter.weights.data();
    const std::int64_t* first = filter.first.data();
    for (std::int64_t x = 0; x < width; ++x, w += taps) {
        const std::uint8_t* p = from + first[x] * CHANNELS;
        for (int c = 0; c < CHANNELS; ++c) {
            std::int32_t sum = HALF;
            for (std::int64_t t = 0; t < taps; ++t) sum += p[t * CHANNELS + c] * w[t];
            to[x * CHANNELS + c] = rounded(sum);
        }
    }
}

#if defined(__GNUC__) && defined(__x86_64__)
// The same with a pixel and the byte behind it in a vector, which compilers do not find: reads one
// byte past the row, and writes one. TAPS is 0 where the number is not known before.
template <int TAPS>
__attribute__((target("avx2"))) inline void row_pixels(const std::uint8_t* from,
                                                       const Filter& filter, std::int64_t width,
                                                       std::uint8_t* to) {
    const std::int64_t taps = TAPS ? TAPS : filter.taps;
    const std::int32_t* w = filter.weights.data();
    const std::int64_t* first = filter.first.data();
    for (std::int64_t x = 0; x < width; ++x, w += taps, to += CHANNELS) {
        const std::uint8_t* p = from + first[x] * CHANNELS;
        __m128i sum = _mm_set1_epi32(HALF);
        for (std::int64_t t = 0; t < taps; ++t) {
            const __m128i pixel = _mm_cvtepu8_epi32(_mm_loadu_si32(p + t * CHANNELS));
            sum = _mm_add_epi32(sum, _mm_mullo_epi32(pixel, _mm_set1_epi32(w[t])));
        }
        sum = _mm_srai_epi32(sum, BITS);
        sum = _mm_packus_epi32(sum, sum);
        _mm_storeu_si32(to, _mm_packus_epi16(sum, sum));
    }
}
#endif

template <int TAPS>
ALWAYS_INLINE void column_body(const std::uint8_t* const* rows, const std::int32_t* w,
                               std::int64_t values, std::uint8_t* __restrict to) {
    const std::uint8_t* from[TAPS];
    std::int32_t weight[TAPS];
    std::copy(rows, rows + TAPS, from);
    std::copy(w, w + TAPS, weight);
    for (std::int64_t i = 0; i < values; ++i) {
        std::int32_t sum = HALF;
        for (int t = 0; t < TAPS; ++t) sum += from[t][i] * weight[t];
        to[i] = rounded(sum);
    }
}

ALWAYS_INLINE void long_column_body(const std::uint8_t* const* rows, const std::int32_t* w,
                                    std::int64_t taps, std::int64_t values, std::int32_t* sums,
                                    std::uint8_t* to) {
    std::fill(sums, sums + values, HALF);
    for (std::int64_t t = 0; t < taps; ++t) {
        const std::uint8_t* row = rows[t];
        const std::int32_t weight = w[t];
        for (std::int64_t i = 0; i < values; ++i) sums[i] += row[i] * weight;
    }
    for (std::int64_t i = 0; i < values; ++i) to[i] = rounded(sums[i]);
}

ALWAYS_INLINE void any_column(const std::uint8_t* const* rows, const std::int32_t* w,
                              std::int64_t taps, std::int64_t values, std::int32_t* sums,
                              std::uint8_t* to) {
    switch (taps) {
        case 2:
            return column_body<2>(rows, w, values, to);
        case 3:
            return column_body<3>(rows, w, values, to);
        case 4:
            return column_body<4>(rows, w, values, to);
        default:
            return long_column_body(rows, w, taps, values, sums, to);
    }
}

struct Passes {
    void (*row)(const std::uint8_t*, const Filter&, std::int64_t, std::uint8_t*);
    void (*column)(const std::uint8_t* const*, const std::int32_t*, std::int64_t, std::int64_t,
                   std::int32_t*, std::uint8_t*);
};

void row_baseline(const std::uint8_t* from, const Filter& filter, std::int64_t width,
                  std::uint8_t* to) {
    row_body(from, filter, width, to);
}

void column_baseline(const std::uint8_t* const* rows, const std::int32_t* w, std::int64_t taps,
                     std::int64_t values, std::int32_t* sums, std::uint8_t* to) {
    any_column(rows, w, taps, values, sums, to);
}

#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2"))) void row_avx2(const std::uint8_t* from, const Filter& filter,
                                              std::int64_t width, std::uint8_t* to) {
    switch (filter.taps) {
        case 2:
            return row_pixels<2>(from, filter, width, to);
        case 3:
            return row_pixels<3>(from, filter, width, to);
        case 4:
            return row_pixels<4>(from, filter, width, to);
        default:
            return row_pixels<0>(from, filter, width, to);
    }
}

__attribute__((target("avx2"))) void column_avx2(const std::uint8_t* const* rows,
                                                 const std::int32_t* w, std::int64_t taps,
                                                 std::int64_t values, std::int32_t* sums,
                                                 std::uint8_t* to) {
    any_column(rows, w, taps, values, sums, to);
}
#endif

Passes fastest() {
#if defined(__GNUC__) && defined(__x86_64__)
    if (active_isa() >= Isa::avx2) return {row_avx2, column_avx2};
#endif
    return {row_baseline, column_baseline};
}

class Worker {
   public:
    Worker(const Parts& parts, std::uint8_t* out, Passes passes)
        : parts_(parts),
          out_(out),
          passes_(passes),
          values_(parts.width * CHANNELS),
          sums_(static_cast<std::size_t>(values_)) {}

    void operator()(std::int64_t item) {  // all views of an image: it stays in the cache
        for (std::int64_t view = 0; view < parts_.views; ++view) part(view, item);
    }

   private:
    void part(std::int64_t view, std::int64_t b) {
        const Parts::Image& image = parts_.images[static_cast<std::size_t>(b)];
        const auto batch = static_cast<std::int64_t>(parts_.images.size());
        const std::int64_t* box = parts_.boxes + view * 4 * batch + b;
        const std::int64_t top = box[0], left = box[batch], tall = box[2 * batch],
                           wide = box[3 * batch];
        across_.make(wide, parts_.width);
        down_.make(tall, parts_.height);
        // the rows of the part that one row of the result needs, each resized once
        const std::int64_t taps = down_.taps, stride = values_ + 1;
        ring_.resize(static_cast<std::size_t>(taps * stride));
        rows_.resize(static_cast<std::size_t>(taps));
        std::int64_t done = 0;
        std::uint8_t* out = out_ + (view * batch + b) * parts_.height * values_;
        for (std::int64_t y = 0; y < parts_.height; ++y, out += values_) {
            const std::int64_t first = down_.first[static_cast<std::size_t>(y)];
            for (; done < first + taps; ++done)
                row(image, top + done, left, wide, ring_.data() + done % taps * stride);
            for (std::int64_t t = 0; t < taps; ++t)
                rows_[static_cast<std::size_t>(t)] = ring_.data() + (first + t) % taps * stride;
            passes_.column(rows_.data(), down_.weights.data() + y * taps, taps, values_,
                           sums_.data(), out);
        }
        leave_if_stopped();
    }

    void row(const Parts::Image& image, std::int64_t line, std::int64_t left, std::int64_t wide,
             std::uint8_t* to) {
        const std::uint8_t* from = image.pixels + (line * image.width + left) * CHANNELS;
        if (line + 1 == image.height && left + wide == image.width) {
            last_.assign(from, from + wide * CHANNELS);  // nothing may be read behind the image
            last_.push_back(0);
            from = last_.data();
        }
        passes_.row(from, across_, parts_.width, to);
    }

    const Parts& parts_;
    std::uint8_t* out_;
    Passes passes_;
    std::int64_t values_;  // of a row of a result
    Filter across_, down_;
    std::vector<std::int32_t> sums_;
    std::vector<std::uint8_t> ring_, last_;
    std::vector<const std::uint8_t*> rows_;
};

}  // namespace

void resize_parts(const Parts& parts, std::uint8_t* out, int threads,
                  const std::function<bool()>& interrupted) {
    const Passes passes = fastest();
    parallel_for(static_cast<std::int64_t>(parts.images.size()), threads, interrupted,
                 [&] { return Worker(parts, out, passes); });
}

}  // namespace dml_fast
