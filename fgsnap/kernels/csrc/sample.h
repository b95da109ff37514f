// Picking tokens from rows of logits, in float64, as ops.Sampling and ops.Edits say.
#pragma once

#include <cstdint>

#include "program.h"

namespace fgsnap {

// What is done to a row before a token is picked; fgsnap/kernels/native_sampling.py writes the same words. A token that
// is not of the vocabulary is passed over.
struct Edits {
    double repetition, presence, frequency;
    const int32_t* counted;  // tokens of the answer so far
    const int32_t* counts;   // how many of each
    int64_t counted_size;
    const int32_t* biased;
    const double* biases;
    int64_t biased_size;
    const int32_t* banned;
    int64_t banned_size;
    const int32_t* prompt;
    int64_t prompt_size;
    const char* allowed;  // words of 4 bytes, a bit for each token of the vocabulary; null: all are

    bool only_bans() const {
        return allowed == nullptr && biased_size == 0 && repetition == 1 && presence == 0 && frequency == 0;
    }
};

struct Sampling {
    double temperature;
    int64_t top_k;
    double top_p, min_p;
    uint64_t seed;
    int64_t logprobs;  // -1: none
    const Edits* edits;  // null: none
};

struct Picked {
    int64_t token;
    double logprob;  // of a token that lead finds: its margin over the second
};

// What one row is asked.
struct Asked {
    const Sampling* how;
    int64_t position;
    int64_t forced;  // the token itself; -1: pick one
    int64_t* top_tokens;  // room for how->logprobs, or the vocabulary if that is smaller
    double* top_logprobs;
};

// `logits` may be written to. Throws std::bad_alloc.
Picked pick(const Kernels& kernels, float* logits, int64_t columns, const Asked& asked, Scratch& scratch);

// The most likely token; -1 and 0 for a row with NaN or no finite logit.
Picked lead(const Kernels& kernels, const float* logits, int64_t columns);

}  // namespace fgsnap
