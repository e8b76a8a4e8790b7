#include "hamming.hpp"

#include <algorithm>
#include <vector>

#include "rows.hpp"
#include "simd.hpp"

namespace dml_fast {

namespace {

class CodeSource {
  public:
    CodeSource(const std::uint64_t* queries, const std::uint64_t* gallery, std::int64_t words,
               const Labels& labels, const Simd& simd)
        : queries_(queries),
          gallery_(gallery),
          words_(words),
          labels_(labels),
          simd_(simd),
          ranker_(labels, simd),
          bits_(static_cast<std::size_t>(labels.items)) {}

    const QueryRanks& ranks() const { return ranks_; }

    const float* row(std::int64_t query) {
        measure(query);
        row_.assign(bits_.begin(), bits_.end());
        return row_.data();
    }

    void nearest(std::int64_t query, std::int64_t k, std::int64_t* out) {
        ranker_.nearest(row(query), query, k, out);
    }

    bool rank(std::int64_t query, bool) {
        positives_.clear();
        if (labels_.same_begin(query) == labels_.same_end(query)) return false;
        measure(query);
        // Count items by distance, without those of the query's identity. As the gallery is walked
        // in order, this also tells how many come before each positive at the same distance.
        const std::size_t size = static_cast<std::size_t>(64 * words_) + 1;
        histogram_.assign(WAYS * size, 0);
        std::int64_t begin = 0;
        for (const auto* m = labels_.same_begin(query); m != labels_.same_end(query); ++m) {
            count(begin, *m, size);
            begin = *m + 1;
            if (labels_.excluded(query, *m)) continue;
            const std::uint16_t distance = bits_[static_cast<std::size_t>(*m)];
            positives_.push_back({distance, counted(distance, size)});
        }
        if (positives_.empty()) return false;
        count(begin, labels_.items, size);
        // Stable: gallery order stays within each distance.
        std::stable_sort(positives_.begin(), positives_.end(), [](const auto& a, const auto& b) {
            return a.distance < b.distance;
        });

        ranks_.groups.clear();
        ranks_.others_before.clear();
        std::int64_t nearer = 0;
        std::size_t below = 0;
        for (std::size_t first = 0; first < positives_.size();) {
            const std::size_t distance = positives_[first].distance;
            for (; below < distance; ++below) nearer += counted(below, size);
            std::size_t end = first;
            for (; end < positives_.size() && positives_[end].distance == distance; ++end) {
                ranks_.others_before.push_back(positives_[end].others_before);
            }
            ranks_.groups.push_back({nearer + static_cast<std::int64_t>(first),
                                     static_cast<std::int64_t>(end - first),
                                     counted(distance, size)});
            first = end;
        }
        return true;
    }

  private:
    // That many histograms side by side, so that a counter is written before it is needed again.
    static constexpr std::size_t WAYS = 4;

    struct Positive {
        std::uint16_t distance;
        std::int64_t others_before;
    };

    void measure(std::int64_t query) {
        simd_.hamming(queries_ + query * words_, gallery_, labels_.items, words_, bits_.data());
    }

    void count(std::int64_t begin, std::int64_t end, std::size_t size) {
        std::uint32_t* h = histogram_.data();
        const std::uint16_t* bits = bits_.data();
        for (; begin + 4 <= end; begin += 4) {
            ++h[bits[begin]];
            ++h[size + bits[begin + 1]];
            ++h[2 * size + bits[begin + 2]];
            ++h[3 * size + bits[begin + 3]];
        }
        for (; begin < end; ++begin) ++h[bits[begin]];
    }

    std::int64_t counted(std::size_t distance, std::size_t size) const {
        std::int64_t total = 0;
        for (std::size_t way = 0; way < WAYS; ++way) total += histogram_[way * size + distance];
        return total;
    }

    const std::uint64_t* queries_;
    const std::uint64_t* gallery_;
    std::int64_t words_;
    const Labels& labels_;
    const Simd& simd_;
    RowRanker<float> ranker_;
    std::vector<std::uint16_t> bits_;
    std::vector<float> row_;
    std::vector<std::uint32_t> histogram_;
    std::vector<Positive> positives_;
    QueryRanks ranks_;
};

}  // namespace

void rank_codes(const std::uint64_t* queries, const std::uint64_t* gallery, std::int64_t words,
                const Labels& labels, const RankOptions& options, const RankOutput& out,
                const Poll& interrupted) {
    const Simd& simd = active_simd();
    score_queries<float>(labels, options, out, interrupted, [&] {
        return CodeSource(queries, gallery, words, labels, simd);
    });
}

}  // namespace dml_fast
