#include "rows.hpp"

#include <algorithm>
#include <cmath>

namespace dml_fast {

template <class T>
bool RowRanker<T>::gather(const T* row, std::int64_t query) {
    positives_.clear();
    excluded_.clear();
    for (const auto* item = labels_.same_begin(query); item != labels_.same_end(query); ++item) {
        auto& kind = labels_.excluded(query, *item) ? excluded_ : positives_;
        kind.push_back({row[*item], *item});
    }
    std::sort(positives_.begin(), positives_.end());
    return !positives_.empty();
}

// The row is counted whole, and what is no "other" (positives, excluded items, junk) is counted
// apart and taken off: the long loop then has no branches and no index.
template <class T>
void RowRanker<T>::count(const T* row) {
    thresholds_.clear();
    for (std::size_t i = 0; i < positives_.size(); ++i) {
        const T value = positives_[i].value;
        if (std::isnan(value)) break;  // these are last
        if (i > 0 && value == positives_[i - 1].value) continue;
        // x < value as x <= the next number below; below -inf there is none.
        const T lowest = -std::numeric_limits<T>::infinity();
        thresholds_.push_back(value == lowest ? std::numeric_limits<T>::quiet_NaN()
                                              : std::nextafter(value, lowest));
        thresholds_.push_back(value);
    }
    thresholds_.push_back(std::numeric_limits<T>::infinity());  // all that are numbers

    apart_.clear();
    for (const Item& item : positives_) apart_.push_back(item.value);
    for (const Item& item : excluded_) apart_.push_back(item.value);
    for (std::int64_t j = 0; j < labels_.junk_count; ++j) apart_.push_back(row[labels_.junk[j]]);

    const auto k = static_cast<std::int64_t>(thresholds_.size());
    at_most_.assign(thresholds_.size(), 0);
    apart_at_most_.assign(thresholds_.size(), 0);
    kernels_.count_at_most(row, labels_.items, thresholds_.data(), k, at_most_.data());
    kernels_.count_at_most(apart_.data(), static_cast<std::int64_t>(apart_.size()),
                           thresholds_.data(), k, apart_at_most_.data());
    nans_ = labels_.items - at_most_.back();
    for (std::size_t i = 0; i < at_most_.size(); ++i) at_most_[i] -= apart_at_most_[i];
}

// For each positive of a group, its others with a smaller index: one more pass over the row.
template <class T>
void RowRanker<T>::count_others_before(const T* row, std::int64_t first, const TieGroup& group,
                                       T value) {
    const auto ties_with = [&](T x) { return compare(x, value) == 0; };
    std::int64_t begin = 0, tied = 0;
    for (std::int64_t i = 0; i < group.positives; ++i) {
        const std::int64_t end = positives_[static_cast<std::size_t>(first + i)].index;
        for (std::int64_t j = begin; j < end; ++j) tied += ties_with(row[j]);
        begin = end + 1;  // the positive itself is no other
        std::int64_t apart = 0;
        for (const Item& item : excluded_) apart += item.index < end && ties_with(item.value);
        for (std::int64_t j = 0; j < labels_.junk_count && labels_.junk[j] < end; ++j) {
            apart += ties_with(row[labels_.junk[j]]);
        }
        ranks_.others_before[static_cast<std::size_t>(first + i)] = tied - apart;
    }
}

template <class T>
bool RowRanker<T>::rank(const T* row, std::int64_t query, bool need_order_within_ties) {
    nans_ = 0;
    if (!gather(row, query)) return false;
    count(row);
    ranks_.groups.clear();
    ranks_.others_before.assign(positives_.size(), 0);
    const std::int64_t others =
        labels_.items - static_cast<std::int64_t>(apart_.size());
    std::size_t threshold = 0;
    for (std::size_t first = 0; first < positives_.size();) {
        std::size_t end = first + 1;
        const T value = positives_[first].value;
        while (end < positives_.size() && compare(positives_[end].value, value) == 0) ++end;
        // Others nearer than this group, and no farther than it.
        const std::int64_t nearer = std::isnan(value) ? at_most_.back() : at_most_[threshold];
        const std::int64_t up_to = std::isnan(value) ? others : at_most_[threshold + 1];
        threshold += 2;
        const TieGroup group{nearer + static_cast<std::int64_t>(first),
                             static_cast<std::int64_t>(end - first), up_to - nearer};
        if (need_order_within_ties && group.others > 0) {
            count_others_before(row, static_cast<std::int64_t>(first), group, value);
        }
        ranks_.groups.push_back(group);
        first = end;
    }
    return true;
}

template <class T>
void RowRanker<T>::nearest(const T* row, std::int64_t query, std::int64_t k, std::int64_t* out) {
    heap_.clear();  // the farthest on top
    if (k > 0) {
        const auto size = static_cast<std::size_t>(k);
        for (std::int64_t j = 0; j < labels_.items; ++j) {
            const bool full = heap_.size() == size;
            // At the same distance the earlier index stays.
            if (full && compare(row[j], heap_.front().value) >= 0) continue;
            if (!labels_.valid(query, j)) continue;
            if (full) {
                std::pop_heap(heap_.begin(), heap_.end());
                heap_.pop_back();
            }
            heap_.push_back({row[j], j});
            std::push_heap(heap_.begin(), heap_.end());
        }
        std::sort_heap(heap_.begin(), heap_.end());
    }
    std::fill(out, out + k, -1);
    for (std::size_t i = 0; i < heap_.size(); ++i) out[i] = heap_[i].index;
}

template class RowRanker<float>;
template class RowRanker<double>;

}  // namespace dml_fast
