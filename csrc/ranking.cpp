#include "ranking.hpp"

#include <atomic>

#include "rows.hpp"
#include "simd.hpp"

namespace dml_fast {

namespace {

template <class T>
struct RowSource {
    RowRanker<T> ranker;
    const T* dist;
    const Labels& labels;
    std::atomic<std::int64_t>& nans;

    const T* row(std::int64_t query) const { return dist + query * labels.items; }
    const QueryRanks& ranks() const { return ranker.ranks(); }
    bool rank(std::int64_t query, bool order_within_ties) {
        if (query + 1 < labels.queries) {  // its few matches lie anywhere in the next row
            const auto* end = labels.same_end(query + 1);
            for (const auto* m = labels.same_begin(query + 1); m != end; ++m) {
                prefetch(row(query + 1) + *m);
            }
        }
        const bool scored = ranker.rank(row(query), query, order_within_ties);
        nans += ranker.nans();
        return scored;
    }
    void nearest(std::int64_t query, std::int64_t k, std::int64_t* out) {
        ranker.nearest(row(query), query, k, out);
    }
};

}  // namespace

template <class T>
std::int64_t rank_rows(const T* dist, const Labels& labels, const RankOptions& options,
                       const RankOutput& out, const Poll& interrupted) {
    const Simd& simd = active_simd();
    std::atomic<std::int64_t> nans{0};
    score_queries<T>(labels, options, out, interrupted, [&] {
        return RowSource<T>{RowRanker<T>(labels, simd), dist, labels, nans};
    });
    return nans;
}

template std::int64_t rank_rows(const float*, const Labels&, const RankOptions&, const RankOutput&,
                                const Poll&);
template std::int64_t rank_rows(const double*, const Labels&, const RankOptions&,
                                const RankOutput&, const Poll&);

}  // namespace dml_fast
