// Retrieval metrics from the ranks of a query's positives. No Python here: see bindings.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dml_fast {

struct QueryScores {
    double average_precision;            // mean of the precision at each positive
    double average_precision_trapezoid;  // the official Market-1501 definition
    double inverse_negative_penalty;     // P / rank of the last positive
};

// Scores of one query. `ranks` holds the P = `count` ranks of its positives among its valid
// gallery items, counted from 1 and strictly rising.
// Throws std::invalid_argument if there is none, or if they are out of order or below 1.
QueryScores score_ranks(const std::int64_t* ranks, std::size_t count);

}  // namespace dml_fast
