// The k smallest of many numbers, of which at first only intervals are known.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace dml_fast {

// A number and its item, the smaller index first among equal numbers.
using Ranked = std::pair<double, std::int64_t>;

// `exact(item)` gives an item's number z; `low` and `high` enclose it, in a unit that is the same
// for all. From time to time, intervals that cannot be among the k smallest are dropped.
class Smallest {
   public:
    explicit Smallest(std::int64_t k = 0) : k_(static_cast<std::size_t>(k)) {}

    // No number above it is among the k smallest.
    double cut() const { return cut_; }

    template <class Exact>
    void add(double low, double high, std::int64_t item, const Exact& exact) {
        if (low > cut_) return;
        open_.push_back({low, high, item});
        if (open_.size() >= next_) shrink(exact);
    }

    // The k smallest in order, or all if there are fewer.
    template <class Exact>
    std::vector<Ranked> finish(const Exact& exact) {
        settle(exact);
        std::vector<Ranked> smallest;
        for (const Known& known : settled_) smallest.emplace_back(known.z, known.item);
        return smallest;
    }

   private:
    struct Interval {
        double low, high;
        std::int64_t item;
    };
    struct Known {
        double z, high;
        std::int64_t item;
        bool operator<(const Known& other) const {
            return z < other.z || (z == other.z && item < other.item);
        }
    };

    template <class Exact>
    void shrink(const Exact& exact) {
        std::vector<double> highs;
        for (const Interval& interval : open_) highs.push_back(interval.high);
        for (const Known& known : settled_) highs.push_back(known.high);
        if (highs.size() >= k_) {
            const auto kth = highs.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
            std::nth_element(highs.begin(), kth, highs.end());
            cut_ = std::min(cut_, *kth);
            open_.erase(std::remove_if(open_.begin(), open_.end(),
                                       [this](const Interval& i) { return i.low > cut_; }),
                        open_.end());
        }
        // Too many intervals overlap: compute their numbers.
        if (open_.size() > 8 * k_ + 256) settle(exact);
        next_ = 2 * open_.size() + 2 * k_ + 64;
    }

    template <class Exact>
    void settle(const Exact& exact) {
        for (const Interval& interval : open_) {
            settled_.push_back({exact(interval.item), interval.high, interval.item});
        }
        open_.clear();
        std::sort(settled_.begin(), settled_.end());
        if (settled_.size() > k_) settled_.resize(k_);
    }

    std::size_t k_;
    std::size_t next_ = 64;
    double cut_ = std::numeric_limits<double>::infinity();
    std::vector<Interval> open_;
    std::vector<Known> settled_;
};

}  // namespace dml_fast
