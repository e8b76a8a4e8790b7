// Scores of all queries, from rows of distances. No Python here: see bindings.cpp.
#pragma once

#include <cstdint>
#include <functional>

#include "labels.hpp"
#include "scores.hpp"
#include "single_shot.hpp"

namespace dml_fast {

// Queries are scored in chunks. Sums over queries are kept per chunk and added up at the end, so
// that their bits depend neither on the number of threads nor on who was done first.
constexpr std::int64_t CHUNK = 16;

struct RankOptions {
    Ties ties;
    std::int64_t max_rank;  // at least 1
    std::int64_t topk;      // 0: none
    const SingleShot* single_shot;  // null: all gallery images of an identity count
    int threads;
};

// Borrowed; N chunks. Zeroed by the caller, but for scores and nearest.
struct RankOutput {
    double* scores;         // (Q, SCORES), NaN for a query without a valid positive
    double* first_at;       // (N, max_rank): queries whose first positive has rank r + 1
    double* hits_at;        // (N, max_rank): queries with a positive at rank r + 1
    std::int64_t* nearest;  // (Q, topk)
};

// Asked now and then by the calling thread; true ends the work with Interrupted.
using Poll = std::function<bool()>;

// `dist` is (Q, G), by rows. Returns how many NaNs the rows of scored queries hold.
template <class T>
std::int64_t rank_rows(const T* dist, const Labels& labels, const RankOptions& options,
                       const RankOutput& out, const Poll& interrupted);

}  // namespace dml_fast
