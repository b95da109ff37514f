// A team of threads that works off jobs together, and sleeps when there is none.
//
// A job is a list of phases; a phase is done when all its units are, whoever did them. Nobody waits for a thread as
// such: one that the system has put aside holds up the others only while a grain is in its hands, and one that comes
// late takes what is left. On a busy machine that is the difference between slower and standing still.
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

class Job {
   public:
    struct Phase {
        int64_t units;
        int64_t grain;  // units taken at a time
    };

    explicit Job(std::vector<Phase> phases);
    virtual ~Job() = default;

    // Whether memory ran out somewhere; to be asked when the job is done.
    bool failed() const { return failed_.load(); }

   private:
    friend class Team;

    // Does units [begin, end) of a phase whose predecessors are done.
    virtual void compute(size_t phase, int64_t begin, int64_t end, Scratch& scratch) = 0;

    struct alignas(64) Progress {
        std::atomic<int64_t> taken{0};
        std::atomic<int64_t> done{0};
    };

    std::vector<Phase> phases_;
    std::unique_ptr<Progress[]> progress_;
    std::atomic<bool> failed_{false};
};

class Team {
   public:
    // Throws std::system_error when the threads cannot be started.
    explicit Team(int threads);
    ~Team();

    // Returns when the job is done. One caller at a time. A late thread may still look at the job, not at its data.
    void run(const std::shared_ptr<Job>& job);

    int threads() const { return int(workers_.size()) + 1; }

   private:
    void work();
    void stop();
    void take_part(Job& job, Scratch& scratch);
    void changed();
    template <class Condition>
    void wait(int64_t patience_ns, const Condition& condition);

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
