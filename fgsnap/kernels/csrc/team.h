// A team of threads that works off jobs together, and sleeps when there is none.
//
// A job is a list of phases; a phase is done when all its units are, whoever did them. Each thread has a range of the
// units that it begins with, so that it reads one stretch of memory, and then helps with what others have left. Nobody
// waits for a thread as such: one that the system has put aside holds up the others only while a grain is in its hands,
// and one that comes late takes what is left. On a busy machine that is the difference between slower and standing still.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "program.h"

namespace fgsnap {

class Job {
   public:
    struct Phase {
        int64_t units;
        int64_t grain;  // units taken at a time
    };

    Job(std::vector<Phase> phases, int threads);
    virtual ~Job() = default;

    // Whether memory ran out somewhere; to be asked when the job is done.
    bool failed() const { return failed_.load(); }

   private:
    friend class Team;

    // Does a share of a phase whose predecessors are done.
    virtual void compute(size_t phase, const Share& share) = 0;

    // What a thread does between its last share of a phase and the others' last ones.
    virtual void meanwhile(size_t, int) {}

    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };

    int64_t ranges(const Phase& phase) const { return phase.grain < phase.units ? threads_ : 1; }
    Counter& taken(size_t phase, int64_t range) { return counters_[phase * size_t(threads_ + 1) + 1 + size_t(range)]; }
    Counter& done(size_t phase) { return counters_[phase * size_t(threads_ + 1)]; }

    const std::vector<Phase> phases_;
    const int threads_;
    const std::unique_ptr<Counter[]> counters_;
    std::atomic<bool> failed_{false};

   protected:
    // The first unit of a phase that a thread begins with.
    int64_t first_unit(size_t phase, int thread) const {
        const int64_t count = ranges(phases_[phase]);
        return phases_[phase].units * (thread % count) / count;
    }
};

class Team {
   public:
    // Throws std::system_error when the threads cannot be started.
    explicit Team(int threads);
    ~Team();

    // Returns when the job is done. One caller at a time. A late thread may still look at the job, not at its data.
    void run(const std::shared_ptr<Job>& job);

    int threads() const { return threads_; }

   private:
    void work(int self);
    void stop();
    void take_part(Job& job, int self, Scratch& scratch);
    void take_range(Job& job, size_t phase, int64_t range, Scratch& scratch);
    void changed();
    template <class Condition>
    void wait(int64_t patience_ns, const Condition& condition);

    const int threads_;
    Scratch scratch_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable woken_;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> ending_{false};
    std::atomic<uint64_t> jobs_{0};
    std::shared_ptr<Job> job_;  // the latest; guarded by mutex_
};

}  // namespace fgsnap
