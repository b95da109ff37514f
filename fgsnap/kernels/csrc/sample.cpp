#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace fgsnap {
namespace {

constexpr int64_t STRETCH = 256;  // logits that are looked at together for such as may be among the largest
constexpr int64_t BINS = 1024;
constexpr int64_t FEW_OPEN = 64;  // candidates that are sorted rather than divided into bins
constexpr int64_t FEW_LARGEST = 1024;  // so many at most are chosen by a running bound and sorted by their tokens
constexpr int DIGIT = 11;  // bits of a number that are looked at together
constexpr double INFINITE = std::numeric_limits<double>::infinity();

// Philox 4x32-10, word for word as in fgsnap/kernels/philox.py: a number in [0, 1).
double uniform(uint64_t seed, int64_t position) {
    uint32_t a = uint32_t(position), b = uint32_t(position >> 32), c = 0, d = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t left = uint64_t(0xD2511F53) * a, right = uint64_t(0xCD9E8D57) * c;
        a = uint32_t(right >> 32) ^ b ^ k0;
        b = uint32_t(right);
        c = uint32_t(left >> 32) ^ d ^ k1;
        d = uint32_t(left);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return double((uint64_t(a) << 32 | b) >> 11) * 0x1p-53;
}

struct Candidate {
    double value, weight;
    int32_t token;
};

bool more_likely(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token);
}

bool earlier(const Candidate& a, const Candidate& b) { return a.token < b.token; }

// A thread's memory for one row: all of it is as large as the vocabulary may ever need, and what is not needed is not
// touched.
class Desk {
   public:
    Desk(Scratch& scratch, int64_t columns) {
        const int64_t n = columns + MASS, room = 2 * n + 4 * STRETCH;
        at_ = scratch.need(size_t(room * int64_t(sizeof(Candidate)) + n * (8 + 8 + 4 + 4 + 1) + n / MASS * 8));
        candidates = part<Candidate>(room);
        values = part<double>(n);
        spare_ = part<double>(n);
        sums = part<double>(n / MASS);
        tokens = part<int32_t>(n);
        open = part<int32_t>(n);
        seen = part<uint8_t>(n);
    }

    // Room for the logits of a row.
    template <class T>
    T* spare() {
        return static_cast<T*>(spare_);
    }

    Candidate* candidates;
    double* values;   // edited logits
    double* sums;     // weights of MASS logits each
    int32_t* tokens;  // whose the values are, where some are left out
    int32_t* open;
    uint8_t* seen;

   private:
    template <class T>
    T* part(int64_t count) {
        char* const here = at_;
        at_ += count * int64_t(sizeof(T));
        return reinterpret_cast<T*>(here);
    }

    char* at_;
    void* spare_;
};

template <class T>
struct Row {
    const T* x;
    int64_t count;
    const int32_t* tokens;  // whose the logits are, ascending; null: everybody's
    const Scan<T>& scan;

    int32_t token(int64_t i) const { return tokens == nullptr ? int32_t(i) : tokens[i]; }
};

struct Chosen {
    Candidate* begin;
    Candidate* end;
    int64_t size() const { return end - begin; }
};

// The largest T that is at most `bound`, of the finite ones where there are any.
template <class T>
T at_most(double bound) {
    constexpr double lowest = -double(std::numeric_limits<T>::max());
    if (bound <= lowest) return T(lowest);
    if (bound >= -lowest) return bound == INFINITE ? std::numeric_limits<T>::infinity() : T(-lowest);
    const T near = T(bound);
    return double(near) > bound ? std::nextafter(near, T(lowest)) : near;
}

// All that are at least `bound`, ascending by token; -infinity is not among them.
template <class T>
Chosen at_least(const Row<T>& row, double bound, Desk& desk) {
    Candidate* end = desk.candidates;
    int32_t found[STRETCH + 16];
    for (int64_t i = 0; i < row.count; i += STRETCH) {
        const int64_t n = row.scan.above(row.x + i, std::min(STRETCH, row.count - i), at_most<T>(bound), found);
        for (int64_t j = 0; j < n; ++j) *end++ = {double(row.x[i + found[j]]), 0, row.token(i + found[j])};
    }
    return {desk.candidates, end};
}

