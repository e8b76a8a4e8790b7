// Converts the arguments of augment() and resize_parts() and checks that they stay inside their
// arrays.
#include "augment.hpp"
#include "bindings.hpp"
#include "resize.hpp"

namespace dml_fast {
namespace {

void check_numbers(const Crops& crops, std::int64_t images) {
    const std::int64_t n = crops.batch;
    require(std::all_of(crops.rows, crops.rows + n,
                        [&](std::int64_t row) { return 0 <= row && row < images; }),
            "rows must be indices of the images");
    require(std::all_of(crops.crops, crops.crops + 2 * n,
                        [&](std::int64_t at) { return 0 <= at && at <= 2 * crops.pad; }),
            "crops must begin at 0..2 pad");
    if (!crops.erased) return;
    for (int side = 0; side < 2; ++side) {
        const std::int64_t limit = side ? crops.width : crops.height;
        const std::int64_t* start = crops.erased + side * n;
        const std::int64_t* size = crops.erased + (side + 2) * n;
        for (std::int64_t b = 0; b < n; ++b)
            require(0 <= start[b] && 0 <= size[b] && size[b] <= limit &&
                        start[b] <= limit - size[b],
                    "erased rectangles must lie in the images");
    }
}

Array<float> augment_of(const Array<std::uint8_t>& images, const Ints& rows, const Ints& crops,
                        const Ints& erased, const Array<float>& scale, const Array<float>& shift,
                        std::int64_t pad, int threads) {
    require(images.ndim() == 4, "images must be (N, H, W, C)");
    Crops work{};
    work.images = images.data();
    work.height = images.shape(1);
    work.width = images.shape(2);
    work.channels = images.shape(3);
    work.rows = data_of(rows, "rows", 1);
    work.batch = rows.size();
    work.crops = data_of(crops, "crops", 2);
    work.scale = data_of(scale, "scale", 1);
    work.shift = data_of(shift, "shift", 1);
    work.pad = pad;
    require(pad >= 0 && crops.shape(0) == 3 && crops.shape(1) == work.batch,
            "crops must be (3, B) for B rows, and pad at least 0");
    require(scale.size() == work.channels && shift.size() == work.channels && work.channels > 0,
            "scale and shift must have a value for each channel");
    const std::int64_t* rectangles = data_of(erased, "erased", 2);
    require(erased.shape(0) == 4 && (erased.shape(1) == work.batch || erased.shape(1) == 0),
            "erased must be (4, B), or (4, 0) for none");
    work.erased = erased.shape(1) ? rectangles : nullptr;
    check_numbers(work, images.shape(0));
    Array<float> out({work.batch, work.height, work.width, work.channels});
    float* data = out.mutable_data();
    without_gil([&] { augment(work, data, threads, signalled); });
    return out;
}

Array<std::uint8_t> resize_parts_of(const std::vector<Array<std::uint8_t>>& images,
                                    const Ints& boxes, std::int64_t height, std::int64_t width,
                                    int threads) {
    Parts work{};
    const auto batch = static_cast<std::int64_t>(images.size());
    require(boxes.ndim() == 3 && boxes.shape(1) == 4 && boxes.shape(2) == batch,
            "boxes must be (V, 4, B) for B images");
    require(0 < height && 0 < width && height <= (1 << 20) && width <= (1 << 20),
            "height and width must be 1..1048576");
    work.views = boxes.shape(0);
    work.boxes = boxes.data();
    work.height = height;
    work.width = width;
    for (const Array<std::uint8_t>& image : images) {
        require(image.ndim() == 3 && image.shape(2) == 3, "images must be (h, w, 3)");
        work.images.push_back({image.data(), image.shape(0), image.shape(1)});
    }
    for (std::int64_t view = 0; view < work.views; ++view)
        for (int side = 0; side < 2; ++side)
            for (std::int64_t b = 0; b < batch; ++b) {
                const Parts::Image& image = work.images[static_cast<std::size_t>(b)];
                const std::int64_t limit = side ? image.width : image.height;
                const std::int64_t start = work.boxes[(view * 4 + side) * batch + b];
                const std::int64_t size = work.boxes[(view * 4 + side + 2) * batch + b];
                require(0 <= start && 0 < size && size <= limit && start <= limit - size,
                        "boxes must lie in the images");
            }
    Array<std::uint8_t> out({work.views, batch, height, width, std::int64_t{3}});
    std::uint8_t* data = out.mutable_data();
    without_gil([&] { resize_parts(work, data, threads, signalled); });
    return out;
}

}  // namespace

void define_augment(py::module_& module) {
    module.def("augment", &augment_of, py::arg("images").noconvert(), py::arg("rows").noconvert(),
               py::arg("crops").noconvert(), py::arg("erased").noconvert(),
               py::arg("scale").noconvert(), py::arg("shift").noconvert(), py::arg("pad"),
               py::arg("threads"));
    module.def("resize_parts", &resize_parts_of, py::arg("images").noconvert(),
               py::arg("boxes").noconvert(), py::arg("height"), py::arg("width"),
               py::arg("threads"));
}

}  // namespace dml_fast
