// The single-gallery-shot CMC of CUHK03: one valid gallery image of each identity is drawn.
#pragma once

#include <cstdint>
#include <vector>

#include "labels.hpp"
#include "scores.hpp"

namespace dml_fast {

struct SingleShot {
    std::int64_t repeats;  // 0: the exact mean over all draws
    std::uint64_t seed;
};

// One per thread: keeps its scratch memory from row to row.
template <class T>
class SingleShotRanker {
  public:
    SingleShotRanker(const Labels& labels, SingleShot how, Ties ties, std::int64_t max_rank);

    // Adds to first_at[r] the probability that the query's positive has rank r + 1. The query
    // must have a valid positive.
    void rank(const T* row, std::int64_t query, double* first_at);

  private:
    void collect(std::int64_t query);
    void exact(const T* row, double* first_at);
    void drawn(const T* row, std::int64_t query, double* first_at);
    void add_chances(double tied_before, double weight, double* first_at);

    const Labels& labels_;
    SingleShot how_;
    Ties ties_;
    std::int64_t max_rank_;
    std::vector<std::int64_t> positives_;
    // Other identities with valid images; of the images, how many are nearer than a positive, and
    // how many are at its distance.
    struct Rival {
        std::int64_t identity, images, nearer, tied;
    };
    std::vector<Rival> rivals_;
    std::vector<double> chances_;  // of 0, 1, ... rivals before the positive
};

}  // namespace dml_fast
