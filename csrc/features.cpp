#include "features.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "operands.hpp"
#include "parallel.hpp"

namespace dml_fast {

namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();
float at_most(double value) {
    const auto nearest = static_cast<float>(value);
    if (static_cast<double>(nearest) <= value) return nearest;
    return std::nextafter(nearest, -std::numeric_limits<float>::infinity());
}

float at_least(double value) { return -at_most(-value); }

}  // namespace

template <class T>
FeatureRanker<T>::FeatureRanker(const FeatureSets<T>& features, const Labels& labels,
                                std::int64_t topk, bool farthest, int threads,
                                const Poll& interrupted)
    : features_(features),
      labels_(labels),
      simd_(active_simd()),
      topk_(topk),
      farthest_(farthest),
      query_norms_(static_cast<std::size_t>(labels.queries)),
      item_norms_(static_cast<std::size_t>(labels.items)) {
    const std::int64_t dims = features_.dims;
    const auto measure = [&](const T* rows, std::vector<double>& norms) {
        const auto count = static_cast<std::int64_t>(norms.size());
        parallel_for((count + FEATURE_ROWS - 1) / FEATURE_ROWS, threads, interrupted, [&] {
            return [&](std::int64_t piece) {
                const std::int64_t end = std::min(count, (piece + 1) * FEATURE_ROWS);
                for (std::int64_t i = piece * FEATURE_ROWS; i < end; ++i) {
                    const T* row = rows + i * dims;
                    norms[static_cast<std::size_t>(i)] = simd_.dot(row, row, dims);
                }
            };
        });
    };
    measure(features_.queries, query_norms_);
    measure(features_.gallery, item_norms_);
    item_power_ = power_for(item_norms_);
    // Not above the items' power, so that u v |g|^2 is at most 1 too.
    query_power_ = std::min(power_for(query_norms_), item_power_);
}

template <class T>
double FeatureRanker<T>::exact(std::int64_t query, std::int64_t item) const {
    const double product = simd_.dot(features_.queries + query * features_.dims,
                                        features_.gallery + item * features_.dims, features_.dims);
    const double squared = item_norms_[static_cast<std::size_t>(item)];
    double z = 0.5 * squared - product;
    if (features_.metric == Metric::cosine) {
        z = -(squared == 0.0 ? product : product / std::sqrt(squared));
    }
    return std::isnan(z) ? INFINITE : z;
}

template <class T>
double FeatureRanker<T>::query_scale(std::int64_t query) const {
    if (features_.metric == Metric::euclidean) return query_power_;
    return one_over_norm(query_norms_[static_cast<std::size_t>(query)]);
}

template <class T>
double FeatureRanker<T>::item_scale(std::int64_t item) const {
    if (features_.metric == Metric::euclidean) return item_power_;
    return one_over_norm(item_norms_[static_cast<std::size_t>(item)]);
}

template <class T>
double FeatureRanker<T>::unit(std::int64_t query) const {
    const bool cosine = features_.metric == Metric::cosine;  // v is in z already
    return query_scale(query) * (cosine ? 1.0 : item_power_);
}

template <class T>
void FeatureRanker<T>::start(std::int64_t begin, std::int64_t end, int threads,
                             const Poll& interrupted) {
    begin_ = begin;
    started_.clear();
    started_.resize(static_cast<std::size_t>(end - begin));
    parallel_for(end - begin, threads, interrupted, [&] {
        return [&](std::int64_t i) {
            const std::int64_t q = begin_ + i;
            Query& query = started_[static_cast<std::size_t>(i)];
            query.nearest = Smallest(topk_);
            query.farthest = Smallest(1);
            for (const auto* m = labels_.same_begin(q); m != labels_.same_end(q); ++m) {
                if (labels_.excluded(q, *m)) continue;
                query.positives.push_back({exact(q, *m), *m, 0, 0, 0});
            }
            auto& positives = query.positives;
            std::sort(positives.begin(), positives.end(), [](const auto& a, const auto& b) {
                return a.z < b.z || (a.z == b.z && a.item < b.item);
            });
            for (std::size_t p = 0; p < positives.size(); ++p) {
                if (p == 0 || positives[p].z != positives[p - 1].z) query.firsts.push_back(p);
                if (topk_ > 0) {
                    const double x = positives[p].z * unit(q);
                    const double off = 1e-12 * std::abs(x);
                    const bool known = std::isfinite(x);
                    query.nearest.add(known ? x - off : -INFINITE, known ? x + off : INFINITE,
                                      positives[p].item,
                                      [&](std::int64_t item) { return exact(q, item); });
                }
            }
        };
    });
}

