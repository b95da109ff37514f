// Picking tokens from rows of logits, in float64, as ops.Sampling says.
#pragma once

#include <cstdint>

namespace fgsnap {

struct Sampling {
    double temperature;
    int64_t top_k;
    double top_p;
    double uniform;
    int64_t logprobs;  // -1: none
    int64_t forced;    // the token itself; -1: pick one
};

struct Picked {
    int64_t token;
    double logprob;
    int64_t top_count;
};

// top_tokens and top_logprobs have room for how.logprobs entries. Throws std::bad_alloc.
Picked pick(const float* logits, int64_t columns, const Sampling& how, int64_t* top_tokens, double* top_logprobs);

// The most likely token and its margin over the second; -1 and 0 for a row with NaN or no finite logit.
Picked lead(const float* logits, int64_t columns);

}  // namespace fgsnap
