#include "sets.hpp"

#include <cmath>
#include <limits>

#include "parallel.hpp"

namespace dml_fast {

namespace {

// Keeps the smallest value and sums relative to it, so that no exponential overflows.
class Reducer {
   public:
    Reducer(Reduction reduction, double temperature)
        : reduction_(reduction), temperature_(temperature) {}

    void add(double value) {
        ++count_;
        if (reduction_ == Reduction::mean) {
            sum_ += value;
        } else if (reduction_ == Reduction::log_sum_exp && std::isfinite(value)) {
            if (value < smallest_) {
                sum_ = sum_ * std::exp((value - smallest_) / temperature_) + 1.0;
            } else {
                sum_ += std::exp((smallest_ - value) / temperature_);
            }
        }
        if (std::isnan(value)) nan_ = true;
        if (value < smallest_) smallest_ = value;
    }

    double result() const {
        if (count_ == 0 || nan_) return std::numeric_limits<double>::quiet_NaN();
        const auto count = static_cast<double>(count_);
        if (reduction_ == Reduction::mean) return sum_ / count;
        if (reduction_ == Reduction::min || !std::isfinite(smallest_)) return smallest_;
        return smallest_ - temperature_ * std::log(sum_ / count);
    }

   private:
    Reduction reduction_;
    double temperature_;
    std::int64_t count_ = 0;
    bool nan_ = false;
    double sum_ = 0.0;
    double smallest_ = std::numeric_limits<double>::infinity();
};

}  // namespace

void reduce_rows(const double* dist, const Labels& labels, const Sets& query_sets,
                 const Sets& gallery_sets, Reduction reduction, double temperature, double* out,
                 int threads, const Poll& interrupted) {
    parallel_for(query_sets.count, threads, interrupted, [&] {
        return [&](std::int64_t i) {
            for (std::int64_t s = 0; s < gallery_sets.count; ++s) {
                Reducer reducer(reduction, temperature);
                for (std::int64_t q = query_sets.offsets[i]; q < query_sets.offsets[i + 1]; ++q) {
                    leave_if_stopped();
                    const std::int64_t query = query_sets.members[q];
                    const double* row = dist + query * labels.items;
                    for (std::int64_t m = gallery_sets.offsets[s]; m < gallery_sets.offsets[s + 1];
                         ++m) {
                        const std::int64_t item = gallery_sets.members[m];
                        if (labels.valid(query, item)) reducer.add(row[item]);
                    }
                }
                out[i * gallery_sets.count + s] = reducer.result();
            }
        };
    });
}

}  // namespace dml_fast
