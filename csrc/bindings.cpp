// The Python module dml_fast._ranking: converts arguments and results, computes nothing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "features.hpp"
#include "hamming.hpp"
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

struct Options {
    SingleShot single_shot;
    RankOptions options;

    Options(int ties, std::int64_t max_rank, std::int64_t topk, std::int64_t repeats,
            std::uint64_t seed, int threads)
        : single_shot{repeats, seed},
          options{ties_of(ties), max_rank, topk, repeats < 0 ? nullptr : &single_shot, threads} {
        require(max_rank >= 1 && topk >= 0, "max_rank must be at least 1, topk at least 0");
    }
    Options(const Options&) = delete;  // it points into itself
};

template <class T>
Part rank_rows_of(const Array<T>& dist, const Ints& query_identity, const Ints& item_identity,
                  const Ints& query_camera, const Ints& item_camera, const Ints& member_offsets,
                  const Ints& members, const Ints& junk, int ties, std::int64_t max_rank,
                  std::int64_t topk, std::int64_t repeats, std::uint64_t seed, int threads) {
    const Labels labels = labels_of(query_identity, item_identity, query_camera, item_camera,
                                    member_offsets, members, junk);
    const Options rules(ties, max_rank, topk, repeats, seed, threads);
    const T* rows = data_of(dist, "dist", 2);
    require(dist.shape(0) == labels.queries && dist.shape(1) == labels.items,
            "dist must have a row for each query and a column for each item");
    Arrays arrays(labels.queries, max_rank, topk);
    std::int64_t nans = 0;
    without_gil([&] { nans = rank_rows(rows, labels, rules.options, arrays.out, signalled); });
    return arrays.part(nans);
}

using Codes = Array<std::uint64_t>;

Part rank_codes_of(const Codes& queries, const Codes& gallery, const Ints& query_identity,
                   const Ints& item_identity, const Ints& query_camera, const Ints& item_camera,
                   const Ints& member_offsets, const Ints& members, const Ints& junk, int ties,
                   std::int64_t max_rank, std::int64_t topk, std::int64_t repeats,
                   std::uint64_t seed, int threads) {
    const Labels labels = labels_of(query_identity, item_identity, query_camera, item_camera,
                                    member_offsets, members, junk);
    const Options rules(ties, max_rank, topk, repeats, seed, threads);
    const std::uint64_t* q = data_of(queries, "queries", 2);
    const std::uint64_t* g = data_of(gallery, "gallery", 2);
    const std::int64_t words = queries.shape(1);
    require(queries.shape(0) == labels.queries && gallery.shape(0) == labels.items &&
                gallery.shape(1) == words && words > 0,
            "queries and gallery must have a row for each label and the same columns");
    require(words < 1024, "codes must be shorter than 65,536 bits");
    require(labels.junk_count == 0, "junk must be left out beforehand");
    Arrays arrays(labels.queries, max_rank, topk);
    without_gil([&] { rank_codes(q, g, words, labels, rules.options, arrays.out, signalled); });
    return arrays.part(0);
}

// Keeps the arrays alive that the ranker reads.
template <class T>
class Features {
  public:
    Features(Array<T> queries, Array<T> gallery, bool cosine, Ints query_identity,
             Ints item_identity, Ints query_camera, Ints item_camera, Ints member_offsets,
             Ints members, Ints junk, std::int64_t topk, int threads)
        : kept_{queries,     gallery,        query_identity, item_identity, query_camera,
                item_camera, member_offsets, members,        junk},
          threads_(threads),
          topk_(topk) {
        const Labels labels = labels_of(query_identity, item_identity, query_camera, item_camera,
                                        member_offsets, members, junk);
        queries_ = labels.queries;
        items_ = labels.items;
        const FeatureSets<T> sets{data_of(queries, "queries", 2), data_of(gallery, "gallery", 2),
                                  queries.shape(1), cosine ? Metric::cosine : Metric::euclidean};
        dims_ = sets.dims;
        require(queries.shape(0) == queries_ && gallery.shape(0) == items_ &&
                    gallery.shape(1) == dims_ && dims_ > 0,
                "queries and gallery must have a row for each label and the same columns");
        require(topk >= 0, "topk must be at least 0");
        without_gil([&] {
            ranker_ = std::make_unique<FeatureRanker<T>>(sets, labels, topk, threads, signalled);
        });
    }

    Array<double> query_norms() const { return copy(ranker_->query_norms()); }
    Array<double> item_norms() const { return copy(ranker_->item_norms()); }

    void start(std::int64_t begin, std::int64_t end) {
        require(0 <= begin && begin < end && end <= queries_ && begin % CHUNK == 0,
                "queries begin..end must exist and begin with a whole chunk");
        begin_ = begin;
        end_ = end;
        panel_begin_ = panel_end_ = 0;
        without_gil([&] { ranker_->start(begin, end, threads_, signalled); });
    }

    template <class S>
    void query_operands(Array<S> out, bool loose) {
        S* data = output(out, end_ - begin_, dims_);
        without_gil([&] {
            ranker_->query_operands(reinterpret_cast<Stored<S>*>(data), loose, threads_, signalled);
        });
    }

    template <class S>
    void panel_operands(std::int64_t begin, std::int64_t end, Array<S> out, bool loose) {
        require(0 <= begin && begin < end && end <= items_, "items begin..end must exist");
        S* data = output(out, end - begin, dims_);
        panel_begin_ = begin;
        panel_end_ = end;
        without_gil([&] {
            ranker_->panel_operands(begin, end, reinterpret_cast<Stored<S>*>(data), loose,
                                    threads_, signalled);
        });
    }

