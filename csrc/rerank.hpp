// Re-ranking with k-reciprocal neighbours (Zhong et al., CVPR 2017) on sparse sets: memory grows
// with the number of images, not with its square.
//
// N = Q + G images, the queries first; d(i, j) is the squared distance of features and m(i) the
// largest of d(i, .). From each image's k1 + 1 nearest (itself among them):
//     R(i)   those that also have i among theirs, for k = k1; and R'(i) for k = k1 / 2
//     R*(i)  R(i), and R'(c) for each c in R(i) of which more than 2/3 lies in R(i)
//     V(i)   exp(-d(i, j) / m(i)) for j in R*(i), scaled to sum 1; then the mean over the k2
//            nearest of i
//     J(i, j) = 1 - s / (2 - s), s = sum of min(V(i), V(j))
// and the new distance is (1 - lambda) J(i, j) + lambda d(i, j) / m(i).
#pragma once

#include <cstdint>
#include <vector>

#include "features.hpp"

namespace dml_fast {

struct RerankOptions {
    std::int64_t k1, k2;
    double lambda;
};

template <class T>
class Reranker {
   public:
    // `nearest` is (N, k1 + 1), `farthest` (N) the largest z of each image, as FeatureRanker has it
    // for N queries and N items; only the constructor reads them. The features must outlive the
    // reranker; `features.gallery` holds all N images.
    Reranker(const FeatureSets<T>& features, std::int64_t queries, std::int64_t images,
             const std::int64_t* nearest, const double* farthest, const RerankOptions& options,
             int threads, const Poll& interrupted);

    // New distances of the queries begin..end-1 to all G gallery images.
    void rows(std::int64_t begin, std::int64_t end, double* out, int threads,
              const Poll& interrupted) const;

   private:
    struct Entry {
        std::int64_t image;
        float weight;
    };
    // Sparse rows one after the other; offsets (N + 1).
    struct Sparse {
        std::vector<std::int64_t> offsets;
        std::vector<Entry> entries;
    };

    double distance(std::int64_t i, std::int64_t j) const;
    void reciprocal(std::int64_t i, std::int64_t k, std::vector<std::int64_t>& out) const;
    std::vector<Entry> encode(std::int64_t i) const;
    void intersect(std::int64_t i, std::vector<double>& shared) const;
    void blend(std::int64_t i, const double* shared, double* row) const;
    static Sparse pack(std::vector<std::vector<Entry>>& rows);
    Sparse transpose(const Sparse& matrix) const;

    FeatureSets<T> features_;
    const Simd& simd_;
    std::int64_t queries_, images_;
    const std::int64_t* nearest_;
    RerankOptions options_;
    std::vector<double> sizes_, largest_;  // |.|^2, for cosine |.| (1 for 0); and m
    Sparse codes_, images_by_code_;
};

}  // namespace dml_fast
