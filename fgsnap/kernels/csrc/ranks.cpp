#include "ranks.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <ctime>

namespace fgsnap {
namespace {

constexpr int64_t HEADER = 4096;
constexpr int64_t PATIENCE_NS = 20'000;       // about what a sleep and a wake-up cost
constexpr long LOOK_AGAIN_NS = 50'000'000;  // how late a sleeper notices at most that somebody has given up

void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
    const timespec time{0, LOOK_AGAIN_NS};
    syscall(SYS_futex, &word, FUTEX_WAIT, value, &time, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

int64_t room(int64_t size, int count) { return (size - HEADER) / (2 * count * 64) * 16; }

}  // namespace

Ranks::Ranks(char* memory, int64_t size, int rank, int count)
    : header_(reinterpret_cast<Header*>(memory)),
      places_(memory + HEADER),
      room_(room(size, count)),
      rank_(rank),
      count_(count) {}

int64_t Ranks::memory_for(int count, int64_t floats) { return HEADER + 2 * count * ((floats + 15) / 16 * 64); }

float* Ranks::place(int rank) const { return reinterpret_cast<float*>(places_) + (side_ * count_ + rank) * room_; }

bool Ranks::meet() {
    const uint32_t meeting = header_->meetings.load();
    if (header_->arrived.fetch_add(1) + 1 == uint32_t(count_)) {
        header_->arrived.store(0);
        header_->meetings.fetch_add(1);
        wake(header_->meetings);
        return header_->given_up.load() == 0;
    }
    using Clock = std::chrono::steady_clock;
    const auto enough = Clock::now() + std::chrono::nanoseconds(PATIENCE_NS);
    while (header_->meetings.load() == meeting && header_->given_up.load() == 0)
        if (Clock::now() >= enough) sleep_on(header_->meetings, meeting);
    return header_->given_up.load() == 0;
}

bool Ranks::reduce(float* x, int64_t n) {
    for (int64_t done = 0; done < n; done += room_) {
        const int64_t part = std::min(room_, n - done);
        std::memcpy(place(rank_), x + done, size_t(part) * 4);
        if (!meet()) return false;
        std::memcpy(x + done, place(0), size_t(part) * 4);
        for (int rank = 1; rank < count_; ++rank) {
            const float* other = place(rank);
            for (int64_t i = 0; i < part; ++i) x[done + i] += other[i];
        }
        side_ ^= 1;
    }
    return true;
}

bool Ranks::gather(const float* x, int64_t rows, int64_t part, float* y, int64_t width) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t done = 0; done < part; done += room_) {
            const int64_t piece = std::min(room_, part - done);
            std::memcpy(place(rank_), x + row * part + done, size_t(piece) * 4);
            if (!meet()) return false;
            for (int rank = 0; rank < count_; ++rank) {
                const int64_t at = rank * part + done, wanted = std::min(piece, width - at);
                if (wanted > 0) std::memcpy(y + row * width + at, place(rank), size_t(wanted) * 4);
            }
            side_ ^= 1;
        }
    return true;
}

void Ranks::give_up() {
    header_->given_up.store(1);
    wake(header_->meetings);
}

}  // namespace fgsnap