    template <class S>
    std::int64_t count(const Array<S>& tile, std::int64_t query, std::int64_t item) {
        const S* data = data_of(tile, "tile", 2);
        const std::int64_t query_end = query + tile.shape(0), item_end = item + tile.shape(1);
        require(begin_ <= query && query_end <= end_ && panel_begin_ <= item &&
                    item_end <= panel_end_,
                "the tile must be of started queries and of the panel");
        const py::gil_scoped_release nogil;
        return ranker_->count(reinterpret_cast<const Stored<S>*>(data), query, query_end, item,
                              item_end);
    }

    Part finish(int ties, std::int64_t max_rank) {
        require(max_rank >= 1, "max_rank must be at least 1");
        const Ties rule = ties_of(ties);
        Arrays arrays(end_ - begin_, max_rank, topk_);
        without_gil([&] { ranker_->finish(rule, max_rank, arrays.out, threads_, signalled); });
        return arrays.part(0);
    }

    Array<double> exact_rows(std::int64_t begin, std::int64_t end) const {
        require(0 <= begin && begin <= end && end <= queries_, "queries begin..end must exist");
        Array<double> rows({end - begin, items_});
        double* data = rows.mutable_data();
        without_gil([&] { ranker_->exact_rows(begin, end, data, threads_, signalled); });
        return rows;
    }

  private:
    // numpy knows no bfloat16: its bits come as int16.
    template <class S>
    using Stored = std::conditional_t<sizeof(S) == 2, std::uint16_t, float>;

    static Array<double> copy(const std::vector<double>& values) {
        return Array<double>(static_cast<py::ssize_t>(values.size()), values.data());
    }

    template <class S>
    static S* output(Array<S>& out, std::int64_t rows, std::int64_t columns) {
        data_of(out, "out", 2);
        require(out.shape(0) == rows && out.shape(1) == columns, "out has another shape");
        return out.mutable_data();
    }

    std::vector<py::array> kept_;
    int threads_;
    std::int64_t topk_, queries_ = 0, items_ = 0, dims_ = 0;
    std::int64_t begin_ = 0, end_ = 0, panel_begin_ = 0, panel_end_ = 0;
    std::unique_ptr<FeatureRanker<T>> ranker_;
};

#define LABEL_ARGS                                                                        \
    py::arg("query_identity").noconvert(), py::arg("item_identity").noconvert(),          \
        py::arg("query_camera").noconvert(), py::arg("item_camera").noconvert(),          \
        py::arg("member_offsets").noconvert(), py::arg("members").noconvert(),            \
        py::arg("junk").noconvert()

#define RULE_ARGS                                                             \
    py::arg("ties"), py::arg("max_rank"), py::arg("topk"), py::arg("repeats"), \
        py::arg("seed"), py::arg("threads")

template <class T>
void define_features(py::module_& module, const char* name) {
    using F = Features<T>;
    // With Python's own metaclass, which type checkers expect.
    py::class_<F>(module, name, py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
        .def(py::init<Array<T>, Array<T>, bool, Ints, Ints, Ints, Ints, Ints, Ints, Ints,
                      std::int64_t, int>(),
             py::arg("queries").noconvert(), py::arg("gallery").noconvert(), py::arg("cosine"),
             LABEL_ARGS, py::arg("topk"), py::arg("threads"))
        .def("query_norms", &F::query_norms)
        .def("item_norms", &F::item_norms)
        .def("start", &F::start, py::arg("begin"), py::arg("end"))
        .def("query_operands_f32", &F::template query_operands<float>,
             py::arg("out").noconvert(), py::arg("loose"))
        .def("query_operands_bf16", &F::template query_operands<std::int16_t>,
             py::arg("out").noconvert(), py::arg("loose"))
        .def("panel_operands_f32", &F::template panel_operands<float>, py::arg("begin"),
             py::arg("end"), py::arg("out").noconvert(), py::arg("loose"))
        .def("panel_operands_bf16", &F::template panel_operands<std::int16_t>, py::arg("begin"),
             py::arg("end"), py::arg("out").noconvert(), py::arg("loose"))
        .def("count_f32", &F::template count<float>, py::arg("tile").noconvert(),
             py::arg("query"), py::arg("item"))
        .def("count_bf16", &F::template count<std::int16_t>, py::arg("tile").noconvert(),
             py::arg("query"), py::arg("item"))
        .def("finish", &F::finish, py::arg("ties"), py::arg("max_rank"))
        .def("exact_rows", &F::exact_rows, py::arg("begin"), py::arg("end"));
}

}  // namespace

PYBIND11_MODULE(_ranking, module) {
    module.doc() = "Retrieval metrics in C++.";
    module.def("average_precision", &average_precision, py::arg("ranks").noconvert());
    module.def("instruction_set", [] { return std::string(isa_name(active_isa())); });
    module.def("has_fast_bf16", &has_fast_bf16);
    module.def("rank_rows_f32", &rank_rows_of<float>, py::arg("dist").noconvert(), LABEL_ARGS,
               RULE_ARGS);
    module.def("rank_rows_f64", &rank_rows_of<double>, py::arg("dist").noconvert(), LABEL_ARGS,
               RULE_ARGS);
    module.def("rank_codes", &rank_codes_of, py::arg("queries").noconvert(),
               py::arg("gallery").noconvert(), LABEL_ARGS, RULE_ARGS);
    define_features<float>(module, "FeaturesF32");
    define_features<double>(module, "FeaturesF64");
}
