// The rows of labels that do not exclude each other: the mathematics is that of
// dml_fast/loss/bernoulli.py. A distribution with a logit that is NaN or infinite is unusable.
#include <algorithm>
#include <cmath>
#include <limits>

#include "mutual_loss_row.hpp"

namespace dml_fast {
namespace {

constexpr float NONE = std::numeric_limits<float>::quiet_NaN();

struct Coins {
    std::vector<float> p, less;  // (C,) probabilities, and 1 - p
    double log_sum = 0.0;        // of log(1 + exp(-|t|))
    double expected = 0.0;       // of |t| sigmoid(-|t|)
};

struct LabelWorker {
    LabelWorker(const MutualProblem& p, const MutualResult& o, const RowSums& s)
        : problem(p), rows(p, o, s), simd(active_simd()), hot(p.temperature != 1.0),
          students(static_cast<std::size_t>(p.students)), all(p.logits.size()), usable(all.size()),
          at_one(hot ? students : 0) {
        const auto c = static_cast<std::size_t>(p.classes);
        for (Coins& coins : all) coins.p.resize(c), coins.less.resize(c);
        for (Coins& coins : at_one) coins.p.resize(c), coins.less.resize(c);
        mix.resize(c);
        rest.resize(c);
    }

    void operator()(std::int64_t task) {
        const std::int64_t begin = task * ROWS_OF_TASK;
        for (std::int64_t n = begin; n < std::min(begin + ROWS_OF_TASK, problem.rows); ++n) {
            teach(n, task);
            rows.round_gradients(n);
        }
    }

   private:
    // False where a logit is NaN or infinite.
    bool look(const float* z, float per_temperature, Coins& coins) {
        coins.log_sum = coins.expected = 0.0;
        bool finite = true;
        for (std::int64_t begin = 0; begin < problem.classes; begin += LABEL_STRIP) {
            CoinSums strip{};
            simd.toss(z + begin, std::min(LABEL_STRIP, problem.classes - begin), per_temperature,
                      &coins.p[static_cast<std::size_t>(begin)],
                      &coins.less[static_cast<std::size_t>(begin)], strip);
            coins.log_sum += std::log(strip.factor);
            coins.expected += strip.products;
            finite = finite && std::isfinite(strip.sizes);
        }
        return finite;
    }

    void teach(std::int64_t n, std::int64_t task) {
        const auto per_temperature = static_cast<float>(1.0 / problem.temperature);
        logits.clear();
        yes.clear();
        no.clear();
        double entropies = 0.0;
        for (std::size_t l = 0; l < all.size(); ++l) {
            logits.push_back(rows.logits(l, n));
            usable[l] = look(logits[l], per_temperature, all[l]);
            if (hot && l < students && usable[l]) look(logits[l], 1.0f, at_one[l]);
            if (!usable[l]) continue;
            yes.push_back(all[l].p.data());
            no.push_back(all[l].less.data());
            entropies += all[l].log_sum + all[l].expected;
        }
        const auto count = static_cast<std::int64_t>(yes.size());
        const std::vector<float> ones(yes.size(), 1.0f);
        if (count > 0) {
            simd.mix_peers(yes.data(), ones.data(), count, problem.classes, mix.data());
            simd.mix_peers(no.data(), ones.data(), count, problem.classes, rest.data());
        }
        for (std::size_t k = 0; k < students; ++k) {
            if (usable[k]) {
                learn(k, n, task, entropies, static_cast<double>(count));
                continue;
            }
            rows.keep(k, n, task, NONE, all.size() > 1 ? NONE : 0.0);
            if (float* grad = rows.gradient(k, n)) std::fill_n(grad, problem.classes, NONE);
            rows.mark_unusable(k, task);
        }
    }

    void learn(std::size_t k, std::int64_t n, std::int64_t task, double entropies, double count) {
        const double classes = static_cast<double>(problem.classes);
        const double weight = problem.row_weight ? double{problem.row_weight[n]} : 1.0;
        const double scale = problem.grad_scale[k] * weight / classes;
        const double share = count < 2.0 ? 0.0 : problem.peer_mean ? 1.0 / (count - 1.0) : 1.0;
        const double strength =
            share * problem.kl_weight * problem.temperature * problem.per_row * scale;
        const Coins& own = hot ? at_one[k] : all[k];
        const float* y = problem.soft + n * problem.classes;
        LabelSums found{0.0, 0.0};
        for (std::int64_t begin = 0; begin < problem.classes; begin += LABEL_STRIP) {
            LabelLearner learner{};
            learner.z = logits[k] + begin;
            learner.per_temperature = static_cast<float>(1.0 / problem.temperature);
            learner.v = mix.data() + begin;
            learner.u = rest.data() + begin;
            learner.q = own.p.data() + begin;
            learner.p = all[k].p.data() + begin;
            learner.y = y + begin;
            learner.by_q = static_cast<float>(problem.per_label * scale);
            learner.by_p = static_cast<float>(count * strength);
            learner.by_v = static_cast<float>(strength);
            learner.grad = rows.gradient(k, n, begin);
            simd.learn_labels(learner, std::min(LABEL_STRIP, problem.classes - begin), found);
        }
        const double kl = std::max(count * all[k].log_sum + found.mixed - entropies, 0.0) * share *
                          problem.temperature * problem.temperature / classes;
        rows.keep(k, n, task, (own.log_sum + found.away) / classes * weight, kl * weight);
        bool right = true;
        for (std::int64_t c = 0; c < problem.classes; ++c) {
            right = right && (logits[k][c] > 0.0f) == (y[c] > 0.5f);
        }
        rows.count(k, task, right);
    }

    const MutualProblem& problem;
    RowMemory rows;
    const Simd& simd;
    bool hot;
    std::size_t students;
    std::vector<Coins> all;
    std::vector<char> usable;
    std::vector<Coins> at_one;
    std::vector<float> mix, rest;
    std::vector<const float*> logits, yes, no;
};

}  // namespace

RowWorker label_worker(const MutualProblem& problem, const MutualResult& out, const RowSums& sums) {
    return LabelWorker(problem, out, sums);
}

}  // namespace dml_fast
