// The Python module dml_fast._ranking: converts arguments and results, computes nothing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "isa.hpp"
#include "parallel.hpp"
#include "ranking.hpp"
#include "scores.hpp"

namespace py = pybind11;
using namespace dml_fast;

namespace {

// noconvert (below) makes an array of another type or layout raise TypeError: nothing is copied
// in silence.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Ints = Array<std::int64_t>;

void require(bool fits, const std::string& message) {
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
bool signalled() {
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

std::tuple<double, double, double> average_precision(const Ints& ranks) {
    const std::int64_t* data = data_of(ranks, "ranks", 1);
    double scores[SCORES];
    score_ranks(data, static_cast<std::size_t>(ranks.size()), scores);
    return {scores[AP], scores[AP_TRAPEZOID], scores[INP]};
}

Labels labels_of(const Ints& query_identity, const Ints& item_identity, const Ints& query_camera,
                 const Ints& item_camera, const Ints& member_offsets, const Ints& members,
                 const Ints& junk) {
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

Ties ties_of(int ties) {
    require(ties >= 0 && ties <= 3, "ties must be 0..3");
    return static_cast<Ties>(ties);
}

template <class T>
std::tuple<Array<double>, Array<double>, Array<double>, Ints, std::int64_t> rank_rows_of(
    const Array<T>& dist, const Ints& query_identity, const Ints& item_identity,
    const Ints& query_camera, const Ints& item_camera, const Ints& member_offsets,
    const Ints& members, const Ints& junk, int ties, std::int64_t max_rank, std::int64_t topk,
    std::int64_t repeats, std::uint64_t seed, int threads) {
    const Labels labels = labels_of(query_identity, item_identity, query_camera, item_camera,
                                    member_offsets, members, junk);
    const T* rows = data_of(dist, "dist", 2);
    require(dist.shape(0) == labels.queries && dist.shape(1) == labels.items,
            "dist must have a row for each query and a column for each item");
    require(max_rank >= 1 && topk >= 0, "max_rank must be at least 1, topk at least 0");
    const SingleShot single_shot{repeats, seed};
    const RankOptions options{ties_of(ties), max_rank, topk, repeats < 0 ? nullptr : &single_shot,
                              threads};
    const std::int64_t chunks = (labels.queries + CHUNK - 1) / CHUNK;
    Array<double> scores({labels.queries, static_cast<std::int64_t>(SCORES)});
    Array<double> first_at({chunks, max_rank});
    Array<double> hits_at({chunks, max_rank});
    Ints nearest({labels.queries, topk});
    const RankOutput out{scores.mutable_data(), first_at.mutable_data(), hits_at.mutable_data(),
                         nearest.mutable_data()};
    std::int64_t nans = 0;
    without_gil([&] {
        std::fill(out.first_at, out.first_at + chunks * max_rank, 0.0);
        std::fill(out.hits_at, out.hits_at + chunks * max_rank, 0.0);
        nans = rank_rows(rows, labels, options, out, signalled);
    });
    return {scores, first_at, hits_at, nearest, nans};
}


#define LABEL_ARGS                                                                        \
    py::arg("query_identity").noconvert(), py::arg("item_identity").noconvert(),          \
        py::arg("query_camera").noconvert(), py::arg("item_camera").noconvert(),          \
        py::arg("member_offsets").noconvert(), py::arg("members").noconvert(),            \
        py::arg("junk").noconvert()

template <class T>
void define_rank_rows(py::module_& module, const char* name) {
    module.def(name, &rank_rows_of<T>, py::arg("dist").noconvert(), LABEL_ARGS, py::arg("ties"),
               py::arg("max_rank"), py::arg("topk"), py::arg("repeats"), py::arg("seed"),
               py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_ranking, module) {
    module.doc() = "Retrieval metrics in C++.";
    module.def("average_precision", &average_precision, py::arg("ranks").noconvert());
    module.def("instruction_set", [] { return std::string(isa_name(active_isa())); });
    define_rank_rows<float>(module, "rank_rows_f32");
    define_rank_rows<double>(module, "rank_rows_f64");
}
