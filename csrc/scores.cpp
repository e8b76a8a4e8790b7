#include "scores.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dml_fast {

namespace {

// Sums over a query's positives, nearest first. With P positives and h(i) the rank of the i-th:
//   AP              mean over i of i / h(i)
//   AP_TRAPEZOID    mean over i of (i / h(i) + (i - 1) / (h(i) - 1)) / 2; 0 / 0 counts as 1, as in
//                   the official code of Market-1501 (Zheng et al., ICCV 2015)
//   INP             P / h(P) (Ye et al., TPAMI 2021)
//   R_PRECISION     the number of h(i) <= P, divided by P
//   MAP_AT_R        sum over h(i) <= P of i / h(i), divided by P (Musgrave et al., ECCV 2020)
class Sums {
   public:
    Sums(std::int64_t positives, std::int64_t max_rank, double* scores, double* first_at,
         double* hits_at)
        : positives_(positives),
          max_rank_(max_rank),
          scores_(scores),
          first_at_(first_at),
          hits_at_(hits_at) {
        std::fill(scores, scores + SCORES, 0.0);
    }

    void hit(std::int64_t rank) {
        ++hits_;
        const double found = static_cast<double>(hits_);
        const double precision = found / static_cast<double>(rank);
        const double above = rank == 1 ? 1.0 : (found - 1.0) / static_cast<double>(rank - 1);
        scores_[AP] += precision;
        scores_[AP_TRAPEZOID] += 0.5 * (above + precision);
        if (rank <= positives_) {
            scores_[R_PRECISION] += 1.0;
            scores_[MAP_AT_R] += precision;
        }
        if (rank <= max_rank_) hits_at_[rank - 1] += 1.0;
        if (hits_ == 1) first(rank, 1.0);
        if (hits_ == positives_) last(rank, 1.0);
    }

    // A group with positives and others, as the mean over all its orders.
    void tied(const TieGroup& group) {
        const std::int64_t n = group.positives + group.others;
        const std::int64_t r = group.positives;
        const double share = static_cast<double>(r) / static_cast<double>(n);
        // Given that place t of the group is a hit, the hits before it: (t - 1) * slope on average.
        const double slope = n > 1 ? static_cast<double>(r - 1) / static_cast<double>(n - 1) : 0.0;
        const double found = static_cast<double>(hits_) + 1.0;
        const double before = static_cast<double>(group.before);
        scores_[AP] += share * sum_of_ratios(found, slope, before + 1.0, n);
        if (group.before > 0) {
            const double above = sum_of_ratios(found - 1.0, slope, before, n);
            const double below = sum_of_ratios(found, slope, before + 1.0, n);
            scores_[AP_TRAPEZOID] += 0.5 * share * (above + below);
        } else {
            const double above = 1.0 + sum_of_ratios(slope, slope, 1.0, n - 1);
            const double below = sum_of_ratios(found, slope, 1.0, n);
            scores_[AP_TRAPEZOID] += 0.5 * share * (above + below);
        }
        const std::int64_t within = std::clamp<std::int64_t>(positives_ - group.before, 0, n);
        scores_[R_PRECISION] += share * static_cast<double>(within);
        scores_[MAP_AT_R] += share * sum_of_ratios(found, slope, before + 1.0, within);
        for (std::int64_t t = 0; t < n && group.before + t < max_rank_; ++t) {
            hits_at_[group.before + t] += share;
        }
        if (hits_ == 0) {
            // P(first hit at place t): r / n, then times (n - t - r + 1) / (n - t) for the next.
            double probability = share;
            for (std::int64_t t = 1; t <= n - r + 1 && probability > NEGLIGIBLE; ++t) {
                first(group.before + t, probability);
                probability *= static_cast<double>(n - t - r + 1) / static_cast<double>(n - t);
            }
        }
        hits_ += r;
        if (hits_ == positives_) {
            double probability = share;
            for (std::int64_t t = n; t >= r && probability > NEGLIGIBLE; --t) {
                last(group.before + t, probability);
                if (t > 1) {
                    probability *= static_cast<double>(t - r) / static_cast<double>(t - 1);
                }
            }
        }
    }

    void finish(bool tied) {
        const double positives = static_cast<double>(positives_);
        for (Score mean : {AP, AP_TRAPEZOID, R_PRECISION, MAP_AT_R}) scores_[mean] /= positives;
        scores_[TIED] = tied ? 1.0 : 0.0;
    }

   private:
    static constexpr double NEGLIGIBLE = 1e-30;  // every later probability is smaller still

    // Sum over t = 0..n-1 of (a + t * slope) / (b + t), in a fixed order that has no long chain.
    static double sum_of_ratios(double a, double slope, double b, std::int64_t n) {
        constexpr int LANES = 8;
        double lanes[LANES] = {};
        std::int64_t t = 0;
        for (; t + LANES <= n; t += LANES) {
            for (int l = 0; l < LANES; ++l) {
                const double place = static_cast<double>(t + l);
                lanes[l] += (a + place * slope) / (b + place);
            }
        }
        for (int l = 0; t < n; ++t, ++l) {
            const double place = static_cast<double>(t);
            lanes[l] += (a + place * slope) / (b + place);
        }
        for (int half = LANES / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        }
        return lanes[0];
    }

    void first(std::int64_t rank, double probability) {
        scores_[FIRST_RANK] += probability * static_cast<double>(rank);
        scores_[RECIPROCAL_RANK] += probability / static_cast<double>(rank);
        if (rank <= max_rank_) first_at_[rank - 1] += probability;
    }

    void last(std::int64_t rank, double probability) {
        scores_[INP] += probability * static_cast<double>(positives_) / static_cast<double>(rank);
    }

    std::int64_t positives_, max_rank_;
    double* scores_;
    double* first_at_;
    double* hits_at_;
    std::int64_t hits_ = 0;
};

}  // namespace

void score_query(const QueryRanks& ranks, Ties ties, std::int64_t max_rank, double* scores,
                 double* first_at, double* hits_at) {
    Sums sums(ranks.positives(), max_rank, scores, first_at, hits_at);
    bool any_tied = false;
    const std::int64_t* others_before = ranks.others_before.data();
    for (const TieGroup& group : ranks.groups) {
        any_tied |= group.others > 0;
        if (group.others > 0 && ties == Ties::expected) {
            sums.tied(group);
        } else {
            for (std::int64_t i = 0; i < group.positives; ++i) {
                std::int64_t rank = group.before + i + 1;
                if (group.others > 0 && ties == Ties::pessimistic) rank += group.others;
                if (group.others > 0 && ties == Ties::stable) rank += others_before[i];
                sums.hit(rank);
            }
        }
        others_before += group.positives;
    }
    sums.finish(any_tied);
}

void score_ranks(const std::int64_t* ranks, std::size_t count, double* scores) {
    if (count == 0) {
        throw std::invalid_argument(
            "ranks is empty: a query without positives has no scores, leave it out");
    }
    Sums sums(static_cast<std::int64_t>(count), 0, scores, nullptr, nullptr);
    std::int64_t previous = 0;
    for (std::size_t i = 0; i < count; ++i) {
        if (ranks[i] <= previous) {
            throw std::invalid_argument(
                "ranks must rise strictly from 1 or more, but ranks[" + std::to_string(i) +
                "] = " + std::to_string(ranks[i]) +
                (i == 0 ? "" : " follows " + std::to_string(previous)));
        }
        previous = ranks[i];
        sums.hit(ranks[i]);
    }
    sums.finish(false);
}

}  // namespace dml_fast
