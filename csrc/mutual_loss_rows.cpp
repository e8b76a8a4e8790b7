#include <algorithm>
#include <cmath>

#include "mutual_loss_row.hpp"

namespace dml_fast {
namespace {

constexpr std::int64_t SHORT = 1 << 17;  // bytes of logits of a row: two fit the second cache
constexpr std::int64_t STREAMED = std::int64_t{1} << 25;  // bytes of all gradients
constexpr double FLAT = -0.5;            // the mean of a above which w - 1 cancels

double log_of_mean(const SoftSums& sums, double count, bool flat) {
    return flat ? std::log1p(sums.less_one / count) : std::log(sums.whole / count);
}

double sum_of_weights(const SoftSums& sums, double count, bool flat) {
    return flat ? count + sums.less_one : sums.whole;
}

struct Worker {
    Worker(const MutualProblem& p, const MutualResult& o, const RowSums& s)
        : problem(p), out(o), rows(p, o, s), simd(active_simd()), hot(p.temperature != 1.0),
          count(p.logits.size()), students(static_cast<std::size_t>(p.students)), all(count),
          mixture(STRIP), row_grads(students), log_classes(std::log(static_cast<double>(p.classes))) {
        const auto c = static_cast<std::size_t>(p.classes);
        w.resize(count * c);
        if (hot) cold.resize(students * c);
        if (p.smoothing > 0.0 || p.soft) dense.resize(c);
        constant = p.smoothing > 0.0 && !p.soft;
        if (constant) fill_constant();
        for (std::size_t l = 0; l < count; ++l) pointers.push_back(&w[l * c]);
        factors.resize(count);
        if (p.peer_mean && count > 1) share = 1.0 / static_cast<double>(count - 1);
        if (p.divergence == Divergence::symmetric) forward = 0.5;
        if (p.divergence == Divergence::reverse || p.divergence == Divergence::jsd) forward = 0.0;
        if (count > 1) apart = make_apart(p);
        stream = !apart && may_stream();
    }

    void operator()(std::int64_t task) {
        const std::int64_t begin = task * ROWS_OF_TASK, end = std::min(begin + ROWS_OF_TASK, problem.rows);
        for (std::int64_t n = begin; n < end; ++n) {
            if (problem.labelled_rows && problem.index && is_ignored(n)) {
                pass_over(n, task);
            } else if (const MutualTarget target = target_of(n); look(n)) {
                teach(n, task, target);
            } else {
                teach_odd(n, task, target);
            }
            rows.round_gradients(n);
        }
    }

   private:
    // Gradients that the caches cannot hold until someone reads them are written past them, which
    // spares reading their memory first.
    bool may_stream() const {
        const std::int64_t row = problem.classes * 4;
        if (out.grads.empty() || rows.rounds() || row % 64 != 0) return false;
        if (row * problem.rows * problem.students < STREAMED) return false;
        return std::all_of(out.grads.begin(), out.grads.end(), [](const void* at) {
            return reinterpret_cast<std::uintptr_t>(at) % 64 == 0;
        });
    }

    // t = smoothing / C for each class, times its weight.
    void fill_constant() {
        const double each = problem.smoothing / static_cast<double>(problem.classes);
        constant_mass = 0.0;
        for (std::int64_t c = 0; c < problem.classes; ++c) {
            const double t = problem.class_weight ? each * problem.class_weight[c] : each;
            dense[static_cast<std::size_t>(c)] = static_cast<float>(t);
            constant_mass += t;
        }
    }

    // The processor's own prefetching starts anew in each row. While a distribution of a short row
    // is worked on, that of the next row is fetched; of a long row, the next distribution.
    Ahead ahead_of(std::size_t l, std::int64_t n) const {
        const std::int64_t item = problem.bf16 ? 2 : 4, written = out.float_grads ? 4 : 2;
        const bool longer = item * problem.classes * static_cast<std::int64_t>(count) > SHORT;
        if (longer && l + 1 < count) {
            ++l;
        } else {
            if (longer) l = 0;
            ++n;
        }
        if (n >= problem.rows) return Ahead{};
        Ahead ahead{static_cast<const char*>(problem.logits[l]) + n * item * problem.classes,
                    nullptr, item, written};
        if (!longer && !stream && l < out.grads.size()) {
            ahead.write = static_cast<const char*>(out.grads[l]) + n * written * problem.classes;
        }
        return ahead;
    }

