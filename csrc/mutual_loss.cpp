#include "mutual_loss.hpp"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.hpp"

namespace dml_fast {
namespace {

// Fresh memory in pages of 2 MiB, where the system leaves the choice to the program: the first
// write to each of 65,536 small ones took longer than all computing.
void ask_for_large_pages(const MutualProblem& problem, const MutualResult& out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t LARGE = std::uintptr_t{1} << 21;
    const std::int64_t item = problem.bf16 && !out.float_grads ? 2 : 4;
    for (void* grad : out.grads) {
        const auto begin = (reinterpret_cast<std::uintptr_t>(grad) + LARGE - 1) / LARGE * LARGE;
        const auto end = (reinterpret_cast<std::uintptr_t>(grad) +
                          static_cast<std::uintptr_t>(item * problem.rows * problem.classes)) /
                         LARGE * LARGE;
        if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#else
    (void)problem, (void)out;
#endif
}

}  // namespace

void mutual_loss(const MutualProblem& problem, const MutualResult& out, int threads,
                 const std::function<bool()>& interrupted) {
    const std::int64_t tasks = (problem.rows + ROWS_OF_TASK - 1) / ROWS_OF_TASK;
    const std::int64_t students = problem.students;
    ask_for_large_pages(problem, out);
    const auto cells = static_cast<std::size_t>(tasks * students);
    std::vector<double> ce(cells, 0.0), kl(cells, 0.0);
    std::vector<std::int64_t> correct(cells, 0);
    std::vector<std::uint8_t> unusable(cells, 0);
    const auto run = [&](const auto& make_worker) {
        if (threads <= 1) {
            const DefaultFloats guard;
            auto worker = make_worker();
            for (std::int64_t task = 0; task < tasks; ++task) worker(task);
        } else {
            parallel_for(tasks, threads, interrupted, make_worker);
        }
    };
    const RowSums sums{ce.data(), kl.data(), correct.data(), unusable.data()};
    run([&] {
        return problem.labels ? label_worker(problem, out, sums) : row_worker(problem, out, sums);
    });
    for (std::int64_t k = 0; k < students; ++k) {
        out.ce[k] = out.kl[k] = 0.0;
        out.correct[k] = 0;
        out.finite[k] = true;
        for (std::int64_t task = 0; task < tasks; ++task) {
            out.ce[k] += ce[static_cast<std::size_t>(task * students + k)];
            out.kl[k] += kl[static_cast<std::size_t>(task * students + k)];
            out.correct[k] += correct[static_cast<std::size_t>(task * students + k)];
            if (unusable[static_cast<std::size_t>(task * students + k)]) out.finite[k] = false;
        }
    }
}

}  // namespace dml_fast