// The largest error of the approximation of a number near x, for any item of the panel.
template <class T>
double FeatureRanker<T>::bound(const Query& query, double x) const {
    const double product = query.operand_norm * panel_.operand_norm;
    const double dims = static_cast<double>(features_.dims);
    double off = query.operand_norm * panel_.slip +
                 query.slip * (panel_.operand_norm + panel_.slip);
    // A sum of D products in float32, in any order, with any rounding to a neighbour, and with tiny
    // terms flushed to zero. The rounding of z in float64 is far below the slack of this.
    off += (dims + 8.0) * (0x1p-23 * product + 1e-37);
    const double size = std::abs(x) + off + panel_.offset_size;
    return off + panel_.result_rounding * size + 0x1p-21 * size;
}

template <class T>
template <class S>
std::int64_t FeatureRanker<T>::count(const S* tile, std::int64_t query_begin,
                                     std::int64_t query_end, std::int64_t item_begin,
                                     std::int64_t item_end) {
    const DefaultFloats guard;
    const std::int64_t n = item_end - item_begin;
    std::vector<float> x(static_cast<std::size_t>(n)), low, high;
    std::vector<std::uint8_t> unsure(static_cast<std::size_t>(n));
    std::vector<std::int64_t> counts;
    std::int64_t settled = 0;
    for (std::int64_t q = query_begin; q < query_end; ++q) {
        Query& query = started_[static_cast<std::size_t>(q - begin_)];
        const std::size_t groups = query.firsts.size();
        if (groups == 0 && topk_ == 0 && !farthest_) continue;
        simd_.widen(tile + (q - query_begin) * n,
                       panel_.offset.data() + (item_begin - panel_.begin), n, x.data());
        // Positives and excluded items are already known exactly: they are not counted here.
        const auto* same_end = labels_.same_end(q);
        for (const auto* m = std::lower_bound(labels_.same_begin(q), same_end, item_begin);
             m != same_end && *m < item_end; ++m) {
            x[static_cast<std::size_t>(*m - item_begin)] = std::numeric_limits<float>::infinity();
        }
        if (topk_ > 0) gather(q, x.data(), n, item_begin, 1.0, query.nearest);
        if (farthest_) gather(q, x.data(), n, item_begin, -1.0, query.farthest);
        if (groups == 0) continue;

        low.resize(groups);
        high.resize(groups);
        counts.assign(groups, 0);
        for (std::size_t k = 0; k < groups; ++k) {
            const double wanted = query.positives[query.firsts[k]].z * unit(q);
            // An infinite z comes from an unusable row: all pairs of usable rows are nearer.
            const double off = std::isfinite(wanted) ? bound(query, wanted) : 0.0;
            low[k] = at_most(wanted - off);
            high[k] = at_least(wanted + off);
        }
        const std::int64_t left =
            simd_.screen(x.data(), n, low.data(), high.data(),
                            static_cast<std::int64_t>(groups), counts.data(), unsure.data());
        for (std::size_t k = 0; k < groups; ++k) {
            query.positives[query.firsts[k]].nearer += counts[k];
        }
        if (left == 0) continue;
        settled += left;
        for (std::int64_t j = 0; j < n; ++j) {
            if (!unsure[static_cast<std::size_t>(j)]) continue;
            const std::int64_t item = item_begin + j;
            const std::int64_t identity = labels_.item_identity[item];
            if (identity < 0 || identity == labels_.query_identity[q]) continue;
            // The groups whose intervals contain x; all of them for a NaN.
            const float value = x[static_cast<std::size_t>(j)];
            std::size_t from = 0, to = groups;
            if (!std::isnan(value)) {
                from = static_cast<std::size_t>(
                    std::lower_bound(high.begin(), high.end(), value) - high.begin());
                to = static_cast<std::size_t>(std::upper_bound(low.begin(), low.end(), value) -
                                              low.begin());
            }
            settle(q, item, from, to);
        }
    }
    return settled;
}

// Decides a pair by z, for the tie groups from..to-1.
template <class T>
void FeatureRanker<T>::settle(std::int64_t q, std::int64_t item, std::size_t from,
                              std::size_t to) {
    Query& query = started_[static_cast<std::size_t>(q - begin_)];
    const double z = exact(q, item);
    for (std::size_t k = from; k < to; ++k) {
        const std::size_t first = query.firsts[k];
        Positive& head = query.positives[first];
        if (z < head.z) {
            ++head.nearer;
        } else if (z == head.z) {
            ++head.tied;
            const std::size_t end =
                k + 1 < query.firsts.size() ? query.firsts[k + 1] : query.positives.size();
            for (std::size_t p = first; p < end; ++p) {
                if (query.positives[p].item > item) {
                    ++query.positives[p].follows;
                    break;
                }
            }
        }
    }
}

