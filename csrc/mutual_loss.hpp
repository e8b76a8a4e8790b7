// The mutual loss of a cohort on a CPU: softmax, cross-entropy, divergences and gradients of all
// students, one row after the other, so that a row stays in the cache. The mathematics is that of
// dml_fast/loss/closed_form.py.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dml_fast {

// K students, L >= K distributions (students first, then teachers), N rows, C classes.
struct MutualProblem {
    std::vector<const void*> logits;  // L of (N, C): float32, or the bits of bfloat16
    bool bf16;
    std::int64_t students, rows, classes;

    const std::int64_t* index;  // (N,) classes, each in 0..C-1 or ignored; null with `soft`
    bool has_ignored;
    std::int64_t ignored;
    const float* soft;          // (N, C) probabilities, or null
    const std::int64_t* best;   // (N,) the most probable class of `soft`, or null
    const float* class_weight;  // (C,) or null
    const float* row_weight;    // (N,) or null

    double smoothing, temperature, share;  // share: the uniform weight of a peer
    double kl_weight, per_label, per_row;  // factors of the gradient
    std::vector<double> grad_scale;        // K, of the gradients alone
};

// Sums over the rows, and each row's own if wanted.
struct MutualResult {
    double *ce, *kl;         // (K,)
    std::int64_t* correct;   // (K,)
    float *ce_rows, *kl_rows;  // (K, N) or null
    std::vector<void*> grads;  // K of (N, C) like the logits, or float32 if `float_grads`; or empty
    bool float_grads;
};

// False, with nothing of use written, where a row has NaN or an infinite logit: such rows have
// rules of their own, which this loop does not know. The bits do not depend on `threads`.
bool mutual_loss(const MutualProblem& problem, const MutualResult& out, int threads,
                 const std::function<bool()>& interrupted);

}  // namespace dml_fast
