// A row in which a logit is NaN or infinite, in float64 and without haste. A distribution with NaN
// or +inf, or with -inf alone, is unusable: its student's loss and gradient are NaN, and the others
// ignore it. -inf masks a class.
#include <algorithm>
#include <cmath>
#include <limits>

#include "mutual_loss.hpp"

namespace dml_fast {
namespace {

constexpr double NONE = std::numeric_limits<double>::quiet_NaN();

bool is_usable(const float* z, std::int64_t n) {
    bool some = false;
    for (std::int64_t c = 0; c < n; ++c) {
        if (std::isnan(z[c]) || (std::isinf(z[c]) && z[c] > 0)) return false;
        some = some || std::isfinite(z[c]);
    }
    return some;
}

// The logarithm of softmax(z / temperature).
std::vector<double> log_softmax(const float* z, std::int64_t n, double temperature) {
    const double largest = *std::max_element(z, z + n);
    std::vector<double> log_p(z, z + n);
    double total = 0.0;
    for (double& x : log_p) total += std::exp(x = (x - largest) / temperature);
    for (double& x : log_p) x -= std::log(total);
    return log_p;
}

double product(double weight, double log_p) { return weight == 0.0 ? 0.0 : weight * log_p; }

}  // namespace

void mutual_loss_odd_row(const MutualProblem& problem, std::int64_t n, const float* const* z,
                         const MutualTarget& target, OddStudent* students) {
    const std::int64_t classes = problem.classes;
    const std::size_t all = problem.logits.size();
    std::vector<std::vector<double>> log_p(all);
    std::vector<double> mix(static_cast<std::size_t>(classes), 0.0);
    double usable = 0.0, peers = 0.0;
    for (std::size_t l = 0; l < all; ++l) {
        if (!is_usable(z[l], classes)) continue;
        usable += 1.0;
        log_p[l] = log_softmax(z[l], classes, problem.temperature);
        for (std::size_t c = 0; c < mix.size(); ++c) {
            const double p = std::exp(log_p[l][c]);
            mix[c] += p;
            peers += product(p, log_p[l][c]);
        }
    }
    const double share = usable < 2.0 ? 0.0 : problem.peer_mean ? 1.0 / (usable - 1.0) : 1.0;
    const double weight = problem.row_weight ? double{problem.row_weight[n]} : 1.0;
    const double ce_scale = problem.per_label * weight;
    const double strength =
        share * weight * problem.kl_weight * problem.temperature * problem.per_row;
    for (std::int64_t k = 0; k < problem.students; ++k) {
        OddStudent& student = students[k];
        const std::vector<double>& own = log_p[static_cast<std::size_t>(k)];
        student.usable = !own.empty();
        if (!student.usable) {
            student.ce = target.y < 0 && !target.dense ? 0.0 : NONE;
            student.kl = all > 1 ? NONE : 0.0;
            if (student.grad) std::fill_n(student.grad, classes, static_cast<float>(NONE));
            continue;
        }
        const std::vector<double> log_q =
            problem.temperature == 1.0 ? own : log_softmax(z[k], classes, 1.0);
        double ce = target.y < 0 ? 0.0 : -target.sparse * log_q[static_cast<std::size_t>(target.y)];
        double sum = peers;
        const double scale = problem.grad_scale[static_cast<std::size_t>(k)];
        for (std::size_t c = 0; c < mix.size(); ++c) {
            const double t = target.dense ? double{target.dense[c]} : 0.0;
            ce -= product(t, log_q[c]);
            sum -= product(mix[c], own[c]);
            if (!student.grad) continue;
            double g = target.mass * ce_scale * std::exp(log_q[c]) - t * ce_scale;
            g += strength * (usable * std::exp(own[c]) - mix[c]);
            if (static_cast<std::int64_t>(c) == target.y) g -= target.sparse * ce_scale;
            student.grad[c] = static_cast<float>(g * scale);
        }
        student.ce = ce;
        student.kl = all > 1 ? std::max(sum, 0.0) * share * problem.temperature *
                                   problem.temperature
                             : 0.0;
    }
}

}  // namespace dml_fast