// Offers the items of a tile's row to the smallest of sign * x.
template <class T>
void FeatureRanker<T>::gather(std::int64_t q, const float* x, std::int64_t n,
                              std::int64_t item_begin, double sign, Smallest& smallest) const {
    const Query& query = started_[static_cast<std::size_t>(q - begin_)];
    const auto side = static_cast<float>(sign);
    // A number that is off from x by at most 2 bound(x) may be below the cut if x is below this.
    const auto limit = [&] {
        const double cut = smallest.cut();
        if (!std::isfinite(cut)) return std::numeric_limits<float>::infinity();
        return at_least(cut + 3.0 * bound(query, cut));
    };
    float most = limit();
    for (std::int64_t j = 0; j < n; ++j) {
        if (side * x[j] > most) continue;
        const std::int64_t item = item_begin + j;
        const std::int64_t identity = labels_.item_identity[item];
        if (identity < 0 || identity == labels_.query_identity[q]) continue;
        const bool known = std::isfinite(x[j]);
        const double off = known ? 2.0 * bound(query, x[j]) : INFINITE;
        const double value = known ? sign * x[j] : 0.0;
        smallest.add(value - off, value + off, item,
                     [&](std::int64_t i) { return sign * exact(q, i); });
        most = limit();
    }
}

template <class T>
void FeatureRanker<T>::write_nearest(std::int64_t q, std::int64_t* out) {
    Query& query = started_[static_cast<std::size_t>(q - begin_)];
    std::fill(out, out + topk_, -1);
    const auto exactly = [&](std::int64_t item) { return exact(q, item); };
    for (const Ranked& ranked : query.nearest.finish(exactly)) *out++ = ranked.second;
}

template <class T>
void FeatureRanker<T>::neighbours(std::int64_t* nearest, double* farthest, int threads,
                                  const Poll& interrupted) {
    const auto queries = static_cast<std::int64_t>(started_.size());
    parallel_for(queries, threads, interrupted, [&] {
        return [&](std::int64_t i) {
            const std::int64_t q = begin_ + i;
            write_nearest(q, nearest + i * topk_);
            const auto exactly = [&](std::int64_t item) { return -exact(q, item); };
            const auto last = started_[static_cast<std::size_t>(i)].farthest.finish(exactly);
            farthest[i] = last.empty() ? -INFINITE : -last.front().first;
        };
    });
}

template <class T>
void FeatureRanker<T>::finish(Ties ties, std::int64_t max_rank, const RankOutput& out, int threads,
                              const Poll& interrupted) {
    const auto queries = static_cast<std::int64_t>(started_.size());
    parallel_for((queries + CHUNK - 1) / CHUNK, threads, interrupted, [&] {
        return [&](std::int64_t chunk) {
            QueryRanks ranks;
            const std::int64_t end = std::min(queries, (chunk + 1) * CHUNK);
            for (std::int64_t i = chunk * CHUNK; i < end; ++i) {
                const Query& query = started_[static_cast<std::size_t>(i)];
                double* scores = out.scores + i * SCORES;
                if (topk_ > 0) write_nearest(begin_ + i, out.nearest + i * topk_);
                if (query.positives.empty()) {
                    std::fill(scores, scores + SCORES, std::numeric_limits<double>::quiet_NaN());
                    continue;
                }
                ranks.groups.clear();
                ranks.others_before.clear();
                for (std::size_t k = 0; k < query.firsts.size(); ++k) {
                    const std::size_t first = query.firsts[k];
                    const std::size_t next =
                        k + 1 < query.firsts.size() ? query.firsts[k + 1] : query.positives.size();
                    std::int64_t before = 0;
                    for (std::size_t p = first; p < next; ++p) {
                        before += query.positives[p].follows;
                        ranks.others_before.push_back(before);
                    }
                    const Positive& head = query.positives[first];
                    ranks.groups.push_back({head.nearer + static_cast<std::int64_t>(first),
                                            static_cast<std::int64_t>(next - first), head.tied});
                }
                score_query(ranks, ties, max_rank, scores, out.first_at + chunk * max_rank,
                            out.hits_at + chunk * max_rank);
            }
        };
    });
}

template <class T>
void FeatureRanker<T>::exact_rows(std::int64_t begin, std::int64_t end, double* out, int threads,
                                  const Poll& interrupted) const {
    // Pieces of the gallery stay in the cache while all queries meet them.
    parallel_for((labels_.items + FEATURE_ROWS - 1) / FEATURE_ROWS, threads, interrupted, [&] {
        return [&](std::int64_t piece) {
            const std::int64_t stop = std::min(labels_.items, (piece + 1) * FEATURE_ROWS);
            for (std::int64_t q = begin; q < end; ++q) {
                for (std::int64_t g = piece * FEATURE_ROWS; g < stop; ++g) {
                    out[(q - begin) * labels_.items + g] = exact(q, g);
                }
            }
        };
    });
}

#define INSTANTIATE(T)                                                                       \
    template class FeatureRanker<T>;                                                         \
    template std::int64_t FeatureRanker<T>::count(const float*, std::int64_t, std::int64_t,  \
                                                  std::int64_t, std::int64_t);               \
    template std::int64_t FeatureRanker<T>::count(const std::uint16_t*, std::int64_t,        \
                                                  std::int64_t, std::int64_t, std::int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace dml_fast
