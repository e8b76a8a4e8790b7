// What the files of the mutual loss share about a row.
#pragma once

#include <memory>
#include <vector>

#include "mutual_loss.hpp"
#include "simd.hpp"

namespace dml_fast {

constexpr std::int64_t STRIP = 1024;  // classes whose mixture stays in the nearest cache

struct Softened {
    float* w;          // exponentials
    double log_mean;   // log(mean of w), without cancellation where w is close to 1
    double expected;   // of a under w / sum
    double total;      // the sum of w
    float reciprocal;  // of that sum
};

struct Distribution {
    const float* z;
    float largest;
    Softened hot;   // at the temperature
    Softened cold;  // at temperature 1, if the other is not
};

// What a worker reads and writes of rows: logits and gradients in float32, and the losses.
class RowMemory {
   public:
    RowMemory(const MutualProblem& problem, const MutualResult& out, const RowSums& sums)
        : problem_(problem), out_(out), sums_(sums), simd_(active_simd()),
          classes_(static_cast<std::size_t>(problem.classes)),
          students_(static_cast<std::size_t>(problem.students)) {
        if (problem.bf16) widened_.resize(problem.logits.size() * classes_);
        if (problem.bf16 && !out.grads.empty() && !out.float_grads) {
            unrounded_.resize(students_ * classes_);
        }
    }

    // Whether gradients are written in float32 first, and rounded when the row is done.
    bool rounds() const { return !unrounded_.empty(); }

    const float* logits(std::size_t l, std::int64_t n) {
        const std::int64_t at = n * problem_.classes;
        if (!problem_.bf16) return static_cast<const float*>(problem_.logits[l]) + at;
        float* row = &widened_[l * classes_];
        simd_.floats_of(static_cast<const std::uint16_t*>(problem_.logits[l]) + at,
                        problem_.classes, row);
        return row;
    }

    // From class `begin` on; null where no gradient is wanted.
    float* gradient(std::size_t k, std::int64_t n, std::int64_t begin = 0) {
        if (out_.grads.empty()) return nullptr;
        if (rounds()) return &unrounded_[k * classes_] + begin;
        return static_cast<float*>(out_.grads[k]) + n * problem_.classes + begin;
    }

    // After the last gradient of row n.
    void round_gradients(std::int64_t n) {
        for (std::size_t k = 0; rounds() && k < students_; ++k) {
            simd_.bf16_of(&unrounded_[k * classes_], problem_.classes,
                          static_cast<std::uint16_t*>(out_.grads[k]) + n * problem_.classes);
        }
    }

    void keep(std::size_t k, std::int64_t n, std::int64_t task, double ce, double kl) {
        sums_.ce[cell(k, task)] += ce;
        sums_.kl[cell(k, task)] += kl;
        if (!out_.ce_rows) return;
        const std::int64_t at = static_cast<std::int64_t>(k) * problem_.rows + n;
        out_.ce_rows[at] = static_cast<float>(ce);
        out_.kl_rows[at] = static_cast<float>(kl);
    }

    void mark_unusable(std::size_t k, std::int64_t task) { sums_.unusable[cell(k, task)] = 1; }
    void count(std::size_t k, std::int64_t task, bool right) {
        sums_.correct[cell(k, task)] += right;
    }

   private:
    std::size_t cell(std::size_t k, std::int64_t task) const {
        return static_cast<std::size_t>(task) * students_ + k;
    }

    const MutualProblem& problem_;
    const MutualResult& out_;
    const RowSums sums_;
    const Simd& simd_;
    std::size_t classes_, students_;
    std::vector<float> widened_, unrounded_;
};

// The divergences besides the paper's: mutual_loss_apart.cpp.
class Apart {
   public:
    virtual ~Apart() = default;
    // Adds to the students' rows of gradients, K pointers to C numbers, unless the first is null;
    // returns the divergences (K,) without weights of the row. `by` is what the gradient of one
    // is multiplied with, but for `grad_scale`.
    virtual const double* teach(const Distribution* all, double by, float* const* grads) = 0;
};

std::unique_ptr<Apart> make_apart(const MutualProblem& problem);  // null for the paper's

// Whether a row of logits is that of a distribution: mutual_loss_odd.cpp.
bool is_usable(const float* z, std::int64_t classes);

}  // namespace dml_fast