    // False where a logit is NaN or infinite.
    bool soften(const float* z, const Peak& peak, double temperature, const Ahead& ahead,
                Softened& to) {
        const double classes = static_cast<double>(problem.classes);
        const auto factor = static_cast<float>(1.0 / temperature);
        const bool flat = (peak.sum / classes - double{peak.largest}) / temperature > FLAT;
        SoftSums sums;
        simd.soften(z, problem.classes, peak.largest, factor, flat, ahead, to.w, sums);
        const double total = sum_of_weights(sums, classes, flat);
        to.log_mean = log_of_mean(sums, classes, flat);
        to.expected = sums.products / total;
        to.total = total;
        to.reciprocal = static_cast<float>(1.0 / total);
        return std::isfinite(sums.products);
    }

    // The softmax of each distribution; false where a logit is NaN or infinite.
    bool look(std::int64_t n) {
        const auto c = static_cast<std::size_t>(problem.classes);
        for (std::size_t l = 0; l < count; ++l) {
            Distribution& d = all[l];
            d.z = rows.logits(l, n);
            const Peak peak = simd.peak_of(d.z, problem.classes);
            if (!std::isfinite(peak.sum)) return false;
            d.largest = peak.largest;
            d.hot.w = &w[l * c];
            if (!soften(d.z, peak, problem.temperature, ahead_of(l, n), d.hot)) return false;
            if (l >= students) continue;
            if (!hot) continue;
            d.cold.w = &cold[l * c];
            if (!soften(d.z, peak, 1.0, Ahead{}, d.cold)) return false;
        }
        return true;
    }

    bool is_ignored(std::int64_t n) const {
        return problem.has_ignored && problem.index[n] == problem.ignored;
    }

    MutualTarget target_of(std::int64_t n) {
        MutualTarget t{-1, 0.0, 0.0, nullptr};
        if (!problem.soft) {
            const std::int64_t y = problem.index[n];
            if (is_ignored(n)) return t;
            t.y = y;
            t.sparse = (1.0 - problem.smoothing) *
                       (problem.class_weight ? double{problem.class_weight[y]} : 1.0);
            t.dense = constant ? dense.data() : nullptr;
            t.mass = t.sparse + (constant ? constant_mass : 0.0);
            return t;
        }
        const double each = problem.smoothing / static_cast<double>(problem.classes);
        const float* row = problem.soft + n * problem.classes;
        for (std::int64_t c = 0; c < problem.classes; ++c) {
            double x = row[c] * (1.0 - problem.smoothing) + each;
            if (problem.class_weight) x *= problem.class_weight[c];
            dense[static_cast<std::size_t>(c)] = static_cast<float>(x);
            t.mass += x;
        }
        t.dense = dense.data();
        return t;
    }

    // A row without a label that has no divergence either.
    void pass_over(std::int64_t n, std::int64_t task) {
        for (std::size_t k = 0; k < students; ++k) {
            const float* z = rows.logits(k, n);
            if (!is_usable(z, problem.classes)) rows.mark_unusable(k, task);
            if (float* grad = rows.gradient(k, n)) std::fill_n(grad, problem.classes, 0.0f);
            rows.keep(k, n, task, 0.0, 0.0);
        }
    }

    void teach_odd(std::int64_t n, std::int64_t task, const MutualTarget& target) {
        std::vector<const float*> z;
        for (std::size_t l = 0; l < count; ++l) z.push_back(rows.logits(l, n));
        std::vector<OddStudent> odd(students);
        for (std::size_t k = 0; k < students; ++k) odd[k].grad = rows.gradient(k, n);
        mutual_loss_odd_row(problem, n, z.data(), target, odd.data());
        const double weight = problem.row_weight ? double{problem.row_weight[n]} : 1.0;
        for (std::size_t k = 0; k < students; ++k) {
            rows.keep(k, n, task, odd[k].ce * weight, odd[k].kl * weight);
            if (odd[k].usable) {
                judge(k, n, task, z[k], *std::max_element(z[k], z[k] + problem.classes));
            } else {
                rows.mark_unusable(k, task);
            }
        }
    }

    // Counts the student's row if its first largest logit is the target's.
    void judge(std::size_t k, std::int64_t n, std::int64_t task, const float* z, float largest) {
        if (problem.index && is_ignored(n)) return;
        const std::int64_t y = problem.soft ? problem.best[n] : problem.index[n];
        rows.count(k, task, z[y] == largest && std::find(z, z + y, largest) == z + y);
    }

