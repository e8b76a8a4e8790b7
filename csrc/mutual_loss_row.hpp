// What the files of the mutual loss share about a row.
#pragma once

#include <memory>

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
