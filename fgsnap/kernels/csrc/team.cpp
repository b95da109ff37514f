// Waiting is a short spin, then sleep: a spin inside a run spares the wake-up between two ops, and a team that has
// nothing to do uses no processor time.
#include "team.h"

#include <chrono>
#include <cstdlib>
#include <new>

namespace fgsnap {
namespace {

constexpr int64_t BETWEEN_OPS_NS = 30'000;  // about what a sleep and a wake-up cost
constexpr int64_t BETWEEN_RUNS_NS = 3'000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

float* Scratch::need(size_t floats) {
    if (floats > size_) {
        std::free(data_);
        size_ = (floats + floats / 2 + 1023) / 1024 * 1024;
        data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
        if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
}

Team::Team(int threads) : threads_(threads), scratches_(new Scratch[size_t(threads)]) {
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back(&Team::work, this, i);
    } catch (...) {
        stop();
        throw;
    }
}

Team::~Team() { stop(); }

void Team::stop() {
    ending_.store(true);
    change(runs_);
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(Body body, void* argument) {
    body_ = body;
    argument_ = argument;
    if (threads_ > 1) change(runs_);
    body(argument, *this, 0);
    barrier();
}

void Team::work(int thread) {
    for (uint64_t seen = 0;;) {
        wait(runs_, seen, BETWEEN_RUNS_NS);
        if (ending_.load()) return;
        ++seen;
        body_(argument_, *this, thread);
        barrier();
    }
}

void Team::barrier() {
    if (threads_ == 1) return;
    const uint64_t now = barriers_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
        arrived_.store(0);
        change(barriers_);
    } else {
        wait(barriers_, now, BETWEEN_OPS_NS);
    }
}

// A sleeper counts itself before it looks at the value for the last time, and a change is made before the sleepers are
// counted; both in one total order, so one of the two sees the other.
void Team::change(std::atomic<uint64_t>& value) {
    value.fetch_add(1);
    if (sleepers_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
}

void Team::wait(std::atomic<uint64_t>& value, uint64_t old, int64_t patience_ns) {
    using Clock = std::chrono::steady_clock;
    const auto give_up = Clock::now() + std::chrono::nanoseconds(patience_ns);
    do {
        for (int i = 0; i < 32; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
    } while (Clock::now() < give_up);
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return value.load() != old; });
    sleepers_.fetch_sub(1);
}

}  // namespace fgsnap
