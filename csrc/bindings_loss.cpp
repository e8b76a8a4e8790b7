// Takes the arguments of mutual_loss() and checks what it can of them.
//
// Arrays come as the addresses of their first items, 0 for none: to make numpy arrays of a dozen
// small tensors and to check them took as long as a third of the work on (4, 128, 100). The one
// caller, dml_fast/loss/native.py, has checked their shapes, dtypes and layout.
#include <optional>
#include <vector>

#include "bindings.hpp"
#include "mutual_loss.hpp"

namespace dml_fast {
namespace {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

// `require` of bindings.hpp makes a string of its message each time.
void check(bool fits, const char* message) {
    if (!fits) throw std::invalid_argument(message);
}

template <class T>
T* at(Address address) {
    check(address % alignof(T) == 0, "an array is not aligned to its items");
    return reinterpret_cast<T*>(address);
}

template <class T>
T* needed(Address address, std::int64_t size) {
    check(address != 0 || size == 0, "an array has no memory");
    return at<T>(address);
}

// Logits or gradients: bfloat16, or float32.
template <class T>
void add(const Addresses& addresses, std::int64_t size, bool bf16, std::vector<T*>& to) {
    to.reserve(addresses.size());
    for (Address address : addresses) {
        if (bf16) {
            to.push_back(needed<std::uint16_t>(address, size));
        } else {
            to.push_back(needed<float>(address, size));
        }
    }
}

void check_classes(const std::int64_t* y, const MutualProblem& problem, bool ignored) {
    for (std::int64_t n = 0; n < problem.rows; ++n) {
        check((0 <= y[n] && y[n] < problem.classes) || (ignored && y[n] == problem.ignored),
              "classes must be in 0..C-1");
    }
}

void mutual_loss_of(const Addresses& logits, std::int64_t rows, std::int64_t classes, bool bf16,
                    std::int64_t students, Address index, std::optional<std::int64_t> ignored,
                    Address soft, Address best, Address class_weight, Address row_weight,
                    double smoothing, double temperature, bool peer_mean, double kl_weight,
                    const std::vector<double>& factors, const std::vector<double>& grad_scale,
                    const Addresses& grads, bool float_grads, const Addresses& means,
                    Address correct, Address finite, Address each_row, int threads, bool labels,
                    int divergence, double beta, bool labelled_rows) {
    MutualProblem problem{};
    const auto all = static_cast<std::int64_t>(logits.size());
    check(1 <= students && students <= all, "students must be among the logits");
    check(rows >= 0 && classes >= 1, "logits must be (N, C), C >= 1");
    problem.bf16 = bf16;
    problem.labels = labels;
    problem.students = students;
    problem.rows = rows;
    problem.classes = classes;
    add(logits, rows * classes, bf16, problem.logits);
    problem.index = at<const std::int64_t>(index);
    problem.soft = at<const float>(soft);
    problem.best = at<const std::int64_t>(best);
    problem.class_weight = at<const float>(class_weight);
    problem.row_weight = at<const float>(row_weight);
    problem.has_ignored = ignored.has_value();
    problem.ignored = ignored.value_or(0);
    check(rows == 0 || (index == 0) != (soft == 0), "index or soft, not both");
    check(rows == 0 || labels || (soft == 0) == (best == 0), "soft needs best");
    check(!labels || index == 0, "labels must be in soft");
    if (problem.index) check_classes(problem.index, problem, problem.has_ignored);
    if (problem.best) check_classes(problem.best, problem, false);
    check(temperature > 0.0, "temperature must be positive");
    problem.smoothing = smoothing;
    problem.temperature = temperature;
    check(0 <= divergence && divergence <= 3, "divergence must be in 0..3");
    check(divergence == 0 || !labels, "labels have the divergence 0");
    check(0.0 < beta && beta < 1.0, "beta must be in (0, 1)");
    problem.divergence = static_cast<Divergence>(divergence);
    problem.beta = beta;
    problem.labelled_rows = labelled_rows;
    problem.peer_mean = peer_mean;
    problem.kl_weight = kl_weight;
    check(factors.size() == 4, "factors must be four");
    problem.per_label = factors[0];
    problem.per_row = factors[1];
    problem.grad_scale = grad_scale;
    check(static_cast<std::int64_t>(grad_scale.size()) == students,
          "grad_scale must have a number for each student");

    MutualResult out{};
    if (!grads.empty()) {
        check(static_cast<std::int64_t>(grads.size()) == students,
              "grads must be one for each student");
        check(float_grads || bf16, "grads must be float32");
        out.float_grads = float_grads;
        add(grads, rows * classes, !float_grads, out.grads);
    }
    std::vector<double> sums(static_cast<std::size_t>(2 * students));
    out.ce = sums.data();
    out.kl = out.ce + students;
    out.correct = needed<std::int64_t>(correct, students);
    out.finite = needed<bool>(finite, students);
    out.ce_rows = at<float>(each_row);
    out.kl_rows = each_row ? out.ce_rows + students * rows : nullptr;
    check(means.size() == 3, "means must be three");
    float* losses = needed<float>(means[0], students);
    float* ce = needed<float>(means[1], students);
    float* kl = needed<float>(means[2], students);
    without_gil([&] { mutual_loss(problem, out, threads, signalled); });
    for (std::int64_t k = 0; k < students; ++k) {
        const double loss = out.ce[k] * problem.per_label +
                            (kl_weight != 0.0 ? out.kl[k] * problem.per_row * kl_weight : 0.0);
        losses[k] = static_cast<float>(loss);
        ce[k] = static_cast<float>(out.ce[k] * factors[2]);
        kl[k] = static_cast<float>(out.kl[k] * factors[3]);
    }
}

std::tuple<std::int64_t, std::int64_t> smallest_and_largest(Address address, std::int64_t size) {
    check(size >= 1, "there is no smallest of no numbers");
    const auto* x = needed<const std::int64_t>(address, size);
    std::int64_t low = x[0], high = x[0];
    for (std::int64_t n = 1; n < size; ++n) {
        low = std::min(low, x[n]);
        high = std::max(high, x[n]);
    }
    return {low, high};
}

}  // namespace

void define_mutual_loss(py::module_& module) {
    module.def("mutual_loss", &mutual_loss_of, py::arg("logits"), py::arg("rows"),
               py::arg("classes"), py::arg("bf16"), py::arg("students"), py::arg("index"),
               py::arg("ignored"), py::arg("soft"), py::arg("best"), py::arg("class_weight"),
               py::arg("row_weight"), py::arg("smoothing"), py::arg("temperature"),
               py::arg("peer_mean"), py::arg("kl_weight"), py::arg("factors"),
               py::arg("grad_scale"), py::arg("grads"), py::arg("float_grads"), py::arg("means"),
               py::arg("correct"), py::arg("finite"), py::arg("each_row"), py::arg("threads"),
               py::arg("labels"), py::arg("divergence"), py::arg("beta"),
               py::arg("labelled_rows"));
    module.def("smallest_and_largest", &smallest_and_largest, py::arg("address"),
               py::arg("size"));
}

}  // namespace dml_fast
