// Waiting is a short spin, then sleep: the spin spares a wake-up between two phases, and a team that has nothing to do
// uses no processor time.
#include "team.h"

#include <chrono>
#include <cstdlib>
#include <new>
#include <utility>

namespace fgsnap {
namespace {

constexpr int64_t BETWEEN_PHASES_NS = 30'000;  // about what a sleep and a wake-up cost
constexpr int64_t BETWEEN_JOBS_NS = 3'000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

char* Scratch::need(size_t bytes) {
    if (bytes > size_) {
        std::free(data_);
        size_ = (bytes + bytes / 2 + 4095) / 4096 * 4096;
        data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
        if (data_ == nullptr) {
            size_ = 0;
            throw std::bad_alloc();
        }
    }
    return data_;
}

Job::Job(std::vector<Phase> phases, int threads)
    : phases_(std::move(phases)), threads_(threads), counters_(new Counter[phases_.size() * size_t(threads + 1)]) {}

Team::Team(int threads) : threads_(threads < 1 ? 1 : threads) {
    try {
        for (int i = 1; i < threads_; ++i) workers_.emplace_back(&Team::work, this, i);
    } catch (...) {
        stop();
        throw;
    }
}

Team::~Team() { stop(); }

void Team::stop() {
    ending_.store(true);
    changed();
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::shared_ptr<Job>& job) {
    if (!workers_.empty()) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            jobs_.fetch_add(1);
        }
        changed();
    }
    take_part(*job, 0, scratch_);
}

void Team::work(int self) {
    Scratch scratch;
    for (uint64_t seen = 0;;) {
        wait(BETWEEN_JOBS_NS, [&] { return jobs_.load() != seen || ending_.load(); });
        if (ending_.load()) return;
        std::shared_ptr<Job> job;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job = job_;
            seen = jobs_.load();
        }
        take_part(*job, self, scratch);
    }
}

void Team::take_part(Job& job, int self, Scratch& scratch) {
    for (size_t i = 0; i < job.phases_.size(); ++i) {
        const int64_t ranges = job.ranges(job.phases_[i]);
        for (int64_t k = 0; k < ranges; ++k) take_range(job, i, (self + k) % ranges, scratch);
        job.meanwhile(i, self);
        wait(BETWEEN_PHASES_NS, [&] { return job.done(i).value.load() >= job.phases_[i].units; });
    }
}

void Team::take_range(Job& job, size_t phase, int64_t range, Scratch& scratch) {
    const auto [units, grain] = job.phases_[phase];
    const int64_t ranges = job.ranges({units, grain});
    const int64_t first = units * range / ranges, until = units * (range + 1) / ranges;
    std::atomic<int64_t>& taken = job.taken(phase, range).value;
    if (first + taken.load() >= until) return;
    for (int64_t begin; (begin = first + taken.fetch_add(grain)) < until;) {
        const int64_t end = begin + grain < until ? begin + grain : until;
        try {
            job.compute(phase, {begin, end, until, scratch});
        } catch (const std::bad_alloc&) {
            job.failed_.store(true);
        }
        if (job.done(phase).value.fetch_add(end - begin) + end - begin == units) changed();
    }
}

// A sleeper counts itself before it looks at the condition for the last time, and a change is made before the sleepers
// are counted; both in one total order, so one of the two sees the other.
void Team::changed() {
    if (sleepers_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    woken_.notify_all();
}

template <class Condition>
void Team::wait(int64_t patience_ns, const Condition& condition) {
    using Clock = std::chrono::steady_clock;
    if (condition()) return;
    const auto give_up = Clock::now() + std::chrono::nanoseconds(patience_ns);
    do {
        for (int i = 0; i < 16; ++i) {
            relax();
            if (condition()) return;
        }
    } while (Clock::now() < give_up);
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    woken_.wait(lock, condition);
    sleepers_.fetch_sub(1);
}

}  // namespace fgsnap
