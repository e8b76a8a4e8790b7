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

// How many of the row, apart from what is in apart_, are at most each threshold. The row is counted
// whole and the others are taken off: the long loop then has no branches and no index.
template <class T>
Counted RowRanker<T>::count_at_most(const T* row, std::vector<std::int64_t>& counts) {
    const std::size_t k = thresholds_.size();
    const auto count = [&](const T* x, std::int64_t n, std::vector<std::int64_t>& out) {
        out.assign(k, 0);
        return simd_.count_at_most(x, n, thresholds_.data(), static_cast<std::int64_t>(k),
                                      out.data());
    };
    const Counted found = count(row, labels_.items, counts);
    nans_ = found.nans;
    if (apart_.empty()) return found;
    const Counted apart =
        count(apart_.data(), static_cast<std::int64_t>(apart_.size()), apart_at_most_);
    for (std::size_t i = 0; i < k; ++i) counts[i] -= apart_at_most_[i];
    return {found.equal - apart.equal, found.nans - apart.nans};
}

template <class T>
void RowRanker<T>::count(const T* row) {
    thresholds_.clear();
    ends_.clear();
    std::int64_t numbers = 0;
    for (const Item& item : positives_) {
        if (std::isnan(item.value)) break;  // these are last
        ++numbers;
        if (!thresholds_.empty() && item.value == thresholds_.back()) {
            ends_.back() = numbers;
        } else {
            thresholds_.push_back(item.value);
            ends_.push_back(numbers);
        }
    }
    if (thresholds_.empty()) thresholds_.push_back(0);  // only NaNs are counted

    apart_.clear();
    for (const Item& item : excluded_) apart_.push_back(item.value);
    for (std::int64_t j = 0; j < labels_.junk_count; ++j) apart_.push_back(row[labels_.junk[j]]);

    const Counted found = count_at_most(row, up_to_);
    other_nans_ = found.nans - (static_cast<std::int64_t>(positives_.size()) - numbers);
    for (std::size_t i = 0; i < ends_.size(); ++i) up_to_[i] -= ends_[i];
    if (found.equal == numbers) {  // no other ties with a positive, as in most rows
        nearer_ = up_to_;
        return;
    }
    const T lowest = -std::numeric_limits<T>::infinity();
    for (T& value : thresholds_) {
        // x < value as x <= the next number below; below -inf there is none.
        value = value == lowest ? std::numeric_limits<T>::quiet_NaN()
                                : std::nextafter(value, lowest);
    }
    count_at_most(row, nearer_);
    for (std::size_t i = 1; i < ends_.size(); ++i) nearer_[i] -= ends_[i - 1];
}

// For each positive of a group, its others with a smaller index: one more pass over the row.
template <class T>
void RowRanker<T>::count_others_before(const T* row, std::int64_t first, const TieGroup& group,
                                       T value) {
    const auto ties_with = [&](T x) { return compare(x, value) == 0; };
    std::int64_t begin = 0, tied = 0;
    for (std::int64_t i = first; i < first + group.positives; ++i) {
        const std::int64_t end = positives_[static_cast<std::size_t>(i)].index;
        std::int64_t at_most = 0;
        const Counted found = simd_.count_at_most(row + begin, end - begin, &value, 1, &at_most);
        tied += std::isnan(value) ? found.nans : found.equal;
        begin = end + 1;  // the positive itself is no other
        std::int64_t apart = 0;
        for (const Item& item : excluded_) apart += item.index < end && ties_with(item.value);
        for (std::int64_t j = 0; j < labels_.junk_count && labels_.junk[j] < end; ++j) {
            apart += ties_with(row[labels_.junk[j]]);
        }
        ranks_.others_before[static_cast<std::size_t>(i)] = tied - apart;
    }
}

template <class T>
bool RowRanker<T>::rank(const T* row, std::int64_t query, bool need_order_within_ties) {
    nans_ = 0;
    if (!gather(row, query)) return false;
    count(row);
    ranks_.groups.clear();
    ranks_.others_before.assign(positives_.size(), 0);
    const auto add = [&](std::int64_t first, std::int64_t end, std::int64_t nearer,
                         std::int64_t up_to) {
        const TieGroup group{nearer + first, end - first, up_to - nearer};
        if (need_order_within_ties && group.others > 0) {
            const T value = positives_[static_cast<std::size_t>(first)].value;
            count_others_before(row, first, group, value);
        }
        ranks_.groups.push_back(group);
    };
    std::int64_t first = 0;
    for (std::size_t i = 0; i < ends_.size(); ++i) {
        add(first, ends_[i], nearer_[i], up_to_[i]);
        first = ends_[i];
    }
    const auto positives = static_cast<std::int64_t>(positives_.size());
    if (first < positives) {  // the rest are NaN
        const std::int64_t others =
            labels_.items - positives - static_cast<std::int64_t>(apart_.size());
        add(first, positives, others - other_nans_, others);
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
