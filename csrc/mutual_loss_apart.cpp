// The divergences besides the paper's, of rows whose logits are all finite. The mathematics is that
// of dml_fast/loss/divergences.py; here the gap is its g but for the share of a peer.
#include <algorithm>
#include <cmath>

#include "mutual_loss_row.hpp"

namespace dml_fast {
namespace {

// What both have: an array x of each student, whose gradient is by p (x - <p, x>).
class Pulling : public Apart {
   protected:
    explicit Pulling(const MutualProblem& p)
        : problem(p), simd(active_simd()), count(p.logits.size()),
          students(static_cast<std::size_t>(p.students)), divergence(students), middle(students),
          rows(count), x(students * static_cast<std::size_t>(p.classes)) {}

    float* x_of(std::size_t k) { return &x[k * static_cast<std::size_t>(problem.classes)]; }

    void pull(const Distribution* all, double by, float* const* grads) {
        if (grads[0] == nullptr) return;
        for (std::size_t k = 0; k < students; ++k) {
            const Softened& d = all[k].hot;
            simd.pull(d.w, x_of(k), static_cast<float>(middle[k]),
                      static_cast<float>(by * problem.grad_scale[k] * double{d.reciprocal}),
                      problem.classes, grads[k]);
        }
    }

    // work(first class, number of classes)
    template <class Work>
    void in_strips(const Work& work) const {
        for (std::int64_t begin = 0; begin < problem.classes; begin += STRIP) {
            work(begin, std::min(STRIP, problem.classes - begin));
        }
    }

    const MutualProblem& problem;
    const Simd& simd;
    std::size_t count, students;
    std::vector<double> divergence, middle;
    std::vector<const float*> rows;
    std::vector<float> x;
};

class Reverse : public Pulling {
   public:
    explicit Reverse(const MutualProblem& p) : Pulling(p), views(count), sum(STRIP), shifts(count) {
        share = p.peer_mean ? 1.0 / static_cast<double>(count - 1) : 1.0;
        if (p.divergence == Divergence::symmetric) share *= 0.5;
    }

    const double* teach(const Distribution* all, double by, float* const* grads) override {
        std::fill(middle.begin(), middle.end(), 0.0);
        const auto per_temperature = static_cast<float>(1.0 / problem.temperature);
        double lost = 0.0;  // of the shifts by rounding
        for (std::size_t l = 0; l < count; ++l) {
            shifts[l] = static_cast<float>(shift(all, l));
            lost += double{shifts[l]} - shift(all, l);
        }
        in_strips([&](std::int64_t begin, std::int64_t size) {
            for (std::size_t l = 0; l < count; ++l) {
                views[l] = {all[l].z + begin, all[l].largest, shifts[l]};
            }
            simd.add_logs(views.data(), static_cast<std::int64_t>(count), size, per_temperature,
                          sum.data());
            for (std::size_t k = 0; k < students; ++k) {
                middle[k] += simd.gap_of(views[k], views[0], static_cast<float>(count), sum.data(),
                                         all[k].hot.w + begin, size, per_temperature,
                                         x_of(k) + begin);
            }
        });
        for (std::size_t k = 0; k < students; ++k) {
            middle[k] /= all[k].hot.total;
            const double own = double{shifts[k]} - shift(all, k);
            const double sum_of_kl = middle[k] + static_cast<double>(count) * own - lost;
            divergence[k] = std::max(sum_of_kl, 0.0) * share * problem.temperature *
                            problem.temperature;
        }
        pull(all, by * share, grads);
        return divergence.data();
    }

   private:
    // By what log p differs from that of the first, but for the logits less the largest.
    static double shift(const Distribution* all, std::size_t l) {
        return all[l].hot.log_mean - all[0].hot.log_mean;
    }

    std::vector<LogView> views;
    std::vector<float> sum, shifts;
    double share;
};

class JensenShannon : public Pulling {
   public:
    explicit JensenShannon(const MutualProblem& p)
        : Pulling(p), factors(count), means(students), sums(students) {}

    const double* teach(const Distribution* all, double by, float* const* grads) override {
        const double peers = static_cast<double>(count - 1), mass = problem.peer_mean ? 1.0 : peers;
        const double rest = 1.0 - problem.beta;
        std::fill(sums.begin(), sums.end(), MixtureSums{0.0, 0.0});
        for (std::size_t l = 0; l < count; ++l) {
            factors[l] = static_cast<float>(double{all[l].hot.reciprocal} / peers);
        }
        in_strips([&](std::int64_t begin, std::int64_t size) {
            for (std::size_t l = 0; l < count; ++l) rows[l] = all[l].hot.w + begin;
            for (std::size_t k = 0; k < students; ++k) means[k] = x_of(k) + begin;
            simd.mix_others(rows.data(), factors.data(), static_cast<std::int64_t>(count),
                            problem.students, size, means.data());
            for (std::size_t k = 0; k < students; ++k) {
                simd.mixture_logs(rows[k], all[k].hot.reciprocal, static_cast<float>(problem.beta),
                                  static_cast<float>(rest), size, means[k], sums[k]);
            }
        });
        for (std::size_t k = 0; k < students; ++k) {
            middle[k] = sums[k].middle;
            divergence[k] = std::max(sums[k].divergence, 0.0) * mass * problem.temperature *
                            problem.temperature;
        }
        pull(all, -by * mass * rest, grads);
        return divergence.data();
    }

   private:
    std::vector<float> factors;
    std::vector<float*> means;
    std::vector<MixtureSums> sums;
};

}  // namespace

std::unique_ptr<Apart> make_apart(const MutualProblem& problem) {
    if (problem.divergence == Divergence::forward) return nullptr;
    if (problem.divergence == Divergence::jsd) return std::make_unique<JensenShannon>(problem);
    return std::make_unique<Reverse>(problem);
}

}  // namespace dml_fast