    void teach(std::int64_t n, std::int64_t task, const MutualTarget& target) {
        const double weight = problem.row_weight ? double{problem.row_weight[n]} : 1.0;
        const bool teaching = count > 1;
        const double by = weight * problem.kl_weight * problem.temperature * problem.per_row;
        const double strength = teaching ? forward * share * weight * problem.kl_weight *
                                               problem.temperature * problem.per_row
                                         : 0.0;
        const double mass = static_cast<double>(count);
        const double push = target.mass * problem.per_label * weight;
        double peers = 0.0;  // the sum over l of -H_l, but for log C
        for (std::size_t l = 0; l < count; ++l) {
            peers += all[l].hot.expected - all[l].hot.log_mean;
            factors[l] = all[l].hot.reciprocal;
        }
        std::vector<LearnSums>& sums = learnt;
        sums.assign(students, LearnSums{0.0, 0.0});
        for (std::int64_t begin = 0; begin < problem.classes; begin += STRIP) {
            const std::int64_t size = std::min(STRIP, problem.classes - begin);
            for (std::size_t l = 0; l < count; ++l) pointers[l] = all[l].hot.w + begin;
            simd.mix_peers(pointers.data(), factors.data(), static_cast<std::int64_t>(count), size,
                           mixture.data());
            for (std::size_t k = 0; k < students; ++k) {
                const Distribution& d = all[k];
                const double scale = problem.grad_scale[k];
                const double by_q = push + (hot ? 0.0 : mass * strength);
                Learner learner{};
                learner.z = d.z + begin;
                learner.largest = d.largest;
                learner.per_temperature = static_cast<float>(1.0 / problem.temperature);
                learner.v = mixture.data();
                learner.q = at_one(d).w + begin;
                learner.p = hot ? d.hot.w + begin : nullptr;
                learner.t = target.dense ? target.dense + begin : nullptr;
                learner.by_q = static_cast<float>(by_q * scale * at_one(d).reciprocal);
                learner.by_p = static_cast<float>(mass * strength * scale * d.hot.reciprocal);
                learner.by_v = static_cast<float>(strength * scale);
                learner.by_t = static_cast<float>(problem.per_label * weight * scale);
                learner.grad = rows.gradient(k, n, begin);
                learner.stream = stream;
                simd.learn(learner, size, sums[k]);
                if (!learner.grad) continue;
                if (target.y >= begin && target.y < begin + size) {
                    learner.grad[target.y - begin] -= static_cast<float>(
                        target.sparse * problem.per_label * weight * scale);
                }
            }
        }
        const double* others = nullptr;
        if (apart) {
            for (std::size_t k = 0; k < students; ++k) row_grads[k] = rows.gradient(k, n);
            others = apart->teach(all.data(), by, row_grads.data());
        }
        for (std::size_t k = 0; k < students; ++k) {
            const Distribution& d = all[k];
            double ce_row = 0.0, kl_row = 0.0;
            const double log_sum = at_one(d).log_mean + log_classes;
            if (target.y >= 0) ce_row = target.sparse * (log_sum - below(d, target.y));
            if (target.dense) ce_row += (target.mass - target.sparse) * log_sum - sums[k].labelled;
            if (teaching) {
                const double sum = peers - sums[k].mixed + mass * d.hot.log_mean;
                kl_row = std::max(sum, 0.0) * share * problem.temperature * problem.temperature;
                if (others) kl_row = forward * kl_row + others[k];
            }
            rows.keep(k, n, task, ce_row * weight, kl_row * weight);
            judge(k, n, task, d.z, d.largest);
        }
    }

    const Softened& at_one(const Distribution& d) const { return hot ? d.cold : d.hot; }

    static double below(const Distribution& d, std::int64_t y) {
        return double{d.z[y]} - double{d.largest};
    }

    const MutualProblem& problem;
    const MutualResult& out;
    RowMemory rows;
    const Simd& simd;
    bool hot;
    std::size_t count;
    std::size_t students;
    std::vector<Distribution> all;
    std::vector<float> w, cold, dense, mixture, factors;
    std::vector<const float*> pointers;
    std::vector<LearnSums> learnt;
    std::vector<float*> row_grads;
    std::unique_ptr<Apart> apart;
    double forward = 1.0;  // how much of the paper's divergence there is
    bool constant = false, stream = false;
    double log_classes, constant_mass = 0.0, share = 1.0;
};

}  // namespace

RowWorker row_worker(const MutualProblem& problem, const MutualResult& out, const RowSums& sums) {
    const auto worker = std::make_shared<Worker>(problem, out, sums);
    return [worker](std::int64_t task) { (*worker)(task); };
}

}  // namespace dml_fast
