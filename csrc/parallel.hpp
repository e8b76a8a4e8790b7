// Work shared between threads. Results never depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace dml_fast {

// Thrown when the caller's `interrupted` returns true.
struct Interrupted : std::runtime_error {
    Interrupted() : std::runtime_error("interrupted") {}
};

// Thrown in a worker that has to leave; parallel_for catches it.
struct Stopped {};

// Whether this thread's parallel_for wants its workers to leave; null outside of one.
inline thread_local const std::atomic<bool>* stop_of_this_thread = nullptr;

// To be called now and then where one item of a worker may take longer than a user waits after
// Ctrl-C.
inline void leave_if_stopped() {
    if (stop_of_this_thread != nullptr && stop_of_this_thread->load(std::memory_order_relaxed)) {
        throw Stopped{};
    }
}

// While it lives, this thread rounds to nearest and computes with denormals, whatever the caller
// set: thresholds one step apart may both be denormal.
class DefaultFloats {
#if defined(__SSE2__) || defined(_M_X64)
   public:
    DefaultFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~DefaultFloats() { _mm_setcsr(saved_); }
    DefaultFloats(const DefaultFloats&) = delete;
    DefaultFloats& operator=(const DefaultFloats&) = delete;

   private:
    unsigned saved_;
#endif
};

// Calls `make_worker()(item)` for item = 0..items-1, each once, in any order. Every thread has its
// own worker, hence its own scratch memory. The calling thread only waits: about 20 times a second
// it asks `interrupted()`, and Interrupted is thrown once all threads have stopped. Threads live
// for one call, so that no fork can break them.
template <class Poll, class MakeWorker>
void parallel_for(std::int64_t items, int threads, const Poll& interrupted,
                  const MakeWorker& make_worker) {
    if (items <= 0) return;
    const auto count =
        static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::min<std::int64_t>(items, 1024)));
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> stop{false};
    std::mutex mutex;
    std::condition_variable finished;
    int running = count;
    std::exception_ptr error;

    const auto run = [&] {
        const DefaultFloats guard;
        stop_of_this_thread = &stop;
        try {
            auto worker = make_worker();
            while (!stop.load(std::memory_order_relaxed)) {
                const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
                if (item >= items) break;
                worker(item);
            }
        } catch (const Stopped&) {
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
            stop = true;
        }
        const std::lock_guard<std::mutex> lock(mutex);
        --running;
        finished.notify_one();
    };

    std::vector<std::thread> pool;
    pool.reserve(static_cast<std::size_t>(count));
    bool was_interrupted = false;
    try {
        for (int i = 0; i < count; ++i) pool.emplace_back(run);
    } catch (const std::system_error&) {  // the machine has no more threads: continue with fewer
        const std::lock_guard<std::mutex> lock(mutex);
        running -= count - static_cast<int>(pool.size());
        if (pool.empty()) throw;
    }
    {
        std::unique_lock<std::mutex> lock(mutex);
        while (running > 0) {
            finished.wait_for(lock, std::chrono::milliseconds(50));
            if (running == 0 || was_interrupted) continue;
            lock.unlock();  // a worker must not wait for a signal handler
            if (interrupted()) {
                was_interrupted = true;
                stop = true;
            }
            lock.lock();
        }
    }
    for (std::thread& thread : pool) thread.join();
    if (error) std::rethrow_exception(error);
    if (was_interrupted) throw Interrupted();
}

}  // namespace dml_fast
