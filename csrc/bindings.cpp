// The Python module dml_fast._ranking: converts arguments and results, computes nothing.
#include "bindings.hpp"

#include "hamming.hpp"
#include "isa.hpp"

using namespace dml_fast;

namespace {

std::tuple<double, double, double> average_precision(const Ints& ranks) {
    const std::int64_t* data = data_of(ranks, "ranks", 1);
    double scores[SCORES];
    score_ranks(data, static_cast<std::size_t>(ranks.size()), scores);
    return {scores[AP], scores[AP_TRAPEZOID], scores[INP]};
}

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

#define RULE_ARGS                                                             \
    py::arg("ties"), py::arg("max_rank"), py::arg("topk"), py::arg("repeats"), \
        py::arg("seed"), py::arg("threads")

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
    define_feature_classes(module);
}
