// The part of FeatureRanker (features.hpp) that prepares what is multiplied.
#include "operands.hpp"

#include "features.hpp"
#include "parallel.hpp"

namespace dml_fast {

template <class T>
template <class S>
void FeatureRanker<T>::query_operands(S* out, bool loose, int threads, const Poll& interrupted) {
    const std::int64_t dims = features_.dims;
    parallel_for(static_cast<std::int64_t>(started_.size()), threads, interrupted, [&] {
        return [&](std::int64_t i) {
            Query& query = started_[static_cast<std::size_t>(i)];
            const std::int64_t q = begin_ + i;
            if (!usable(query_norms_[static_cast<std::size_t>(q)])) {
                for (std::int64_t d = 0; d < dims; ++d) store_nan(out + i * dims + d);
                query.operand_norm = query.slip = 0.0;
                return;
            }
            const Rounded rounded = round_row(features_.queries + q * dims, dims, query_scale(q),
                                              loose, out + i * dims);
            query.operand_norm = rounded.norm;
            query.slip = rounded.slip;
        };
    });
}

template <class T>
template <class S>
void FeatureRanker<T>::panel_operands(std::int64_t begin, std::int64_t end, S* out, bool loose,
                                      int threads, const Poll& interrupted) {
    const std::int64_t dims = features_.dims;
    const std::int64_t count = end - begin;
    std::vector<Rounded> rounded(static_cast<std::size_t>(count));
    panel_.begin = begin;
    panel_.end = end;
    panel_.offset.assign(static_cast<std::size_t>(count), 0.0f);
    panel_.result_rounding = sizeof(S) == 2 ? 1.01 / 256 : 0.0;  // 8 bits, rounded to nearest
    parallel_for((count + FEATURE_ROWS - 1) / FEATURE_ROWS, threads, interrupted, [&] {
        return [&](std::int64_t piece) {
            const std::int64_t stop = std::min(count, (piece + 1) * FEATURE_ROWS);
            for (std::int64_t i = piece * FEATURE_ROWS; i < stop; ++i) {
                const std::int64_t item = begin + i;
                const double squared = item_norms_[static_cast<std::size_t>(item)];
                float& offset = panel_.offset[static_cast<std::size_t>(i)];
                S* row = out + i * dims;
                if (usable(squared)) {
                    rounded[static_cast<std::size_t>(i)] = round_row(
                        features_.gallery + item * dims, dims, item_scale(item), loose, row);
                    if (features_.metric == Metric::euclidean) {
                        offset = static_cast<float>(0.5 * squared * query_power_ * item_power_);
                    }
                } else {  // a tile of NaNs: every pair is unsure
                    for (std::int64_t d = 0; d < dims; ++d) store_nan(row + d);
                    rounded[static_cast<std::size_t>(i)] = {0.0, 0.0};
                }
                if (labels_.item_identity[item] < 0) {
                    offset = std::numeric_limits<float>::infinity();
                }
            }
        };
    });
    panel_.operand_norm = panel_.slip = panel_.offset_size = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
        const Rounded& row = rounded[static_cast<std::size_t>(i)];
        const double offset = panel_.offset[static_cast<std::size_t>(i)];
        panel_.operand_norm = std::max(panel_.operand_norm, row.norm);
        panel_.slip = std::max(panel_.slip, row.slip);
        if (std::isfinite(offset)) panel_.offset_size = std::max(panel_.offset_size, offset);
    }
}

#define INSTANTIATE(T, S)                                                                    \
    template void FeatureRanker<T>::query_operands(S*, bool, int, const Poll&);              \
    template void FeatureRanker<T>::panel_operands(std::int64_t, std::int64_t, S*, bool, int, \
                                                   const Poll&);
INSTANTIATE(float, float)
INSTANTIATE(float, std::uint16_t)
INSTANTIATE(double, float)
INSTANTIATE(double, std::uint16_t)
#undef INSTANTIATE

}  // namespace dml_fast
