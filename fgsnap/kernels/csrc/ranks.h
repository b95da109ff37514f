// The tensor parallel ranks of one host: processes that add up and lay together their results in shared memory.
//
// The memory is one header and two places a rank. A rank writes into its place, all meet, and each reads all places;
// they then use the other places, so that nobody writes where a slower one still reads, with one meeting a round.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fgsnap {

class Ranks {
   public:
    // `memory` is the same `size` bytes in all ranks, zeros when the first one joins.
    Ranks(char* memory, int64_t size, int rank, int count);

    int count() const { return count_; }

    // x[0, n) = the sum over all ranks, in the order of ranks, so the same bits in each. False: a rank has given up.
    bool reduce(float* x, int64_t n);

    // y[row][0, width) = the ranks' x[row][0, part) side by side, cut off at width. False: a rank has given up.
    bool gather(const float* x, int64_t rows, int64_t part, float* y, int64_t width);

    // Wake all who wait, now and ever after.
    void give_up();

    static int64_t memory_for(int count, int64_t floats);

   private:
    struct Header {
        std::atomic<uint32_t> arrived;
        std::atomic<uint32_t> meetings;
        std::atomic<uint32_t> given_up;
    };

    bool meet();
    float* place(int rank) const;

    Header* const header_;
    char* const places_;
    const int64_t room_;  // floats in a place
    const int rank_;
    const int count_;
    int side_ = 0;
};

}  // namespace fgsnap
