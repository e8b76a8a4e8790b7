// Retrieval metrics of one query from the ranks of its positives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dml_fast {

// The order of items at the same distance: by gallery index; the mean over all orders; positives
// first; positives last.
enum class Ties { stable, expected, optimistic, pessimistic };

// Positives of a query at the same distance, and what is known of the other valid gallery items.
struct TieGroup {
    std::int64_t before;     // valid items strictly nearer, positives included
    std::int64_t positives;  // at this distance, at least 1
    std::int64_t others;     // valid items at this distance that are not positives
};

struct QueryRanks {
    std::vector<TieGroup> groups;  // nearest first
    // For each positive, by group and then gallery index: how many `others` of its group have a
    // smaller index. Read only for Ties::stable, and only where the group has others.
    std::vector<std::int64_t> others_before;

    std::int64_t positives() const {
        std::int64_t total = 0;
        for (const TieGroup& group : groups) total += group.positives;
        return total;
    }
};

// Names and order of a query's scores; see scores.cpp for each definition.
enum Score {
    AP,
    AP_TRAPEZOID,
    INP,
    FIRST_RANK,
    RECIPROCAL_RANK,
    R_PRECISION,
    MAP_AT_R,
    TIED,  // 1 where another order of tied items would give other scores
    SCORES
};

// Scores of one query with at least one positive, into scores[SCORES]. Adds to
// first_at[r] the probability that the first positive has rank r + 1, and to
// hits_at[r] that any positive has (r < max_rank).
void score_query(const QueryRanks& ranks, Ties ties, std::int64_t max_rank, double* scores,
                 double* first_at, double* hits_at);

// The scores of P = `count` positives whose ranks, counted from 1, are known.
// Throws std::invalid_argument if there is none, or if they are out of order or below 1.
void score_ranks(const std::int64_t* ranks, std::size_t count, double* scores);

}  // namespace dml_fast
