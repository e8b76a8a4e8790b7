// Scores of all queries, from rows of distances.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "labels.hpp"
#include "parallel.hpp"
#include "scores.hpp"
#include "single_shot.hpp"

namespace dml_fast {

// Queries are scored in chunks. Sums over queries are kept per chunk and added up at the end, so
// that their bits depend neither on the number of threads nor on which thread finished first.
constexpr std::int64_t CHUNK = 16;

struct RankOptions {
    Ties ties;
    std::int64_t max_rank;  // at least 1
    std::int64_t topk;      // 0: none
    const SingleShot* single_shot;  // null: all gallery images of an identity count
    int threads;
};

// Borrowed arrays; N chunks. The caller sets first_at and hits_at to zero.
struct RankOutput {
    double* scores;         // (Q, SCORES), NaN for a query without a valid positive
    double* first_at;       // (N, max_rank): queries whose first positive has rank r + 1
    double* hits_at;        // (N, max_rank): queries with a positive at rank r + 1
    std::int64_t* nearest;  // (Q, topk)
};

// Asked now and then by the calling thread; true ends the work with Interrupted.
using Poll = std::function<bool()>;

// Scores every query, chunks in parallel. `make_source()` gives each thread its own source S:
//     bool S::rank(query, bool order_within_ties)    fills S::ranks(); false: no positive
//     void S::nearest(query, k, out)                 as RowRanker::nearest
//     const T* S::row(query)                         the query's distances
template <class T, class MakeSource>
void score_queries(const Labels& labels, const RankOptions& options, const RankOutput& out,
                   const Poll& interrupted, const MakeSource& make_source) {
    const std::int64_t max_rank = options.max_rank;
    parallel_for((labels.queries + CHUNK - 1) / CHUNK, options.threads, interrupted, [&] {
        SingleShotRanker<T> single_shot(
            labels, options.single_shot ? *options.single_shot : SingleShot{0, 0}, options.ties,
            max_rank);
        std::vector<double> not_wanted(static_cast<std::size_t>(max_rank));
        return [&, source = make_source(), single_shot, not_wanted](std::int64_t chunk) mutable {
            double* first_at = out.first_at + chunk * max_rank;
            double* hits_at = out.hits_at + chunk * max_rank;
            const std::int64_t end = std::min(labels.queries, (chunk + 1) * CHUNK);
            for (std::int64_t query = chunk * CHUNK; query < end; ++query) {
                double* scores = out.scores + query * SCORES;
                if (options.topk > 0) {
                    source.nearest(query, options.topk, out.nearest + query * options.topk);
                }
                if (!source.rank(query, options.ties == Ties::stable)) {
                    std::fill(scores, scores + SCORES, std::numeric_limits<double>::quiet_NaN());
                    continue;
                }
                score_query(source.ranks(), options.ties, max_rank, scores,
                            options.single_shot ? not_wanted.data() : first_at, hits_at);
                if (options.single_shot) single_shot.rank(source.row(query), query, first_at);
            }
        };
    });
}

// `dist` is (Q, G), by rows. Returns how many NaNs the rows of scored queries hold.
template <class T>
std::int64_t rank_rows(const T* dist, const Labels& labels, const RankOptions& options,
                       const RankOutput& out, const Poll& interrupted);

}  // namespace dml_fast
