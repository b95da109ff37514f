#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fgsnap {
namespace {

constexpr int64_t LANES = 32;
constexpr float MINUS = -std::numeric_limits<float>::infinity();

// The largest value, or NaN when there is one; in lanes, so that the compiler can use its widest registers.
float largest(const float* x, int64_t count) {
    float most[LANES];
    float spoiled[LANES] = {};
    std::fill(most, most + LANES, MINUS);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) {
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
            spoiled[j] = x[i + j] == x[i + j] ? spoiled[j] : 1.0f;
        }
    for (; i < count; ++i) {
        most[0] = x[i] > most[0] ? x[i] : most[0];
        spoiled[0] = x[i] == x[i] ? spoiled[0] : 1.0f;
    }
    for (int64_t j = 1; j < LANES; ++j) {
        most[0] = std::max(most[0], most[j]);
        spoiled[0] = std::max(spoiled[0], spoiled[j]);
    }
    return spoiled[0] > 0 ? std::numeric_limits<float>::quiet_NaN() : most[0];
}

// e^((x - most) / temperature); a logit equal to the largest weighs 1 even when both are infinite.
double weight(float x, float most, double temperature) {
    if (x == most) return 1;
    return std::exp(double(x) / temperature - double(most) / temperature);
}

struct MoreLikely {
    const float* logits;
    bool operator()(int64_t a, int64_t b) const { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); }
};

// The first `count` of `ids` become the most likely ones, in descending order.
void lead_sorted(std::vector<int64_t>& ids, size_t count, const float* logits) {
    const MoreLikely before{logits};
    const auto middle = ids.begin() + std::ptrdiff_t(count);
    if (count < ids.size()) std::nth_element(ids.begin(), middle, ids.end(), before);
    std::sort(ids.begin(), middle, before);
}

std::vector<int64_t> all_ids(int64_t columns) {
    std::vector<int64_t> ids(static_cast<size_t>(columns));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i);
    return ids;
}

double sum_of(const std::vector<int64_t>& ids, const std::vector<double>& weights) {
    double total = 0;
    for (const int64_t id : ids) total += weights[size_t(id)];
    return total;
}

// Keeps the shortest prefix, in descending order, whose weight reaches top_p of all; sorts no more ids than it must.
void keep_nucleus(std::vector<int64_t>& ids, const std::vector<double>& weights, double top_p, const float* logits) {
    const double goal = top_p * sum_of(ids, weights);
    for (size_t sorted = std::min<size_t>(64, ids.size());; sorted = std::min(sorted * 8, ids.size())) {
        lead_sorted(ids, sorted, logits);
        double reached = 0;
        for (size_t i = 0; i < sorted; ++i) {
            reached += weights[size_t(ids[i])];
            if (reached >= goal) return ids.resize(i + 1);
        }
        if (sorted == ids.size()) return;
    }
}

int64_t draw(const float* logits, int64_t columns, float most, const Sampling& how) {
    std::vector<int64_t> ids = all_ids(columns);
    if (how.top_k > 0 && how.top_k < columns) {
        lead_sorted(ids, size_t(how.top_k), logits);
        ids.resize(size_t(how.top_k));
        std::sort(ids.begin(), ids.end());
    }
    std::vector<double> weights(static_cast<size_t>(columns));
    for (const int64_t id : ids) weights[size_t(id)] = weight(logits[id], most, how.temperature);
    if (how.top_p < 1) {
        keep_nucleus(ids, weights, how.top_p, logits);
        std::sort(ids.begin(), ids.end());
    }
    const double goal = how.uniform * sum_of(ids, weights);
    double running = 0;
    int64_t last = -1;
    for (const int64_t id : ids) {
        if (weights[size_t(id)] <= 0) continue;
        last = id;
        running += weights[size_t(id)];
        if (running > goal) break;
    }
    return last;
}

}  // namespace

Picked pick(const float* logits, int64_t columns, const Sampling& how, int64_t* top_tokens, double* top_logprobs) {
    const float most = largest(logits, columns);
    if (most != most || most == MINUS) return {-1, 0, 0};
    Picked picked{std::find(logits, logits + columns, most) - logits, 0, 0};
    if (how.forced >= 0)
        picked.token = how.forced;
    else if (how.temperature > 0)
        picked.token = draw(logits, columns, most, how);
    if (how.logprobs < 0) return picked;
    double total = 0;
    for (int64_t i = 0; i < columns; ++i) total += weight(logits[i], most, 1);
    const double shift = std::log(total);
    const auto logprob = [&](int64_t id) {
        return (logits[id] == most ? 0.0 : double(logits[id]) - double(most)) - shift;
    };
    picked.logprob = logprob(picked.token);
    picked.top_count = std::min(how.logprobs, columns);
    if (picked.top_count == 0) return picked;
    std::vector<int64_t> ids = all_ids(columns);
    lead_sorted(ids, size_t(picked.top_count), logits);
    for (int64_t i = 0; i < picked.top_count; ++i) {
        top_tokens[i] = ids[size_t(i)];
        top_logprobs[i] = logprob(ids[size_t(i)]);
    }
    return picked;
}

Picked lead(const float* logits, int64_t columns) {
    const float most = largest(logits, columns);
    if (most != most || most == MINUS) return {-1, 0, 0};
    const int64_t first = std::find(logits, logits + columns, most) - logits;
    const float second = std::max(largest(logits, first), largest(logits + first + 1, columns - first - 1));
    return {first, second == most ? 0.0 : double(most) - double(second), 0};
}

}  // namespace fgsnap
