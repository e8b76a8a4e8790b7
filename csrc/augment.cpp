#include "augment.hpp"

#include <algorithm>
#include <vector>

#include "isa.hpp"
#include "parallel.hpp"

namespace dml_fast {
namespace {

// 2 ms of work: fewer values are done before a second thread would have started.
constexpr std::int64_t VALUES_PER_THREAD = 1 << 21;
constexpr std::int64_t IMAGES_PER_TASK = 8;

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

// `scale` and `shift` repeat those of the channels, so that this is a plain loop, which compilers
// turn into vector code.
ALWAYS_INLINE void normalize_body(const std::uint8_t* from, std::int64_t count, const float* scale,
                                  const float* shift, float* to) {
    for (std::int64_t i = 0; i < count; ++i)
        to[i] = static_cast<float>(from[i]) * scale[i] + shift[i];
}

void normalize_baseline(const std::uint8_t* from, std::int64_t count, const float* scale,
                        const float* shift, float* to) {
    normalize_body(from, count, scale, shift, to);
}

#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2"))) void normalize_avx2(const std::uint8_t* from, std::int64_t count,
                                                    const float* scale, const float* shift,
                                                    float* to) {
    normalize_body(from, count, scale, shift, to);
}
#endif

using Normalize = void (*)(const std::uint8_t*, std::int64_t, const float*, const float*, float*);

Normalize fastest() {
#if defined(__GNUC__) && defined(__x86_64__)
    if (active_isa() >= Isa::avx2) return normalize_avx2;
#endif
    return normalize_baseline;
}

template <int CHANNELS>
void reverse_pixels(const std::uint8_t* from, std::int64_t pixels, std::int64_t channels,
                    std::uint8_t* to) {
    const std::int64_t size = CHANNELS ? CHANNELS : channels;
    for (std::int64_t x = 0; x < pixels; ++x)
        for (std::int64_t c = 0; c < size; ++c)
            to[x * size + c] = from[(pixels - 1 - x) * size + c];
}

class Worker {
   public:
    Worker(const Crops& crops, float* out, Normalize normalize)
        : crops_(crops),
          out_(out),
          normalize_(normalize),
          values_(crops.width * crops.channels),
          scale_(static_cast<std::size_t>(values_)),
          shift_(static_cast<std::size_t>(values_)),
          reversed_(static_cast<std::size_t>(values_)) {
        for (std::int64_t i = 0; i < values_; ++i) {
            scale_[static_cast<std::size_t>(i)] = crops.scale[i % crops.channels];
            shift_[static_cast<std::size_t>(i)] = crops.shift[i % crops.channels];
        }
    }

    void operator()(std::int64_t task) {
        const std::int64_t end = std::min((task + 1) * IMAGES_PER_TASK, crops_.batch);
        for (std::int64_t b = task * IMAGES_PER_TASK; b < end; ++b) image(b);
    }

   private:
    void image(std::int64_t b) {
        const Crops& c = crops_;
        const std::int64_t down = c.crops[b] - c.pad, right = c.crops[c.batch + b] - c.pad;
        const bool mirrored = c.crops[2 * c.batch + b] != 0;
        // columns of the image that the crop shows
        const std::int64_t first = std::clamp<std::int64_t>(right, 0, c.width);
        const std::int64_t last = std::clamp<std::int64_t>(right + c.width, first, c.width);
        // and the column of the crop where they begin
        const std::int64_t begin = mirrored ? c.width - (last - right) : first - right;
        const std::uint8_t* image = c.images + c.rows[b] * c.height * values_;
        float* out = out_ + b * c.height * values_;
        for (std::int64_t y = 0; y < c.height; ++y, out += values_) {
            const std::int64_t line = y + down;
            if (line < 0 || line >= c.height || first == last) {
                std::fill(out, out + values_, 0.0f);
                continue;
            }
            const std::uint8_t* from = image + line * values_ + first * c.channels;
            const std::int64_t shown = (last - first) * c.channels;
            if (mirrored) from = reverse(from, last - first);
            float* to = out + begin * c.channels;
            std::fill(out, to, 0.0f);
            normalize_(from, shown, scale_.data(), shift_.data(), to);
            std::fill(to + shown, out + values_, 0.0f);
        }
        if (c.erased) erase(b);
    }

    const std::uint8_t* reverse(const std::uint8_t* from, std::int64_t pixels) {
        if (crops_.channels == 3)
            reverse_pixels<3>(from, pixels, 3, reversed_.data());
        else
            reverse_pixels<0>(from, pixels, crops_.channels, reversed_.data());
        return reversed_.data();
    }

    void erase(std::int64_t b) {
        const Crops& c = crops_;
        const std::int64_t top = c.erased[b], left = c.erased[c.batch + b],
                           tall = c.erased[2 * c.batch + b], wide = c.erased[3 * c.batch + b];
        float* line = out_ + (b * c.height + top) * values_ + left * c.channels;
        for (std::int64_t y = 0; y < tall; ++y, line += values_)
            std::fill(line, line + wide * c.channels, 0.0f);
    }

    const Crops& crops_;
    float* out_;
    Normalize normalize_;
    std::int64_t values_;  // of a row of an image
    std::vector<float> scale_, shift_;
    std::vector<std::uint8_t> reversed_;
};

}  // namespace

void augment(const Crops& crops, float* out, int threads,
             const std::function<bool()>& interrupted) {
    const Normalize normalize = fastest();
    const std::int64_t tasks = (crops.batch + IMAGES_PER_TASK - 1) / IMAGES_PER_TASK;
    const std::int64_t values = crops.batch * crops.height * crops.width * crops.channels;
    const auto useful =
        static_cast<int>(std::clamp<std::int64_t>(values / VALUES_PER_THREAD, 1, 1024));
    if (std::min(threads, useful) == 1) {
        Worker worker(crops, out, normalize);
        for (std::int64_t task = 0; task < tasks; ++task) worker(task);
        return;
    }
    parallel_for(tasks, std::min(threads, useful), interrupted,
                 [&] { return Worker(crops, out, normalize); });
}

}  // namespace dml_fast
