#include "ranking.hpp"

#include <algorithm>
#include <atomic>
#include <limits>

#include "kernels.hpp"
#include "parallel.hpp"
#include "rows.hpp"

namespace dml_fast {

template <class T>
std::int64_t rank_rows(const T* dist, const Labels& labels, const RankOptions& options,
                       const RankOutput& out, const Poll& interrupted) {
    const Kernels& kernels = active_kernels();
    std::atomic<std::int64_t> nans{0};
    const std::int64_t chunks = (labels.queries + CHUNK - 1) / CHUNK;
    const auto make_worker = [&] {
        RowRanker<T> ranker(labels, kernels);
        SingleShotRanker<T> single_shot(
            labels, options.single_shot ? *options.single_shot : SingleShot{0, 0}, options.ties,
            options.max_rank);
        std::vector<double> not_wanted(static_cast<std::size_t>(options.max_rank));
        return [&, ranker, single_shot, not_wanted](std::int64_t chunk) mutable {
            double* first_at = out.first_at + chunk * options.max_rank;
            double* hits_at = out.hits_at + chunk * options.max_rank;
            const std::int64_t end = std::min(labels.queries, (chunk + 1) * CHUNK);
            for (std::int64_t query = chunk * CHUNK; query < end; ++query) {
                const T* row = dist + query * labels.items;
                double* scores = out.scores + query * SCORES;
                if (options.topk > 0) {
                    ranker.nearest(row, query, options.topk, out.nearest + query * options.topk);
                }
                if (!ranker.rank(row, query, options.ties == Ties::stable)) {
                    std::fill(scores, scores + SCORES, std::numeric_limits<double>::quiet_NaN());
                    continue;
                }
                nans += ranker.nans();
                double* first = options.single_shot ? not_wanted.data() : first_at;
                score_query(ranker.ranks(), options.ties, options.max_rank, scores, first,
                            hits_at);
                if (options.single_shot) single_shot.rank(row, query, first_at);
            }
        };
    };
    parallel_for(chunks, options.threads, interrupted, make_worker);
    return nans;
}

template std::int64_t rank_rows(const float*, const Labels&, const RankOptions&, const RankOutput&,
                                const Poll&);
template std::int64_t rank_rows(const double*, const Labels&, const RankOptions&,
                                const RankOutput&, const Poll&);

}  // namespace dml_fast
