// Parts of 8-bit RGB images, resized to one size with an antialiased triangle filter.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dml_fast {

// V parts of each of B images (h, w, 3) that differ in size.
struct Parts {
    struct Image {
        const std::uint8_t* pixels;
        std::int64_t height, width;
    };
    std::vector<Image> images;  // B
    std::int64_t views;
    const std::int64_t* boxes;   // (V, 4, B) top, left, height and width, inside the image
    std::int64_t height, width;  // of the results
};

// Writes (V, B, H, W, 3): rows are resized first and rounded to 8 bits, then columns, with weights
// of 22 bits. These are the pixels of Pillow's resize with Resampling.BILINEAR where Pillow takes
// rows first; newer versions sometimes begin with columns, which differs by 1. `interrupted` is as
// for parallel_for.
void resize_parts(const Parts& parts, std::uint8_t* out, int threads,
                  const std::function<bool()>& interrupted);

}  // namespace dml_fast
