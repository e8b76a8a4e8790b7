// What the bindings share: numpy arrays, repeated arguments, errors, Ctrl-C.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "parallel.hpp"
#include "ranking.hpp"
#include "scores.hpp"

namespace dml_fast {

namespace py = pybind11;

// noconvert (below): an array of another type or layout raises TypeError, not a silent copy.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Ints = Array<std::int64_t>;

inline void require(bool fits, const std::string& message) {
    if (!fits) throw std::invalid_argument(message);
}

template <class T>
const T* data_of(const Array<T>& array, const char* name, int ndim) {
    require(array.ndim() == ndim, std::string(name) + " must have " +
                                      (ndim == 1 ? "one dimension" : "two dimensions") +
                                      ", got " + std::to_string(array.ndim()));
    require(reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0,
            std::string(name) + " is not aligned to its items: pass a copy of it");
    return array.data();
}

// True once a signal handler has raised: Ctrl-C. Called without the GIL.
inline bool signalled() {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

// Runs `work` without the GIL; the exception of an interrupting signal handler goes to Python.
template <class Work>
void without_gil(const Work& work) {
    bool interrupted = false;
    {
        const py::gil_scoped_release nogil;
        try {
            work();
        } catch (const Interrupted&) {
            interrupted = true;
        }
    }
    if (interrupted) throw py::error_already_set();
}

inline Labels labels_of(const Ints& query_identity, const Ints& item_identity,
                        const Ints& query_camera, const Ints& item_camera,
                        const Ints& member_offsets, const Ints& members, const Ints& junk) {
    Labels labels{};
    labels.query_identity = data_of(query_identity, "query_identity", 1);
    labels.item_identity = data_of(item_identity, "item_identity", 1);
    labels.queries = query_identity.size();
    labels.items = item_identity.size();
    const std::int64_t* query_cameras = data_of(query_camera, "query_camera", 1);
    const std::int64_t* item_cameras = data_of(item_camera, "item_camera", 1);
    if (query_camera.size() + item_camera.size() > 0) {
        require(query_camera.size() == labels.queries && item_camera.size() == labels.items,
                "cameras must be as many as queries and items, or none at all");
        labels.query_camera = query_cameras;
        labels.item_camera = item_cameras;
    }
    labels.member_offsets = data_of(member_offsets, "member_offsets", 1);
    require(member_offsets.size() >= 1, "member_offsets must have at least one entry");
    labels.identities = member_offsets.size() - 1;
    labels.members = data_of(members, "members", 1);
    labels.junk = data_of(junk, "junk", 1);
    labels.junk_count = junk.size();
    require(members.size() + junk.size() == labels.items &&
                labels.member_offsets[0] == 0 &&
                labels.member_offsets[labels.identities] == members.size(),
            "members and junk must hold each item once");
    return labels;
}

inline Ties ties_of(int ties) {
    require(ties >= 0 && ties <= 3, "ties must be 0..3");
    return static_cast<Ties>(ties);
}

using Part = std::tuple<Array<double>, Array<double>, Array<double>, Ints, std::int64_t>;

// What ranking writes to.
struct Arrays {
    Arrays(std::int64_t queries, std::int64_t max_rank, std::int64_t topk)
        : scores({queries, static_cast<std::int64_t>(SCORES)}),
          first_at({(queries + CHUNK - 1) / CHUNK, max_rank}),
          hits_at({(queries + CHUNK - 1) / CHUNK, max_rank}),
          nearest({queries, topk}),
          out{scores.mutable_data(), first_at.mutable_data(), hits_at.mutable_data(),
              nearest.mutable_data()} {
        std::fill(out.first_at, out.first_at + first_at.size(), 0.0);
        std::fill(out.hits_at, out.hits_at + hits_at.size(), 0.0);
    }
    Part part(std::int64_t nans) const { return {scores, first_at, hits_at, nearest, nans}; }

    Array<double> scores, first_at, hits_at;
    Ints nearest;
    RankOutput out;
};

// Defines FeaturesF32, FeaturesF64, RerankF32 and RerankF64: bindings_features.cpp.
void define_feature_classes(py::module_& module);

// Defines augment and resize_parts: bindings_augment.cpp.
void define_augment(py::module_& module);

// Defines mutual_loss: bindings_loss.cpp.
void define_mutual_loss(py::module_& module);

#define LABEL_ARGS                                                                        \
    py::arg("query_identity").noconvert(), py::arg("item_identity").noconvert(),          \
        py::arg("query_camera").noconvert(), py::arg("item_camera").noconvert(),          \
        py::arg("member_offsets").noconvert(), py::arg("members").noconvert(),            \
        py::arg("junk").noconvert()

}  // namespace dml_fast
