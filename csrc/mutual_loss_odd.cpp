// A row in which a logit is NaN or infinite, in float64 and without haste. A distribution with NaN
// or +inf, or with -inf alone, is unusable: its student's loss and gradient are NaN, and the others
// ignore it. -inf masks a class.
#include <algorithm>
#include <cmath>
#include <limits>

#include "mutual_loss_row.hpp"

namespace dml_fast {
namespace {

constexpr double NONE = std::numeric_limits<double>::quiet_NaN();

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

// The divergence from the peers and its gradient x, both without T and weights.
struct Gap {
    double rows = 0.0;
    std::vector<double> x;
};

// The sum over the peers of KL(p_k || p_l): where p_k > 0 = p_l it is infinite, and x is NaN.
Gap reverse(const std::vector<std::vector<double>>& log_p, std::size_t k) {
    const std::vector<double>& own = log_p[k];
    Gap gap;
    gap.x.assign(own.size(), 0.0);
    for (std::size_t l = 0; l < log_p.size(); ++l) {
        for (std::size_t c = 0; c < own.size() && l != k && !log_p[l].empty(); ++c) {
            if (std::exp(own[c]) > 0.0) gap.x[c] += own[c] - log_p[l][c];
        }
    }
    for (std::size_t c = 0; c < own.size(); ++c) gap.rows += product(std::exp(own[c]), gap.x[c]);
    for (std::size_t c = 0; c < own.size(); ++c) {
        gap.x[c] = std::isinf(gap.rows) ? NONE : std::exp(own[c]) * (gap.x[c] - gap.rows);
    }
    return gap;
}

// log(m / p), m = p + share (other - p); of no meaning where p is 0.
double log_of_mixture(double p, double other, double share) {
    if (p == 0.0) return 0.0;
    const double near = share * (other - p) / p;
    return near < 0.5 && near > -0.5 ? std::log1p(near)
                                     : std::log((p * (1.0 - share) + other * share) / p);
}

// The Jensen-Shannon divergence of p_k and the mean of its peers, of whom there are some.
Gap jensen_shannon(const std::vector<std::vector<double>>& log_p, std::size_t k, double peers,
                   double beta) {
    const std::vector<double>& own = log_p[k];
    Gap gap;
    gap.x.assign(own.size(), 0.0);
    double middle = 0.0;
    std::vector<double> logs;
    for (std::size_t c = 0; c < own.size(); ++c) {
        double mean = 0.0;
        for (std::size_t l = 0; l < log_p.size(); ++l) {
            if (l != k && !log_p[l].empty()) mean += std::exp(log_p[l][c]) / peers;
        }
        const double p = std::exp(own[c]);
        logs.push_back(log_of_mixture(p, mean, beta));
        middle += p * logs[c];
        gap.rows -= beta * mean * log_of_mixture(mean, p, 1.0 - beta) + (1.0 - beta) * p * logs[c];
    }
    for (std::size_t c = 0; c < own.size(); ++c) {
        gap.x[c] = (1.0 - beta) * std::exp(own[c]) * (middle - logs[c]);
    }
    return gap;
}

}  // namespace

bool is_usable(const float* z, std::int64_t classes) {
    bool some = false;
    for (std::int64_t c = 0; c < classes; ++c) {
        if (std::isnan(z[c]) || (std::isinf(z[c]) && z[c] > 0)) return false;
        some = some || std::isfinite(z[c]);
    }
    return some;
}

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
    const double full = weight * problem.kl_weight * problem.temperature * problem.per_row;
    const double half = problem.divergence == Divergence::symmetric ? 0.5 : 1.0;
    const bool jsd = problem.divergence == Divergence::jsd;
    const double forward = jsd || problem.divergence == Divergence::reverse ? 0.0 : half;
    const double strength = forward * share * weight * problem.kl_weight * problem.temperature *
                            problem.per_row;
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
        Gap gap;
        double other = 0.0;  // the factor of its divergence
        if (usable > 1.0 && problem.divergence != Divergence::forward) {
            gap = jsd ? jensen_shannon(log_p, static_cast<std::size_t>(k), usable - 1.0,
                                       problem.beta)
                      : reverse(log_p, static_cast<std::size_t>(k));
            other = !jsd ? half * share : problem.peer_mean ? 1.0 : usable - 1.0;
        }
        const double scale = problem.grad_scale[static_cast<std::size_t>(k)];
        for (std::size_t c = 0; c < mix.size(); ++c) {
            const double t = target.dense ? double{target.dense[c]} : 0.0;
            ce -= product(t, log_q[c]);
            sum -= product(mix[c], own[c]);
            if (!student.grad) continue;
            double g = target.mass * ce_scale * std::exp(log_q[c]) - t * ce_scale;
            g += strength * (usable * std::exp(own[c]) - mix[c]);
            if (!gap.x.empty() && problem.kl_weight != 0.0) g += other * full * gap.x[c];
            if (static_cast<std::int64_t>(c) == target.y) g -= target.sparse * ce_scale;
            student.grad[c] = static_cast<float>(g * scale);
        }
        student.ce = ce;
        double kl = forward == 0.0 ? 0.0 : forward * share * std::max(sum, 0.0);
        if (other != 0.0) kl += other * std::max(gap.rows, 0.0);
        student.kl = all > 1 ? kl * problem.temperature * problem.temperature : 0.0;
    }
}

}  // namespace dml_fast
