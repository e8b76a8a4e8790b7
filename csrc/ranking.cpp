#include "ranking.hpp"

#include <stdexcept>
#include <string>

namespace dml_fast {

QueryScores score_ranks(const std::int64_t* ranks, std::size_t count) {
    if (count == 0) {
        throw std::invalid_argument(
            "ranks is empty: a query without positives has no scores, leave it out");
    }
    double at_hits = 0.0;
    double trapezoids = 0.0;
    std::int64_t previous = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t rank = ranks[i];
        if (rank <= previous) {
            throw std::invalid_argument(
                "ranks must rise strictly from 1 or more, but ranks[" + std::to_string(i) +
                "] = " + std::to_string(rank) +
                (i == 0 ? "" : " follows " + std::to_string(previous)));
        }
        previous = rank;
        const double hits = static_cast<double>(i + 1);
        const double precision = hits / static_cast<double>(rank);
        // One place above the hit the precision was (hits - 1) / (rank - 1); the official code
        // starts from 1 where there is no such place.
        const double above = rank == 1 ? 1.0 : (hits - 1.0) / static_cast<double>(rank - 1);
        at_hits += precision;
        trapezoids += 0.5 * (above + precision);
    }
    const double positives = static_cast<double>(count);
    return {at_hits / positives, trapezoids / positives, positives / static_cast<double>(previous)};
}

}  // namespace dml_fast
