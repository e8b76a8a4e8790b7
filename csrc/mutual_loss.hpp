// The mutual loss of a cohort on a CPU: softmax, cross-entropy, divergences and gradients of all
// students, one row after the other, so that a row stays in the cache. The mathematics is that of
// dml_fast/loss/closed_form.py.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dml_fast {

// As in dml_fast/loss/divergences.py, in its order.
enum class Divergence { forward, reverse, symmetric, jsd };

// K students, L >= K distributions (students first, then teachers), N rows, C classes.
struct MutualProblem {
    std::vector<const void*> logits;  // L of (N, C): float32, or the bits of bfloat16
    bool bf16;
    bool labels;  // which do not exclude each other: `soft` has them, without weights or smoothing
    std::int64_t students, rows, classes;

    const std::int64_t* index;  // (N,) classes, each in 0..C-1 or ignored; null with `soft`
    bool has_ignored;
    std::int64_t ignored;
    const float* soft;          // (N, C) probabilities, or null
    const std::int64_t* best;   // (N,) the most probable class of `soft`, or null
    const float* class_weight;  // (C,) or null
    const float* row_weight;    // (N,) or null

    double smoothing, temperature;
    Divergence divergence;
    double beta;         // of jsd
    bool labelled_rows;  // ignored rows have no divergence
    bool peer_mean;                        // over the peers, or their sum
    double kl_weight, per_label, per_row;  // factors of the gradient
    std::vector<double> grad_scale;        // K, of the gradients alone
};

// The target of a row: `sparse` at class y (-1: none) plus `dense` (null: none), with sum `mass`.
struct MutualTarget {
    std::int64_t y;
    double sparse, mass;
    const float* dense;
};

// What a student gets from a row; the gradient is not written where `grad` is null.
struct OddStudent {
    float* grad;
    double ce, kl;
    bool usable;
};

// Row n of all students, whatever their logits z (L pointers to C numbers): mutual_loss_odd.cpp.
void mutual_loss_odd_row(const MutualProblem& problem, std::int64_t n, const float* const* z,
                         const MutualTarget& target, OddStudent* students);

// Sums over the rows, and each row's own if wanted.
struct MutualResult {
    double *ce, *kl;         // (K,)
    std::int64_t* correct;   // (K,)
    bool* finite;            // (K,) whether each row of the student was usable
    float *ce_rows, *kl_rows;  // (K, N) or null
    std::vector<void*> grads;  // K of (N, C) like the logits, or float32 if `float_grads`; or empty
    bool float_grads;
};

// Sums over the rows of each task, (tasks, K): they are added in the order of the tasks.
constexpr std::int64_t ROWS_OF_TASK = 16;
struct RowSums {
    double *ce, *kl;
    std::int64_t* correct;
    std::uint8_t* unusable;  // 1 where the student had an unusable row
};
using RowWorker = std::function<void(std::int64_t task)>;

// The work on the rows of a task: mutual_loss_rows.cpp.
RowWorker row_worker(const MutualProblem& problem, const MutualResult& out, const RowSums& sums);

// The work on the rows of a task where `labels` is true: mutual_loss_labels.cpp.
RowWorker label_worker(const MutualProblem& problem, const MutualResult& out, const RowSums& sums);

// The bits do not depend on `threads`; those of the baseline differ from those of AVX2 and AVX-512.
void mutual_loss(const MutualProblem& problem, const MutualResult& out, int threads,
                 const std::function<bool()>& interrupted);

}  // namespace dml_fast
