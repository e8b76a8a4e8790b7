#include "single_shot.hpp"

#include <algorithm>
#include <cmath>

#include "parallel.hpp"
#include "rows.hpp"

namespace dml_fast {

namespace {

// A well mixed number for each (seed, query, repeat, identity): splitmix64's finaliser, chained.
std::uint64_t mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

std::int64_t draw(std::uint64_t key, std::int64_t identity, std::int64_t count) {
    const std::uint64_t number = mix(key ^ mix(static_cast<std::uint64_t>(identity)));
    // 32 random bits scaled to 0..count-1.
    return static_cast<std::int64_t>((number >> 32) * static_cast<std::uint64_t>(count) >> 32);
}

// Nodes and weights of the Gauss-Legendre rule on 0..1: exact for polynomials of degree 2n - 1.
void gauss_legendre(int n, std::vector<double>& nodes, std::vector<double>& weights) {
    nodes.resize(static_cast<std::size_t>(n));
    weights.resize(static_cast<std::size_t>(n));
    for (int i = 0; i < n; ++i) {
        leave_if_stopped();
        double x = std::cos(3.14159265358979323846 * (i + 0.75) / (n + 0.5));
        double slope = 1.0;
        for (int iteration = 0; iteration < 100; ++iteration) {
            double p = 1.0, before = 0.0;
            for (int j = 0; j < n; ++j) {
                const double older = before;
                before = p;
                p = ((2.0 * j + 1.0) * x * before - j * older) / (j + 1.0);
            }
            slope = n * (x * p - before) / (x * x - 1.0);
            const double step = p / slope;
            x -= step;
            if (std::abs(step) < 1e-15) break;
        }
        nodes[static_cast<std::size_t>(i)] = 0.5 * (1.0 - x);
        weights[static_cast<std::size_t>(i)] = 1.0 / ((1.0 - x * x) * slope * slope);
    }
}

}  // namespace

template <class T>
SingleShotRanker<T>::SingleShotRanker(const Labels& labels, SingleShot how, Ties ties,
                                      std::int64_t max_rank)
    : labels_(labels), how_(how), ties_(ties), max_rank_(max_rank) {}

template <class T>
void SingleShotRanker<T>::collect(std::int64_t query) {
    positives_.clear();
    for (const auto* item = labels_.same_begin(query); item != labels_.same_end(query); ++item) {
        if (!labels_.excluded(query, *item)) positives_.push_back(*item);
    }
    rivals_.clear();
    for (std::int64_t i = 0; i < labels_.identities; ++i) {
        const std::int64_t images = labels_.member_offsets[i + 1] - labels_.member_offsets[i];
        if (i != labels_.query_identity[query]) rivals_.push_back({i, images, 0, 0});
    }
}

template <class T>
void SingleShotRanker<T>::rank(const T* row, std::int64_t query, double* first_at) {
    collect(query);
    if (how_.repeats == 0) {
        exact(row, first_at);
    } else {
        drawn(row, query, first_at);
    }
}

// Given the positive, the rivals' draws are independent: the number before it is a sum of
// independent yes-or-no variables, whose distribution is built up one rival at a time. In a random
// order of tied items the positive stands behind each with probability u, u uniform on 0..1.
template <class T>
void SingleShotRanker<T>::add_chances(double tied_before, double weight, double* first_at) {
    chances_.assign(static_cast<std::size_t>(max_rank_), 0.0);
    chances_[0] = 1.0;
    for (const Rival& rival : rivals_) {
        const double before = (static_cast<double>(rival.nearer) +
                               static_cast<double>(rival.tied) * tied_before) /
                              static_cast<double>(rival.images);
        if (before == 0.0) continue;
        leave_if_stopped();
        for (std::size_t m = chances_.size() - 1; m > 0; --m) {
            chances_[m] += before * (chances_[m - 1] - chances_[m]);
        }
        chances_[0] *= 1.0 - before;
    }
    for (std::size_t m = 0; m < chances_.size(); ++m) first_at[m] += weight * chances_[m];
}

template <class T>
void SingleShotRanker<T>::exact(const T* row, double* first_at) {
    const double weight = 1.0 / static_cast<double>(positives_.size());
    std::vector<double> nodes, weights;
    for (std::int64_t positive : positives_) {
        leave_if_stopped();
        int tied_rivals = 0;
        for (Rival& rival : rivals_) {
            rival.nearer = rival.tied = 0;
            for (auto m = labels_.member_offsets[rival.identity];
                 m < labels_.member_offsets[rival.identity + 1]; ++m) {
                const std::int64_t item = labels_.members[m];
                const int order = compare(row[item], row[positive]);
                const bool nearer = order < 0 || (order == 0 && ties_ == Ties::stable &&
                                                  item < positive);
                if (nearer) {
                    ++rival.nearer;
                } else if (order == 0 && ties_ != Ties::stable) {
                    ++rival.tied;
                }
            }
            tied_rivals += rival.tied > 0;
        }
        if (ties_ != Ties::expected || tied_rivals == 0) {
            add_chances(ties_ == Ties::pessimistic ? 1.0 : 0.0, weight, first_at);
            continue;
        }
        gauss_legendre(tied_rivals / 2 + 1, nodes, weights);
        for (std::size_t i = 0; i < nodes.size(); ++i) {
            add_chances(nodes[i], weight * weights[i], first_at);
        }
    }
}

template <class T>
void SingleShotRanker<T>::drawn(const T* row, std::int64_t query, double* first_at) {
    for (std::int64_t repeat = 0; repeat < how_.repeats; ++repeat) {
        leave_if_stopped();
        const std::uint64_t key = mix(mix(how_.seed) ^ mix(static_cast<std::uint64_t>(query))) ^
                                  mix(static_cast<std::uint64_t>(repeat));
        const auto count = static_cast<std::int64_t>(positives_.size());
        const std::int64_t positive = positives_[static_cast<std::size_t>(
            draw(key, labels_.query_identity[query], count))];
        std::int64_t nearer = 0, tied = 0;
        for (const Rival& rival : rivals_) {
            const std::int64_t item =
                labels_.members[labels_.member_offsets[rival.identity] +
                                draw(key, rival.identity, rival.images)];
            const int order = compare(row[item], row[positive]);
            nearer += order < 0 || (order == 0 && ties_ == Ties::stable && item < positive);
            tied += order == 0 && ties_ != Ties::stable;
        }
        const double weight = 1.0 / static_cast<double>(how_.repeats);
        const bool spread = ties_ == Ties::expected;
        if (ties_ == Ties::pessimistic) nearer += tied;
        const std::int64_t places = spread ? tied + 1 : 1;
        for (std::int64_t r = nearer; r < nearer + places && r < max_rank_; ++r) {
            first_at[r] += weight / static_cast<double>(places);
        }
    }
}

template class SingleShotRanker<float>;
template class SingleShotRanker<double>;

}  // namespace dml_fast