// The `count` largest, in no order: only what reaches the count-th largest so far is looked at.
template <class T>
Chosen largest(const Row<T>& row, int64_t count, Desk& desk) {
    Candidate *const begin = desk.candidates, *const kept = begin + count, *end = begin;
    const int64_t room = 2 * count + 2 * STRETCH;
    T bound = -std::numeric_limits<T>::infinity();
    int32_t found[STRETCH + 16];
    for (int64_t i = 0; i < row.count; i += STRETCH) {
        const int64_t n = row.scan.above(row.x + i, std::min(STRETCH, row.count - i), bound, found);
        for (int64_t j = 0; j < n; ++j) *end++ = {double(row.x[i + found[j]]), 0, row.token(i + found[j])};
        if (end - begin + STRETCH <= room) continue;
        std::nth_element(begin, kept - 1, end, more_likely);
        bound = T(kept[-1].value);
        end = kept;
    }
    if (end - begin <= count) return {begin, end};
    std::nth_element(begin, kept, end, more_likely);
    return {begin, kept};
}

// A whole number that compares as x does; both zeros have the same.
uint32_t rank_of(float x) {
    uint32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

uint64_t rank_of(double x) {
    uint64_t bits;
    x += 0.0;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

template <class T>
struct Cut {
    T value;
    int64_t equal;  // how many of those that equal it are among the largest
};

// Where the `count` largest end. Ranks are told apart digit by digit, the highest first: those that have the digit in
// which the count-th lies stay open, so that a pass over all is followed by ever shorter ones, two for each digit.
template <class T>
Cut<T> cut_of(const Row<T>& row, int64_t count, T* open) {
    const T* x = row.x;
    int64_t left = row.count;
    for (int shift = 8 * int(sizeof(T)) - DIGIT;; shift = std::max(shift - DIGIT, 0)) {
        const auto digit = [&](T value) { return rank_of(value) >> shift & ((1 << DIGIT) - 1); };
        int64_t sizes[1 << DIGIT] = {};
        for (int64_t i = 0; i < left; ++i) ++sizes[digit(x[i])];
        uint32_t last = (1 << DIGIT) - 1;
        for (; sizes[last] < count; --last) count -= sizes[last];
        int64_t n = 0;
        for (int64_t i = 0; i < left; ++i) {
            const T value = x[i];
            open[n] = value;
            n += digit(value) == last;
        }
        if (shift == 0) return {open[0], count};
        x = open;
        left = n;
    }
}

// The `count` largest, ascending by token; -infinity is not among them.
template <class T>
Chosen largest_in_order(const Row<T>& row, int64_t count, Desk& desk) {
    if (count <= FEW_LARGEST) {
        const Chosen few = largest(row, count, desk);
        std::sort(few.begin, few.end, earlier);
        return few;
    }
    const Cut<T> cut = cut_of(row, count, desk.spare<T>());
    const Chosen all = at_least(row, double(cut.value), desk);
    int64_t equal = 0;
    const auto beyond = [&](const Candidate& one) { return one.value == double(cut.value) && equal++ >= cut.equal; };
    Candidate* end = all.begin;
    for (const Candidate* one = all.begin; one < all.end; ++one)
        if (!beyond(*one)) *end++ = *one;
    return {all.begin, end};
}

// The weights of candidates, and their sum; those that weigh nothing are dropped.
double weigh(Chosen& chosen, const Scan<double>& scan, double most, double steepness) {
    double total = 0, values[MASS], weights[MASS];
    Candidate* end = chosen.begin;
    for (const Candidate* from = chosen.begin; from < chosen.end; from += MASS) {
        const int64_t n = std::min<int64_t>(MASS, chosen.end - from);
        for (int64_t i = 0; i < n; ++i) values[i] = from[i].value;
        scan.weigh(values, n, most, steepness, weights);
        for (int64_t i = 0; i < n; ++i) {
            if (weights[i] <= 0) continue;
            *end++ = {values[i], weights[i], from[i].token};
            total += weights[i];
        }
    }
    chosen.end = end;
    return total;
}

// Finds the shortest prefix, in descending order, that weighs at least `goal`, and makes all others weigh nothing.
// Candidates that are neither surely in nor surely out are open; bins of their values tell them apart, and the few that
// are left in the bin where the goal is reached are sorted.
class Nucleus {
   public:
    Nucleus(const Chosen& chosen, double goal, int32_t* open) : all_(chosen.begin), goal_(goal), open_(open) {
        count_ = chosen.size();
        for (int64_t i = 0; i < count_; ++i) open[i] = int32_t(i);
    }

    void find() {
        while (count_ > FEW_OPEN && divide()) {
        }
        if (count_ <= FEW_OPEN || !same_)
            std::sort(open_, open_ + count_, [this](int32_t a, int32_t b) { return more_likely(all_[a], all_[b]); });
        int64_t i = 0;
        while (i < count_ && !(reached_ >= goal_ && i > 0)) reached_ += all_[open_[i++]].weight;
        for (; i < count_; ++i) all_[open_[i]].weight = 0;
    }

   private:
    // Leaves open those of one bin; false: all open ones are equal, or too far apart to be divided.
    bool divide() {
        const auto [low, high] = range();
        same_ = low == high;
        const double scale = double(BINS - 1) / (high - low);
        if (same_ || !(scale > 0) || scale == INFINITE) return false;
        const auto bin = [&](int32_t i) { return std::min(int64_t((high - all_[i].value) * scale), BINS - 1); };
        double masses[BINS] = {};
        for (int64_t i = 0; i < count_; ++i) masses[bin(open_[i])] += all_[open_[i]].weight;
        int64_t last = 0;
        for (; last < BINS - 1 && reached_ + masses[last] < goal_; ++last) reached_ += masses[last];
        int64_t left = 0;
        for (int64_t i = 0; i < count_; ++i) {
            const int64_t own = bin(open_[i]);
            if (own > last) all_[open_[i]].weight = 0;
            if (own == last) open_[left++] = open_[i];
        }
        count_ = left;
        return true;
    }

    std::pair<double, double> range() const {
        double low = INFINITE, high = -INFINITE;
        for (int64_t i = 0; i < count_; ++i) {
            low = std::min(low, all_[open_[i]].value);
            high = std::max(high, all_[open_[i]].value);
        }
        return {low, high};
    }

    Candidate* const all_;
    const double goal_;
    int32_t* const open_;  // ascending by token until they are sorted
    int64_t count_;
    double reached_ = 0;
    bool same_ = false;
};

// The first token at which the running sum exceeds `share` of the whole.
int64_t draw(const Chosen& chosen, double share) {
    double total = 0, running = 0;
    for (const Candidate* c = chosen.begin; c < chosen.end; ++c) total += c->weight;
    const double goal = share * total;
    int64_t last = -1;
    for (const Candidate* c = chosen.begin; c < chosen.end; ++c) {
        if (c->weight <= 0) continue;
        last = c->token;
        running += c->weight;
        if (running > goal) break;
    }
    return last;
}

template <class T>
double masses(const Row<T>& row, double most, double steepness, double* sums) {
    double total = 0;
    row.scan.masses(row.x, row.count, most, steepness, sums);
    for (int64_t i = 0; i * MASS < row.count; ++i) total += sums[i];
    return total;
}

// The same for all of a row, which is passed over MASS logits at a time.
template <class T>
int64_t draw_of_all(const Row<T>& row, double most, double steepness, double share, Desk& desk) {
    const double goal = share * masses(row, most, steepness, desk.sums);
    double running = 0, weights[MASS];
    int64_t last = -1;
    for (int64_t i = 0; i < row.count; i += MASS) {
        const double sum = desk.sums[i / MASS];
        if (sum <= 0) continue;
        last = i;
        if (running + sum > goal) break;
        running += sum;
    }
    const int64_t n = std::min(MASS, row.count - last);
    row.scan.weigh(row.x + last, n, most, steepness, weights);
    int64_t found = last;
    for (int64_t j = 0; j < n && running <= goal; ++j) {
        if (weights[j] > 0) found = last + j;
        running += weights[j];
    }
    return row.token(found);
}

// All that min_p and, of the weight of all, top_p can keep. What is lighter than an even share of half of what top_p
// leaves out cannot matter to it: all of that together is still less. But often those that are heavier than an even
// share of everything reach it alone, and they are few.
template <class T>
Chosen heaviest(const Row<T>& row, const Kernels& kernels, double most, double total, const Sampling& how, Desk& desk) {
    const double even = total / double(row.count), needed = std::max(0.5 * (1 - how.top_p), 0.0) * even;
    const double least_p = 0.999 * how.min_p;
    for (double share = 1;; share /= 16) {
        const double least = std::max({share * even, needed, least_p});
        Chosen chosen = at_least(row, most + how.temperature * std::log(least), desk);
        const double reached = weigh(chosen, kernels.doubles, most, 1 / how.temperature);
        if (reached > how.top_p * total || share * even <= std::max(needed, least_p)) return chosen;
    }
}

// What top_k, top_p and min_p keep, ascending by token and with their weights, among some that weigh nothing.
template <class T>
Chosen kept(const Row<T>& row, const Kernels& kernels, double most, const Sampling& how, Desk& desk) {
    const double steepness = 1 / how.temperature;
    Chosen chosen;
    double total = 0;
    if (how.top_k > 0 && how.top_k < row.count) {
        chosen = largest_in_order(row, how.top_k, desk);
        total = weigh(chosen, kernels.doubles, most, steepness);
    } else {
        if (how.top_p < 1) total = masses(row, most, steepness, desk.sums);
        chosen = heaviest(row, kernels, most, total, how, desk);
    }
    if (how.top_p < 1) Nucleus(chosen, how.top_p * total, desk.open).find();
    for (Candidate* c = chosen.begin; c < chosen.end; ++c)
        if (c->weight < how.min_p) c->weight = 0;
    return chosen;
}

// The token of a row without NaN; -1 where nothing is above -infinity.
template <class T>
int64_t token_of(const Row<T>& row, const Kernels& kernels, int64_t first, const Asked& asked, Desk& desk) {
    const Sampling& how = *asked.how;
    if (first < 0) return -1;
    if (how.temperature == 0) return row.token(first);
    const double most = row.x[first], share = uniform(how.seed, asked.position);
    if ((how.top_k == 0 || how.top_k >= row.count) && how.top_p >= 1 && how.min_p <= 0)
        return draw_of_all(row, most, 1 / how.temperature, share, desk);
    return draw(kept(row, kernels, most, how, desk), share);
}

// A row in float64 with its edits; where a grammar allows few tokens, of those alone.
class Edited {
 public:
    Edited(const float* logits, int64_t columns, const Edits& edits, Desk& desk)
        : values_(desk.values), tokens_(edits.allowed == nullptr ? nullptr : desk.tokens), count_(columns) {
        if (tokens_ == nullptr)
            std::copy(logits, logits + columns, values_);
        else
            copy_allowed(logits, columns, edits.allowed, desk.tokens);
        for (int64_t i = 0; i < edits.banned_size; ++i)
            if (double* x = of(edits.banned[i])) *x = -INFINITE;
        for (int64_t i = 0; i < edits.biased_size; ++i)
            if (double* x = of(edits.biased[i])) *x += edits.biases[i];
        if (edits.repetition != 1) repeat(edits, columns, desk.seen);
        for (int64_t i = 0; i < edits.counted_size; ++i)
            if (double* x = of(edits.counted[i])) *x -= edits.presence + double(edits.counts[i]) * edits.frequency;
    }

    Row<double> row(const Kernels& kernels) const { return {values_, count_, tokens_, kernels.doubles}; }

 private:
    void copy_allowed(const float* logits, int64_t columns, const char* allowed, int32_t* tokens) {
        count_ = 0;
        for (int64_t i = 0; i < columns; i += 32) {
            uint32_t bits;
            std::memcpy(&bits, allowed + i / 8, 4);
            if (columns - i < 32) bits &= (uint32_t(1) << (columns - i)) - 1;
            for (; bits != 0; bits &= bits - 1) {
                tokens[count_] = int32_t(i + __builtin_ctz(bits));
                values_[count_] = logits[tokens[count_]];
                ++count_;
            }
        }
    }

    // Where the token's logit is; null: it is left out.
    double* of(int32_t token) const {
        if (tokens_ == nullptr) return token >= 0 && token < count_ ? values_ + token : nullptr;
        const int32_t* found = std::lower_bound(tokens_, tokens_ + count_, token);
        return found < tokens_ + count_ && *found == token ? values_ + (found - tokens_) : nullptr;
    }

    // Tokens of the prompt and of the answer, those of both only once.
    void repeat(const Edits& edits, int64_t columns, uint8_t* seen) {
        const auto once = [&](int32_t token) {
            if (double* x = of(token)) *x = *x > 0 ? *x / edits.repetition : *x * edits.repetition;
        };
        if (edits.prompt_size > 0 && edits.counted_size > 0) std::memset(seen, 0, size_t(columns));
        for (int64_t i = 0; i < edits.counted_size; ++i) {
            const int32_t token = edits.counted[i];
            if (edits.prompt_size > 0 && token >= 0 && token < columns) seen[token] = 1;
            once(token);
        }
        for (int64_t i = 0; i < edits.prompt_size; ++i) {
            const int32_t token = edits.prompt[i];
            if (token >= 0 && token < columns && (edits.counted_size == 0 || !seen[token])) once(token);
        }
    }

    double* const values_;
    const int32_t* const tokens_;
    int64_t count_;
};

// A row of which some tokens are no choice as long as this lives.
class Without {
 public:
    Without(float* logits, int64_t columns, const Edits& edits) : logits_(logits) {
        kept_.reserve(size_t(edits.banned_size));
        for (int64_t i = 0; i < edits.banned_size; ++i) {
            const int64_t token = edits.banned[i];
            if (token < 0 || token >= columns) continue;
            kept_.emplace_back(token, logits[token]);
            logits[token] = -std::numeric_limits<float>::infinity();
        }
    }
    ~Without() {  // backwards: a token that is banned twice was kept first as it was
        for (auto kept = kept_.rbegin(); kept != kept_.rend(); ++kept) logits_[kept->first] = kept->second;
    }
    Without(const Without&) = delete;
    Without& operator=(const Without&) = delete;

 private:
    float* const logits_;
    std::vector<std::pair<int64_t, float>> kept_;
};

int64_t edited_token(float* logits, int64_t columns, const Kernels& kernels, const Asked& asked, Desk& desk) {
    const Edits& edits = *asked.how->edits;
    if (edits.only_bans()) {
        const Without banned(logits, columns, edits);
        const Row<float> row{logits, columns, nullptr, kernels.floats};
        return token_of(row, kernels, kernels.floats.peak(logits, columns), asked, desk);
    }
    const Row<double> row = Edited(logits, columns, edits, desk).row(kernels);
    return token_of(row, kernels, kernels.doubles.peak(row.x, row.count), asked, desk);
}

// A row's logits as logprobs.
class Logprobs {
 public:
    Logprobs(const Row<float>& row, double most, Desk& desk)
        : row_(row), most_(most), shift_(std::log(masses(row, most, 1, desk.sums))) {}

    double of(double logit) const { return (logit == most_ ? 0.0 : logit - most_) - shift_; }

    void tell_largest(int64_t count, const Asked& asked, Desk& desk) const {
        if (count == 0) return;
        const Chosen top = largest(row_, count, desk);
        std::sort(top.begin, top.end, more_likely);
        for (int64_t i = 0; i < top.size(); ++i) {
            asked.top_tokens[i] = top.begin[i].token;
            asked.top_logprobs[i] = of(top.begin[i].value);
        }
    }

 private:
    const Row<float>& row_;
    const double most_, shift_;
};

// The largest logit's place; -1: there is NaN, or no finite logit.
int64_t sound_peak(const Kernels& kernels, const float* logits, int64_t columns) {
    const int64_t first = kernels.floats.peak(logits, columns);
    if (first < 0 || std::isfinite(logits[first])) return first;
    return std::any_of(logits, logits + columns, [](float x) { return std::isfinite(x); }) ? first : -1;
}

}  // namespace

Picked pick(const Kernels& kernels, float* logits, int64_t columns, const Asked& asked, Scratch& scratch) {
    const Sampling& how = *asked.how;
    const int64_t first = sound_peak(kernels, logits, columns);
    if (first < 0) return {-1, 0};
    if (how.temperature == 0 && how.edits == nullptr && how.logprobs < 0) return {first, 0};
    const Row<float> row{logits, columns, nullptr, kernels.floats};
    Desk desk(scratch, columns);
    const auto token = [&] {
        if (asked.forced >= 0) return asked.forced;
        return how.edits == nullptr ? token_of(row, kernels, first, asked, desk)
                                    : edited_token(logits, columns, kernels, asked, desk);
    };
    if (how.logprobs < 0) return {token(), 0};
    const Logprobs logprobs(row, logits[first], desk);
    logprobs.tell_largest(std::min(how.logprobs, columns), asked, desk);
    const int64_t picked = token();
    return {picked, picked < 0 ? 0 : logprobs.of(logits[picked])};
}

Picked lead(const Kernels& kernels, const float* logits, int64_t columns) {
    const int64_t first = sound_peak(kernels, logits, columns);
    if (first < 0) return {-1, 0};
    const double most = logits[first];
    double second = -INFINITE;
    for (const auto& [from, until] : {std::pair(int64_t(0), first), std::pair(first + 1, columns)}) {
        const int64_t other = kernels.floats.peak(logits + from, until - from);
        if (other >= 0) second = std::max(second, double(logits[from + other]));
    }
    return {first, second == most ? 0 : most - second};
}

}  // namespace fgsnap
