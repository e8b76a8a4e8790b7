// The Python module dml_fast._native: converts arguments and results, computes nothing.
#include "bindings.hpp"

#include "hamming.hpp"
#include "isa.hpp"
#include "sets.hpp"

#include <cstring>

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

Sets sets_of(const Ints& offsets, const Ints& members, std::int64_t images) {
    const Sets sets{offsets.size() - 1, data_of(offsets, "offsets", 1),
                    data_of(members, "members", 1)};
    require(sets.count >= 0 && std::is_sorted(sets.offsets, sets.offsets + offsets.size()) &&
                sets.offsets[0] == 0 && sets.offsets[sets.count] == members.size() &&
                std::all_of(sets.members, sets.members + members.size(),
                            [&](std::int64_t image) { return 0 <= image && image < images; }),
            "offsets and members must describe sets of the images");
    return sets;
}

Array<double> reduce_rows_of(const Array<double>& dist, const Ints& query_identity,
                             const Ints& item_identity, const Ints& query_camera,
                             const Ints& item_camera, const Ints& member_offsets,
                             const Ints& members, const Ints& junk, const Ints& query_offsets,
                             const Ints& query_members, const Ints& item_offsets,
                             const Ints& item_members, int reduction, double temperature,
                             int threads) {
    const Labels labels = labels_of(query_identity, item_identity, query_camera, item_camera,
                                    member_offsets, members, junk);
    const double* rows = data_of(dist, "dist", 2);
    require(dist.shape(0) == labels.queries && dist.shape(1) == labels.items,
            "dist must have a row for each query and a column for each item");
    const Sets queries = sets_of(query_offsets, query_members, labels.queries);
    const Sets items = sets_of(item_offsets, item_members, labels.items);
    require(0 <= reduction && reduction <= 2 && temperature > 0, "reduction must be 0..2");
    Array<double> out({queries.count, items.count});
    double* data = out.mutable_data();
    without_gil([&] {
        reduce_rows(rows, labels, queries, items, static_cast<Reduction>(reduction), temperature,
                    data, threads, signalled);
    });
    return out;
}

#define RULE_ARGS                                                             \
    py::arg("ties"), py::arg("max_rank"), py::arg("topk"), py::arg("repeats"), \
        py::arg("seed"), py::arg("threads")

}  // namespace

PYBIND11_MODULE(_native, module) {
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const BadEnvironment& error) {
            const py::object type = py::module_::import("dml_fast.errors").attr("UserError");
            const char* const text = error.what();  // which may hold any bytes
            const auto message = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
                text, static_cast<py::ssize_t>(std::strlen(text)), "backslashreplace"));
            PyErr_SetObject(type.ptr(), message.ptr());
        }
    });
    module.doc() =
        "Rank a gallery, augment images and compute the mutual loss, in C++ without the GIL.";
    module.def("average_precision", &average_precision, py::arg("ranks").noconvert());
    module.def("instruction_set", [] { return std::string(isa_name(active_isa())); });
    module.def("has_fast_bf16", &has_fast_bf16);
    module.def("rank_rows_f32", &rank_rows_of<float>, py::arg("dist").noconvert(), LABEL_ARGS,
               RULE_ARGS);
    module.def("rank_rows_f64", &rank_rows_of<double>, py::arg("dist").noconvert(), LABEL_ARGS,
               RULE_ARGS);
    module.def("rank_codes", &rank_codes_of, py::arg("queries").noconvert(),
               py::arg("gallery").noconvert(), LABEL_ARGS, RULE_ARGS);
    module.def("reduce_rows", &reduce_rows_of, py::arg("dist").noconvert(), LABEL_ARGS,
               py::arg("query_offsets").noconvert(), py::arg("query_members").noconvert(),
               py::arg("item_offsets").noconvert(), py::arg("item_members").noconvert(),
               py::arg("reduction"), py::arg("temperature"), py::arg("threads"));
    define_feature_classes(module);
    define_augment(module);
    define_mutual_loss(module);
}
