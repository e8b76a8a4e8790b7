// Ranking from features: approximate scores decide what they can, exact ones the rest.
//
// A query's exact order is by a number computed in float64, always in the same way (simd.hpp:
// Dot), from the features q and g as they were given:
//     cosine      z = -(q . g) / |g|         |g| = 0 counts as 1
//     euclidean   z = |g|^2 / 2 - q . g      half of |q - g|^2 - |q|^2
// (a NaN, from infinite features, counts as +inf). For fixed q these grow with the distance.
//
// The caller multiplies scaled and rounded copies a, b of q, g ("operands") in whatever way is
// fast, tile by tile. With scales u, v the approximation of x = u v z is x' = u v |g|^2 / 2 - a . b
// (cosine: -a . b), and
//     |x' - x| <= |a| |b - v g| + |a - u q| |v g| + rounding of the sum (and of a bfloat16 result).
// The norms of operands and of what rounding them has lost are computed here. A pair that this
// bound leaves unsure, for any of the query's positives, is decided by z. So the result has the
// same bits whatever multiplied the tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "labels.hpp"
#include "ranking.hpp"
#include "simd.hpp"
#include "topk.hpp"

namespace dml_fast {

constexpr std::int64_t FEATURE_ROWS = 64;  // a thread's piece of work on rows of features

enum class Metric { cosine, euclidean };

template <class T>
struct FeatureSets {
    const T* queries;  // (Q, D)
    const T* gallery;  // (G, D)
    std::int64_t dims;
    Metric metric;
};

template <class T>
class FeatureRanker {
  public:
    // Everything is borrowed and must outlive the ranker. Computes the norms. The topk nearest and,
    // with `farthest`, the farthest valid item of each query are kept too.
    FeatureRanker(const FeatureSets<T>& features, const Labels& labels, std::int64_t topk,
                  bool farthest, int threads, const Poll& interrupted);

    // Squared norms; NaN where a feature is NaN.
    const std::vector<double>& query_norms() const { return query_norms_; }
    const std::vector<double>& item_norms() const { return item_norms_; }

    // Ranks the queries begin..end-1 next: exact scores of their positives.
    void start(std::int64_t begin, std::int64_t end, int threads, const Poll& interrupted);

    // Operands of the started queries, or of gallery items begin..end-1 (the "panel", which the
    // following tiles are of), as float32 or as bfloat16 bits. `loose`: the library
    // that multiplies float32 may round it to bfloat16 first.
    template <class S>
    void query_operands(S* out, bool loose, int threads, const Poll& interrupted);
    template <class S>
    void panel_operands(std::int64_t begin, std::int64_t end, S* out, bool loose, int threads,
                        const Poll& interrupted);

    // Counts a tile of products: rows are the queries query_begin.., columns the items
    // item_begin.. of the panel. Tiles of different queries may be counted at the same time.
    // Returns how many pairs needed z.
    template <class S>
    std::int64_t count(const S* tile, std::int64_t query_begin, std::int64_t query_end,
                       std::int64_t item_begin, std::int64_t item_end);

    // Scores of the started queries, once each has met each item; `out` as in ranking.hpp, its
    // row 0 being the first started query, which must be a multiple of CHUNK.
    void finish(Ties ties, std::int64_t max_rank, const RankOutput& out, int threads,
                const Poll& interrupted);

    // Instead of scores: the topk nearest items of the started queries, (N, topk), -1 where there
    // are fewer, and the largest z of each (`farthest` at construction), (N).
    void neighbours(std::int64_t* nearest, double* farthest, int threads,
                    const Poll& interrupted);

    // z of the queries begin..end-1 and all items, (end - begin, G).
    void exact_rows(std::int64_t begin, std::int64_t end, double* out, int threads,
                    const Poll& interrupted) const;

  private:
    // One positive of a query, in the order of (z, index). The counts are of its tie group and
    // kept with the group's first positive.
    struct Positive {
        double z;
        std::int64_t item;
        std::int64_t nearer;   // others with a smaller z
        std::int64_t tied;     // others with the same z
        std::int64_t follows;  // of these, those between the previous positive's index and its own
    };
    struct Query {
        std::vector<Positive> positives;
        std::vector<std::size_t> firsts;  // of each tie group
        Smallest nearest, farthest;  // by x and by -x
        double operand_norm, slip;  // |a| and |a - u q|
    };
    struct Panel {
        std::int64_t begin, end;
        std::vector<float> offset;  // u v |g|^2 / 2 or 0; +inf for junk
        double operand_norm, slip;  // largest |b| and |b - v g|
        double offset_size;         // largest finite |offset|
        double result_rounding;     // relative
    };

    double exact(std::int64_t query, std::int64_t item) const;
    void write_nearest(std::int64_t query, std::int64_t* out);
    double query_scale(std::int64_t query) const;
    double item_scale(std::int64_t item) const;
    double unit(std::int64_t query) const;  // u v
    double bound(const Query& query, double x) const;
    void settle(std::int64_t query, std::int64_t item, std::size_t from, std::size_t to);
    void gather(std::int64_t query, const float* x, std::int64_t n, std::int64_t item_begin,
                double sign, Smallest& smallest) const;

    FeatureSets<T> features_;
    Labels labels_;
    const Simd& simd_;
    std::int64_t topk_;
    bool farthest_;
    std::vector<double> query_norms_, item_norms_;  // squared
    double query_power_ = 1.0, item_power_ = 1.0;   // euclidean: powers of two, norms come to 1
    std::int64_t begin_ = 0;                        // the first started query
    std::vector<Query> started_;
    Panel panel_{};
};

}  // namespace dml_fast
