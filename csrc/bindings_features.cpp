// The classes of dml_fast._native that work on features. They convert arguments, no more.
#include <memory>
#include <vector>

#include "bindings.hpp"
#include "features.hpp"
#include "rerank.hpp"

namespace dml_fast {

namespace {

// Keeps the arrays alive that the ranker reads.
template <class T>
class Features {
  public:
    Features(Array<T> queries, Array<T> gallery, bool cosine, Ints query_identity,
             Ints item_identity, Ints query_camera, Ints item_camera, Ints member_offsets,
             Ints members, Ints junk, std::int64_t topk, bool farthest, int threads)
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
            ranker_ = std::make_unique<FeatureRanker<T>>(sets, labels, topk, farthest, threads,
                                                         signalled);
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

    std::tuple<Ints, Array<double>> neighbours() {
        Ints nearest({end_ - begin_, topk_});
        Array<double> farthest(end_ - begin_);
        std::int64_t* items = nearest.mutable_data();
        double* z = farthest.mutable_data();
        without_gil([&] { ranker_->neighbours(items, z, threads_, signalled); });
        return {nearest, farthest};
    }

    Array<double> exact_rows(std::int64_t begin, std::int64_t end) const {
        require(0 <= begin && begin <= end && end <= queries_, "queries begin..end must exist");
        Array<double> rows({end - begin, items_});
        double* data = rows.mutable_data();
        without_gil([&] { ranker_->exact_rows(begin, end, data, threads_, signalled); });
        return rows;
    }

  private:
    // numpy has no bfloat16: its bits come as int16.
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

template <class T>
class Rerank {
  public:
    Rerank(Array<T> images, std::int64_t queries, bool cosine, const Ints& nearest,
           const Array<double>& farthest, std::int64_t k1, std::int64_t k2, double lambda_value,
           int threads)
        : images_(images), queries_(queries), threads_(threads) {
        const T* data = data_of(images, "images", 2);
        const std::int64_t count = images.shape(0);
        const std::int64_t* neighbours = data_of(nearest, "nearest", 2);
        const double* z = data_of(farthest, "farthest", 1);
        require(0 < queries && queries < count, "queries must be some of the images");
        require(1 <= k1 && 1 <= k2 && k2 <= k1 + 1, "k1 and k2 must fit: 1 <= k2 <= k1 + 1");
        require(nearest.shape(0) == count && nearest.shape(1) == k1 + 1 &&
                    farthest.shape(0) == count,
                "nearest must be (images, k1 + 1), farthest (images,)");
        require(std::all_of(neighbours, neighbours + nearest.size(),
                            [&](std::int64_t i) { return 0 <= i && i < count; }),
                "nearest must hold numbers of images");
        const FeatureSets<T> sets{data, data, images.shape(1),
                                  cosine ? Metric::cosine : Metric::euclidean};
        without_gil([&] {
            reranker_ = std::make_unique<Reranker<T>>(sets, queries, count, neighbours, z,
                                                      RerankOptions{k1, k2, lambda_value}, threads,
                                                      signalled);
        });
    }

    Array<double> rows(std::int64_t begin, std::int64_t end) const {
        require(0 <= begin && begin <= end && end <= queries_, "queries begin..end must exist");
        Array<double> result({end - begin, static_cast<std::int64_t>(images_.shape(0)) - queries_});
        double* data = result.mutable_data();
        without_gil([&] { reranker_->rows(begin, end, data, threads_, signalled); });
        return result;
    }

  private:
    Array<T> images_;
    std::int64_t queries_;
    int threads_;
    std::unique_ptr<Reranker<T>> reranker_;
};

template <class T>
void define_features(py::module_& module, const char* name) {
    using F = Features<T>;
    // Python's own metaclass, as type checkers expect.
    py::class_<F>(module, name, py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
        .def(py::init<Array<T>, Array<T>, bool, Ints, Ints, Ints, Ints, Ints, Ints, Ints,
                      std::int64_t, bool, int>(),
             py::arg("queries").noconvert(), py::arg("gallery").noconvert(), py::arg("cosine"),
             LABEL_ARGS, py::arg("topk"), py::arg("farthest"), py::arg("threads"))
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
        .def("neighbours", &F::neighbours)
        .def("exact_rows", &F::exact_rows, py::arg("begin"), py::arg("end"));
}

template <class T>
void define_rerank(py::module_& module, const char* name) {
    using R = Rerank<T>;
    py::class_<R>(module, name, py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
        .def(py::init<Array<T>, std::int64_t, bool, Ints, Array<double>, std::int64_t,
                      std::int64_t, double, int>(),
             py::arg("images").noconvert(), py::arg("queries"), py::arg("cosine"),
             py::arg("nearest").noconvert(), py::arg("farthest").noconvert(), py::arg("k1"),
             py::arg("k2"), py::arg("lambda_value"), py::arg("threads"))
        .def("rows", &R::rows, py::arg("begin"), py::arg("end"));
}

}  // namespace

void define_feature_classes(py::module_& module) {
    define_features<float>(module, "FeaturesF32");
    define_features<double>(module, "FeaturesF64");
    define_rerank<float>(module, "RerankF32");
    define_rerank<double>(module, "RerankF64");
}

}  // namespace dml_fast
