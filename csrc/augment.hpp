// Training batches from 8-bit images: gather, crop, mirror, normalise and erase in one pass.
#pragma once

#include <cstdint>
#include <functional>

namespace dml_fast {

// B crops of N images (N, H, W, C), each as large as the images.
struct Crops {
    const std::uint8_t* images;
    std::int64_t height, width, channels;
    std::int64_t batch;
    const std::int64_t* rows;    // (B,) which images
    const std::int64_t* crops;   // (3, B) top and left in the padded image, 1 where mirrored
    const std::int64_t* erased;  // (4, B) top, left, height, width of what is blanked; or null
    std::int64_t pad;            // on each side
    const float* scale;          // (C,)
    const float* shift;          // (C,)
};

// Writes (B, H, W, C): pixel * scale + shift, with product and sum each rounded to float as in
// torch; 0 outside the image and where it is erased. `interrupted` is as for parallel_for.
void augment(const Crops& crops, float* out, int threads,
             const std::function<bool()>& interrupted);

}  // namespace dml_fast
