// Converts the arguments of mutual_loss() and checks that they stay inside their arrays.
#include <optional>
#include <vector>

#include "bindings.hpp"
#include "mutual_loss.hpp"

namespace dml_fast {
namespace {

using ArrayList = std::vector<py::array>;

template <class T>
using Maybe = std::optional<Array<T>>;

template <class T>
const T* maybe(const Maybe<T>& array, const char* name, int ndim, std::int64_t size) {
    if (!array) return nullptr;
    const T* data = data_of(*array, name, ndim);
    require(array->size() == size, std::string(name) + " has another size than the logits say");
    return data;
}

template <class T>
void add_logits(const ArrayList& arrays, MutualProblem& problem) {
    for (const py::array& item : arrays) {
        require(Array<T>::check_(item), "logits must be alike: (N, C), C-contiguous");
        const auto array = py::reinterpret_borrow<Array<T>>(item);
        const T* data = data_of(array, "logits", 2);
        if (problem.logits.empty()) {
            problem.rows = array.shape(0);
            problem.classes = array.shape(1);
        }
        require(array.shape(0) == problem.rows && array.shape(1) == problem.classes,
                "logits must have one shape");
        problem.logits.push_back(data);
    }
}

template <class T>
void add_grads(const ArrayList& arrays, const MutualProblem& problem, MutualResult& out) {
    for (const py::array& item : arrays) {
        require(Array<T>::check_(item), "grads must be alike: (N, C), C-contiguous");
        auto array = py::reinterpret_borrow<Array<T>>(item);
        require(array.ndim() == 2 && array.shape(0) == problem.rows &&
                    array.shape(1) == problem.classes && array.writeable(),
                "grads must be writable and have the shape of the logits");
        out.grads.push_back(array.mutable_data());
    }
}

void check_index(const MutualProblem& problem) {
    for (std::int64_t n = 0; n < problem.rows; ++n) {
        const std::int64_t y = problem.index[n];
        require((0 <= y && y < problem.classes) || (problem.has_ignored && y == problem.ignored),
                "index must be classes");
    }
}

using Solved = std::tuple<Array<float>, Ints, Array<bool>, Array<float>>;

Solved mutual_loss_of(const ArrayList& logits, std::int64_t students,
                      const Maybe<std::int64_t>& index, std::optional<std::int64_t> ignored,
                      const Maybe<float>& soft, const Maybe<std::int64_t>& best,
                      const Maybe<float>& class_weight, const Maybe<float>& row_weight,
                      double smoothing, double temperature, bool peer_mean, double kl_weight,
                      const std::vector<double>& factors, const std::vector<double>& grad_scale,
                      const ArrayList& grads, bool each_row, int threads, bool labels) {
    MutualProblem problem{};
    require(!logits.empty(), "logits must not be empty");
    problem.bf16 = Array<std::uint16_t>::check_(logits[0]);
    if (problem.bf16) {
        add_logits<std::uint16_t>(logits, problem);
    } else {
        add_logits<float>(logits, problem);
    }
    const auto all = static_cast<std::int64_t>(problem.logits.size());
    const std::int64_t n = problem.rows, c = problem.classes;
    require(1 <= students && students <= all && c >= 1, "students must be among the logits");
    problem.students = students;
    problem.index = maybe(index, "index", 1, n);
    problem.soft = maybe(soft, "soft", 2, n * c);
    problem.best = maybe(best, "best", 1, n);
    problem.class_weight = maybe(class_weight, "class_weight", 1, c);
    problem.row_weight = maybe(row_weight, "row_weight", 1, n);
    problem.has_ignored = ignored.has_value();
    problem.ignored = ignored.value_or(0);
    require((problem.index == nullptr) != (problem.soft == nullptr), "index or soft, not both");
    if (problem.index) check_index(problem);
    problem.labels = labels;
    require(!labels || problem.soft, "labels must be in soft");
    require(labels || (problem.soft == nullptr) == (problem.best == nullptr), "soft needs best");
    if (problem.best)
        require(std::all_of(problem.best, problem.best + n,
                            [&](std::int64_t y) { return 0 <= y && y < c; }),
                "best must be classes");
    require(temperature > 0.0, "temperature must be positive");
    problem.smoothing = smoothing;
    problem.temperature = temperature;
    problem.peer_mean = peer_mean;
    problem.kl_weight = kl_weight;
    require(factors.size() == 4, "factors must be four");
    problem.per_label = factors[0];
    problem.per_row = factors[1];
    problem.grad_scale = grad_scale;
    require(static_cast<std::int64_t>(grad_scale.size()) == students,
            "grad_scale must have a number for each student");

    MutualResult out{};
    if (!grads.empty()) {
        require(static_cast<std::int64_t>(grads.size()) == students,
                "grads must be one for each student");
        out.float_grads = Array<float>::check_(grads[0]);
        require(out.float_grads || problem.bf16, "grads must be float32");
        if (out.float_grads) {
            add_grads<float>(grads, problem, out);
        } else {
            add_grads<std::uint16_t>(grads, problem, out);
        }
    }
    std::vector<double> sums(static_cast<std::size_t>(2 * students));
    Array<float> means({std::int64_t{3}, students});
    Ints correct(students);
    Array<bool> finite(students);
    Array<float> rows({each_row ? std::int64_t{2} : 0, students, n});
    out.ce = sums.data();
    out.kl = out.ce + students;
    out.correct = correct.mutable_data();
    out.finite = finite.mutable_data();
    out.ce_rows = each_row ? rows.mutable_data() : nullptr;
    out.kl_rows = each_row ? out.ce_rows + students * n : nullptr;
    without_gil([&] { mutual_loss(problem, out, threads, signalled); });
    float* mean = means.mutable_data();
    for (std::int64_t k = 0; k < students; ++k) {
        const double loss = out.ce[k] * problem.per_label +
                            (kl_weight != 0.0 ? out.kl[k] * problem.per_row * kl_weight : 0.0);
        mean[k] = static_cast<float>(loss);
        mean[students + k] = static_cast<float>(out.ce[k] * factors[2]);
        mean[2 * students + k] = static_cast<float>(out.kl[k] * factors[3]);
    }
    return {means, correct, finite, rows};
}

}  // namespace

void define_mutual_loss(py::module_& module) {
    module.def("mutual_loss", &mutual_loss_of, py::arg("logits"), py::arg("students"),
               py::arg("index").noconvert(), py::arg("ignored"), py::arg("soft").noconvert(),
               py::arg("best").noconvert(), py::arg("class_weight").noconvert(),
               py::arg("row_weight").noconvert(), py::arg("smoothing"), py::arg("temperature"),
               py::arg("peer_mean"), py::arg("kl_weight"), py::arg("factors"),
               py::arg("grad_scale"), py::arg("grads"), py::arg("each_row"), py::arg("threads"),
               py::arg("labels"));
}

}  // namespace dml_fast
