// Distances of images reduced to distances of sets of images, row by row.
#pragma once

#include <cstdint>

#include "labels.hpp"
#include "ranking.hpp"

namespace dml_fast {

// The camera rule and junk apply to pairs of images, before these are reduced. The result is NaN
// for a pair of sets of which no pair of images is left.
enum class Reduction {
    min,
    mean,
    log_sum_exp,  // -temperature log mean exp(-d / temperature): between the two
};

struct Sets {
    std::int64_t count;           // S
    const std::int64_t* offsets;  // (S + 1)
    const std::int64_t* members;  // images by set
};

// `dist` is (Q, G) of the images of `labels`; `out` is (query sets, gallery sets).
void reduce_rows(const double* dist, const Labels& labels, const Sets& query_sets,
                 const Sets& gallery_sets, Reduction reduction, double temperature, double* out,
                 int threads, const Poll& interrupted);

}  // namespace dml_fast
