// Ranks of a query's positives from its row of distances: one pass, no sort of the row.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "labels.hpp"
#include "scores.hpp"
#include "simd.hpp"

namespace dml_fast {

// -1, 0 or 1 as a comes before b, ties with it, or after; NaN comes last and ties with NaN.
template <class T>
int compare(T a, T b) {
    if (a < b || (a == a && b != b)) return -1;
    if (a > b || (b == b && a != a)) return 1;
    return 0;
}

// One per thread: keeps its scratch memory from row to row.
template <class T>
class RowRanker {
  public:
    RowRanker(const Labels& labels, const Simd& simd) : labels_(labels), simd_(simd) {}

    // Fills ranks(). Returns false, and does nothing else, if the query has no positive.
    bool rank(const T* row, std::int64_t query, bool need_order_within_ties);

    // The k nearest valid items by (distance, index), NaN last; -1 where there are fewer.
    void nearest(const T* row, std::int64_t query, std::int64_t k, std::int64_t* out);

    const QueryRanks& ranks() const { return ranks_; }
    std::int64_t nans() const { return nans_; }  // in the row ranked last

  private:
    struct Item {
        T value;
        std::int64_t index;
        bool operator<(const Item& other) const {
            const int order = compare(value, other.value);
            return order < 0 || (order == 0 && index < other.index);
        }
    };

    bool gather(const T* row, std::int64_t query);
    void count(const T* row);
    Counted count_at_most(const T* row, std::vector<std::int64_t>& counts);
    void count_others_before(const T* row, std::int64_t first, const TieGroup& group, T value);

    const Labels& labels_;
    const Simd& simd_;
    std::vector<Item> positives_;
    std::vector<Item> excluded_;            // same identity, same camera
    std::vector<T> apart_;                  // distances of excluded items and junk
    std::vector<T> thresholds_;             // the distances of positives, without NaN
    std::vector<std::int64_t> ends_;        // positives up to each
    // Numbers of valid items that are no positives: below each threshold, and at most each.
    std::vector<std::int64_t> nearer_, up_to_;
    std::vector<std::int64_t> apart_at_most_;
    std::int64_t other_nans_ = 0;
    std::vector<Item> heap_;
    QueryRanks ranks_;
    std::int64_t nans_ = 0;
};

}  // namespace dml_fast
