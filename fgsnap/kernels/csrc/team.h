// A team of threads that runs one function together, and sleeps between runs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "tape.h"

namespace fgsnap {

class Team {
   public:
    // Throws std::system_error when the threads cannot be started.
    explicit Team(int threads);
    ~Team();

    using Body = void (*)(void* argument, Team& team, int thread);

    // Runs body on every thread, the caller's being thread 0, and returns when all are done. One caller at a time.
    void run(Body body, void* argument);

    // Within a run: no thread goes on before all have come.
    void barrier();

    int threads() const { return threads_; }
    Scratch& scratch(int thread) { return scratches_[size_t(thread)]; }

   private:
    void work(int thread);
    void stop();
    void change(std::atomic<uint64_t>& value);
    void wait(std::atomic<uint64_t>& value, uint64_t old, int64_t patience_ns);

    const int threads_;
    std::unique_ptr<Scratch[]> scratches_;
    std::vector<std::thread> workers_;
    Body body_ = nullptr;
    void* argument_ = nullptr;
    std::atomic<bool> ending_{false};
    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<uint64_t> runs_{0};
    alignas(64) std::atomic<uint64_t> barriers_{0};
    alignas(64) std::atomic<int> arrived_{0};
};

}  // namespace fgsnap
