#include "rerank.hpp"

#include <algorithm>
#include <cmath>

#include "parallel.hpp"

namespace dml_fast {

namespace {

// Squared distances, from the images' sizes and the product of their features.
constexpr auto cosine = [](double a, double b, double product) {
    return std::max(0.0, 2.0 - 2.0 * product / (a * b));
};
constexpr auto euclidean = [](double a, double b, double product) {
    return std::max(0.0, a + b - 2.0 * product);
};

}  // namespace

template <class T>
Reranker<T>::Reranker(const FeatureSets<T>& features, std::int64_t queries, std::int64_t images,
                      const std::int64_t* nearest, const double* farthest,
                      const RerankOptions& options, int threads, const Poll& interrupted)
    : features_(features),
      simd_(active_simd()),
      queries_(queries),
      images_(images),
      nearest_(nearest),
      options_(options),
      sizes_(static_cast<std::size_t>(images)),
      largest_(static_cast<std::size_t>(images)) {
    const auto each = [&](const auto& work) {
        parallel_for(images_, threads, interrupted, [&] { return work; });
    };
    each([&](std::int64_t i) {
        const T* row = features_.gallery + i * features_.dims;
        const double squared = simd_.dot(row, row, features_.dims);
        double& size = sizes_[static_cast<std::size_t>(i)];
        size = squared;
        if (features_.metric == Metric::cosine) size = squared == 0.0 ? 1.0 : std::sqrt(squared);
    });
    std::vector<std::vector<Entry>> rows(static_cast<std::size_t>(images));
    each([&](std::int64_t i) {
        const auto at = static_cast<std::size_t>(i);
        const bool cosine = features_.metric == Metric::cosine;
        largest_[at] = cosine ? 2.0 + 2.0 * farthest[i] / sizes_[at]
                              : sizes_[at] + 2.0 * farthest[i];
        if (!(largest_[at] > 0.0)) largest_[at] = 1.0;  // all images are the same
        rows[at] = encode(i);
    });
    codes_ = pack(rows);
    if (options_.k2 > 1) {
        // The mean over the k2 nearest: each thread has a row of N sums, zero again after each use.
        parallel_for(images_, threads, interrupted, [&] {
            return [&, sums = std::vector<double>(static_cast<std::size_t>(images_)),
                    touched = std::vector<std::int64_t>()](std::int64_t i) mutable {
                touched.clear();
                for (std::int64_t n = 0; n < options_.k2; ++n) {
                    const std::int64_t image = nearest_[i * (options_.k1 + 1) + n];
                    for (auto e = codes_.offsets[static_cast<std::size_t>(image)];
                         e < codes_.offsets[static_cast<std::size_t>(image) + 1]; ++e) {
                        const Entry& entry = codes_.entries[static_cast<std::size_t>(e)];
                        double& sum = sums[static_cast<std::size_t>(entry.image)];
                        if (sum == 0.0) touched.push_back(entry.image);
                        sum += static_cast<double>(entry.weight);
                    }
                }
                std::sort(touched.begin(), touched.end());
                auto& row = rows[static_cast<std::size_t>(i)];
                for (std::int64_t image : touched) {
                    double& sum = sums[static_cast<std::size_t>(image)];
                    const double mean = sum / static_cast<double>(options_.k2);
                    row.push_back({image, static_cast<float>(mean)});
                    sum = 0.0;
                }
            };
        });
        codes_ = pack(rows);
    }
    images_by_code_ = transpose(codes_);
    nearest_ = nullptr;
}

template <class T>
double Reranker<T>::distance(std::int64_t i, std::int64_t j) const {
    const std::int64_t dims = features_.dims;
    const double product =
        simd_.dot(features_.gallery + i * dims, features_.gallery + j * dims, dims);
    const double a = sizes_[static_cast<std::size_t>(i)];
    const double b = sizes_[static_cast<std::size_t>(j)];
    return features_.metric == Metric::cosine ? cosine(a, b, product) : euclidean(a, b, product);
}

// Of the k + 1 nearest images those that have i among their own k + 1 nearest, nearest first.
template <class T>
void Reranker<T>::reciprocal(std::int64_t i, std::int64_t k, std::vector<std::int64_t>& out) const {
    const std::int64_t width = options_.k1 + 1;
    out.clear();
    for (std::int64_t n = 0; n <= k; ++n) {
        const std::int64_t image = nearest_[i * width + n];
        const std::int64_t* theirs = nearest_ + image * width;
        if (std::find(theirs, theirs + k + 1, i) != theirs + k + 1) out.push_back(image);
    }
}

template <class T>
std::vector<typename Reranker<T>::Entry> Reranker<T>::encode(std::int64_t i) const {
    std::vector<std::int64_t> own, theirs, all;
    reciprocal(i, options_.k1, own);
    all = own;
    // Half of k1, rounded to even at one half, as numpy does.
    const auto half = static_cast<std::int64_t>(
        std::nearbyint(static_cast<double>(options_.k1) / 2.0));
    for (std::int64_t candidate : own) {
        reciprocal(candidate, half, theirs);
        const auto shared = std::count_if(theirs.begin(), theirs.end(), [&](std::int64_t image) {
            return std::find(own.begin(), own.end(), image) != own.end();
        });
        if (3 * shared > 2 * static_cast<std::int64_t>(theirs.size())) {
            all.insert(all.end(), theirs.begin(), theirs.end());
        }
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    std::vector<double> weights;
    double total = 0.0;
    for (std::int64_t image : all) {
        weights.push_back(std::exp(-distance(i, image) / largest_[static_cast<std::size_t>(i)]));
        total += weights.back();
    }
    std::vector<Entry> row;
    row.reserve(all.size());
    for (std::size_t n = 0; n < all.size(); ++n) {
        row.push_back({all[n], static_cast<float>(weights[n] / total)});
    }
    return row;
}

// Empties the rows.
template <class T>
typename Reranker<T>::Sparse Reranker<T>::pack(std::vector<std::vector<Entry>>& rows) {
    Sparse packed;
    packed.offsets.push_back(0);
    std::size_t total = 0;
    for (const auto& row : rows) total += row.size();
    packed.entries.reserve(total);
    for (auto& row : rows) {
        packed.entries.insert(packed.entries.end(), row.begin(), row.end());
        packed.offsets.push_back(static_cast<std::int64_t>(packed.entries.size()));
        std::vector<Entry>().swap(row);
    }
    return packed;
}

template <class T>
typename Reranker<T>::Sparse Reranker<T>::transpose(const Sparse& matrix) const {
    Sparse result;
    result.offsets.assign(static_cast<std::size_t>(images_) + 1, 0);
    result.entries.resize(matrix.entries.size());
    for (const Entry& entry : matrix.entries) {
        ++result.offsets[static_cast<std::size_t>(entry.image) + 1];
    }
    for (std::size_t i = 1; i < result.offsets.size(); ++i) {
        result.offsets[i] += result.offsets[i - 1];
    }
    std::vector<std::int64_t> next(result.offsets.begin(), result.offsets.end() - 1);
    for (std::int64_t row = 0; row < images_; ++row) {
        for (auto e = matrix.offsets[static_cast<std::size_t>(row)];
             e < matrix.offsets[static_cast<std::size_t>(row) + 1]; ++e) {
            const Entry& entry = matrix.entries[static_cast<std::size_t>(e)];
            std::int64_t& at = next[static_cast<std::size_t>(entry.image)];
            result.entries[static_cast<std::size_t>(at++)] = {row, entry.weight};
        }
    }
    return result;
}

// Sums of min(V(i), V(j)) for all images j.
template <class T>
void Reranker<T>::intersect(std::int64_t i, std::vector<double>& shared) const {
    shared.assign(static_cast<std::size_t>(images_), 0.0);
    for (auto e = codes_.offsets[static_cast<std::size_t>(i)];
         e < codes_.offsets[static_cast<std::size_t>(i) + 1]; ++e) {
        const Entry& mine = codes_.entries[static_cast<std::size_t>(e)];
        const auto code = static_cast<std::size_t>(mine.image);
        for (auto o = images_by_code_.offsets[code]; o < images_by_code_.offsets[code + 1]; ++o) {
            const Entry& other = images_by_code_.entries[static_cast<std::size_t>(o)];
            shared[static_cast<std::size_t>(other.image)] +=
                static_cast<double>(std::min(mine.weight, other.weight));
        }
    }
}

// `row` holds the products with the gallery images, and then the new distances.
template <class T>
void Reranker<T>::blend(std::int64_t i, const double* shared, double* row) const {
    const std::int64_t items = images_ - queries_;
    const double lambda = options_.lambda;
    const double share = lambda / largest_[static_cast<std::size_t>(i)];
    if (!(share > 0.0)) {
        for (std::int64_t g = 0; g < items; ++g) {
            row[g] = (1.0 - lambda) * (1.0 - shared[g] / (2.0 - shared[g]));
        }
        return;
    }
    const double* sizes = sizes_.data() + queries_;
    const double size = sizes_[static_cast<std::size_t>(i)];
    const auto fill = [&](const auto& distance) {
        for (std::int64_t g = 0; g < items; ++g) {
            const double jaccard = (1.0 - lambda) * (1.0 - shared[g] / (2.0 - shared[g]));
            row[g] = jaccard + share * distance(size, sizes[g], row[g]);
        }
    };
    if (features_.metric == Metric::cosine) {
        fill(cosine);
    } else {
        fill(euclidean);
    }
}

template <class T>
void Reranker<T>::rows(std::int64_t begin, std::int64_t end, double* out, int threads,
                       const Poll& interrupted) const {
    const std::int64_t items = images_ - queries_, dims = features_.dims;
    std::vector<double> widened;
    for (std::int64_t first = begin; first < end; first += FEATURE_ROWS) {
        const std::int64_t count = std::min(FEATURE_ROWS, end - first);
        double* const block = out + (first - begin) * items;
        if (options_.lambda > 0.0) {
            // Pieces of the gallery stay in the cache while all queries of the block meet them.
            const T* rows = features_.gallery + first * dims;
            widened.assign(rows, rows + count * dims);
            parallel_for((items + FEATURE_ROWS - 1) / FEATURE_ROWS, threads, interrupted, [&] {
                return [&](std::int64_t piece) {
                    const std::int64_t g = piece * FEATURE_ROWS;
                    simd_.dots(widened.data(), count, features_.gallery + (queries_ + g) * dims,
                                  std::min(FEATURE_ROWS, items - g), dims, block + g, items);
                };
            });
        }
        parallel_for(count, threads, interrupted, [&] {
            return [&, shared = std::vector<double>()](std::int64_t at) mutable {
                intersect(first + at, shared);
                blend(first + at, shared.data() + queries_, block + at * items);
            };
        });
    }
}

template class Reranker<float>;
template class Reranker<double>;

}  // namespace dml_fast
