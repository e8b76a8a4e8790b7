// Ranking of packed binary codes by the number of bits that differ: two histograms, no sort.
#pragma once

#include <cstdint>

#include "labels.hpp"
#include "ranking.hpp"

namespace dml_fast {

// `queries` is (Q, words), `gallery` (G, words); at most 65,535 bits. There must be no junk.
void rank_codes(const std::uint64_t* queries, const std::uint64_t* gallery, std::int64_t words,
                const Labels& labels, const RankOptions& options, const RankOutput& out,
                const Poll& interrupted);

}  // namespace dml_fast
