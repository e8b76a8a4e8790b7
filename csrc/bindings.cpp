// The Python module dml_fast._ranking: converts arguments and results, computes nothing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "isa.hpp"
#include "ranking.hpp"

namespace py = pybind11;

namespace {

using Ranks = py::array_t<std::int64_t, py::array::c_style>;

std::tuple<double, double, double> average_precision(const Ranks& ranks) {
    if (ranks.ndim() != 1) {
        throw std::invalid_argument("ranks must have one dimension, (P,), got " +
                                    std::to_string(ranks.ndim()));
    }
    const std::int64_t* data = ranks.data();
    if (reinterpret_cast<std::uintptr_t>(data) % alignof(std::int64_t) != 0) {
        throw std::invalid_argument("ranks is not aligned to its 8-byte items: pass a copy of it");
    }
    const std::size_t count = static_cast<std::size_t>(ranks.size());
    dml_fast::QueryScores scores;
    {
        py::gil_scoped_release nogil;
        scores = dml_fast::score_ranks(data, count);
    }
    return {scores.average_precision, scores.average_precision_trapezoid,
            scores.inverse_negative_penalty};
}

}  // namespace

PYBIND11_MODULE(_ranking, module) {
    module.doc() = "Retrieval metrics in C++.";
    // noconvert: an array of another type or layout raises TypeError, it is not copied in silence.
    module.def("average_precision", &average_precision, py::arg("ranks").noconvert());
    module.def("instruction_set",
               [] { return std::string(dml_fast::isa_name(dml_fast::active_isa())); });
}
