// Keys and values into the cache, and attention over it.
//
// The cache is laid out as the panels are: sixteen keys side by side, word after word of the head; and the numbers of a
// value side by side, word after word of the slots. So scores and means are the same inner loop as every matrix product,
// and a query's sums do not depend on which queries are worked off with it.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fgsnap {
namespace {

constexpr int64_t GROUP = 16;           // slots of a block whose keys lie side by side
constexpr int64_t SCORES = 256 * 1024;  // bytes of scores that are held at once, about a quarter of a core's cache

// Where things lie in one layer's cache.
template <class W>
struct Places {
    const Cache& cache;
    int64_t groups = (cache.block_size + GROUP - 1) / GROUP;
    int64_t key_words = (cache.head_dim + W::WORD - 1) / W::WORD;
    int64_t value_words = (cache.block_size + W::WORD - 1) / W::WORD;
    int64_t value_lanes = up(cache.value_dim, GROUP);

    char* keys(int64_t block, int64_t head, int64_t group) const {
        return cache.keys + ((block * cache.kv_heads + head) * groups + group) * key_words * LINE;
    }
    char* values(int64_t block, int64_t head) const {
        return cache.values + (block * cache.kv_heads + head) * value_words * value_lanes * 4;
    }
};

// `count` numbers as words of W, the last one filled up with zeros.
template <class W>
INLINE void to_words(const float* x, int64_t count, char* words) {
    if (W::BYTES == 4) {
        std::memcpy(words, x, size_t(count) * 4);
    } else if (std::is_same<W, BF16>::value) {
        write_row(Type::bf16, x, count, words, true);
    } else {
        for (int64_t i = 0; i < up(count, W::WORD); ++i) W::put(words + i * W::BYTES, i < count ? x[i] : 0.0f);
    }
}

// `words` has room for the head's words.
template <class W>
INLINE void put_key(const Places<W>& places, int64_t block, int64_t slot, int64_t head, const float* key,
                    char* words) {
    char* at = places.keys(block, head, slot / GROUP) + slot % GROUP * 4;
    to_words<W>(key, places.cache.head_dim, words);
    for (int64_t i = 0; i < places.key_words; ++i) std::memcpy(at + i * LINE, words + 4 * i, 4);
}

// `alone`: nobody writes the other slots of the word in this step, so they are made zeros. `words` has room for the
// value's words.
template <class W>
INLINE void put_value(const Places<W>& places, int64_t block, int64_t slot, int64_t head, const float* value,
                      bool alone, char* words) {
    const int64_t which = slot % W::WORD, lanes = places.value_lanes, width = places.cache.value_dim;
    char* at = places.values(block, head) + slot / W::WORD * lanes * 4;
    to_words<W>(value, width, words);
    if (W::WORD == 2 && alone && which == 0) std::memset(at, 0, size_t(lanes) * 4);
    for (int64_t i = 0; i < width; ++i) std::memcpy(at + i * 4 + which * W::BYTES, words + i * W::BYTES, W::BYTES);
    for (int64_t i = width; i < lanes; ++i) std::memset(at + i * 4 + which * W::BYTES, 0, W::BYTES);
}

struct Slot {
    int64_t block, slot;
    bool alone;
};

// Token t's place, and whether the token after it takes the next slot in this step.
INLINE Slot slot_of(const Step& step, const Cache& cache, int64_t t) {
    const int64_t position = step.positions[t], slot = position % cache.block_size;
    const bool followed = t + 1 < step.tokens && step.tables[t + 1] == step.tables[t] &&
                          step.positions[t + 1] == position + 1 && slot + 1 < cache.block_size;
    return {step.tables[t][position / cache.block_size], slot, !followed};
}

INLINE float temperature(const Append& op, int64_t position) {
    if (op.temperature == 1 && position >= op.base) return float(log(double(position + 1)) / log(double(op.base)));
    if (op.temperature == 2)
        return float(1 + op.temperature_scale * log(1 + double((position + 1) / op.base)));
    return 1.0f;
}

// One head of queries or keys: normed, rotated, or both.
INLINE void prepare_head(const Append& op, const NormRule& rule, const float* x, const float* angles, float* y) {
    const int64_t dim = op.cache.head_dim;
    if (op.normed && !op.after_rope) {
        norm_row(rule, x, dim, y);
        x = y;
    }
    turn_pairs(x, angles, op.half, dim, y);
    if (op.normed && op.after_rope) norm_row(rule, y, dim, y);
}

template <class W>
void append_rows(const Append& op, const Step& step, const Share& share, float* turned, char* words) {
    const Cache& cache = op.cache;
    const Places<W> places{cache};
    const int64_t dim = cache.head_dim, item = op.q.type == Type::f32 ? 4 : 2;
    for (int64_t t = share.begin; t < share.end; ++t) {
        const float* x = step.floats(op.qkv) + t * (op.heads + 2 * cache.kv_heads) * dim;
        const float* angles = op.angles < 0 ? nullptr : step.floats(op.angles) + t * 2 * op.half;
        const float factor = temperature(op, step.positions[t]);
        char* q = row_of(step, op.q, t, op.heads * dim);
        for (int64_t h = 0; h < op.heads; ++h) {
            prepare_head(op, op.query, x + h * dim, angles, turned);
            if (factor != 1)
                for (int64_t i = 0; i < dim; ++i) turned[i] *= factor;
            write_row(op.q.type, turned, dim, q + h * dim * item, h + 1 == op.heads);
        }
        const float* keys = x + op.heads * dim;
        const float* values = keys + cache.kv_heads * dim;
        const Slot at = slot_of(step, cache, t);
        for (int64_t h = 0; h < cache.kv_heads; ++h) {
            prepare_head(op, op.key, keys + h * dim, angles, turned);
            put_key(places, at.block, at.slot, h, turned, words);
            put_value(places, at.block, at.slot, h, values + h * dim, at.alone, words);
        }
    }
}

// A unit is one token.
void append(const Append& op, const Step& step, const Share& share) {
    float* const turned = reinterpret_cast<float*>(share.scratch.need(size_t(op.cache.head_dim) * 8 + 8));
    char* const words = reinterpret_cast<char*>(turned + op.cache.head_dim);
    with_type(op.cache.type, [&](auto type) { append_rows<decltype(type)>(op, step, share, turned, words); });
}

// A unit is one token.
void latent(const Latent& op, const Step& step, const Share& share) {
    const int64_t rank = op.cache.value_dim, width = op.cache.head_dim;
    float* const key = reinterpret_cast<float*>(share.scratch.need(size_t(width) * 8 + 8));
    char* const words = reinterpret_cast<char*>(key + width);
    with_type(op.cache.type, [&](auto type) {
        const Places<decltype(type)> places{op.cache};
        for (int64_t t = share.begin; t < share.end; ++t) {
            const float* x = step.floats(op.x) + t * width;
            const float* angles = op.angles < 0 ? nullptr : step.floats(op.angles) + t * 2 * op.half;
            norm_row(op.rule, x, rank, key);
            turn_pairs(x + rank, angles, op.half, width - rank, key + rank);
            const Slot at = slot_of(step, op.cache, t);
            put_key(places, at.block, at.slot, 0, key, words);
            put_value(places, at.block, at.slot, 0, key, at.alone, words);
        }
    });
}

// --- attention ------------------------------------------------------------------------------------------------------

// One query: its row of y and the keys [low, high) it sees.
struct Query {
    int64_t token, head, low, high;
};

// The blocks [first, last) that some queries see. Scores are numbered by padded position: `span` for every block.
struct Blocks {
    const int32_t* table;
    int64_t first, last, span;
};

// scores[q][padded position] = q . key for all blocks, two groups of keys at a time.
template <class M>
void score(const Places<typename M::Number>& places, const Blocks& blocks, int64_t head, const Rows& q, float* scores,
           int64_t pitch) {
    const int64_t groups = (blocks.last - blocks.first) * places.groups, most = rows_at_once(q.count);
    const auto keys = [&](int64_t group) {
        return places.keys(blocks.table[blocks.first + group / places.groups], head, group % places.groups);
    };
    for (int64_t group = 0; group < groups; group += 2) {
        const bool two = group + 1 < groups;
        const char* const w[2] = {keys(group), keys(two ? group + 1 : group)};
        const char* const ahead = group + 2 < groups ? keys(group + 2) : w[0];
        for (int64_t first = 0; first < q.count; first += most) {
            const int64_t rows = q.count - first < most ? q.count - first : most;
            with_count(rows, [&](auto count) {
                constexpr int T = count.value;
                V sums[T][2];
                for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = zero();
                const char* x = q.at + first * q.pitch;
                accumulate<M, T, 2, 1, SECOND_LEVEL>(sums, w, LINE, places.key_words, x, q.pitch, ahead);
                for (int t = 0; t < T; ++t)
                    for (int n = 0; n < (two ? 2 : 1); ++n)
                        store(scores + (first + t) * pitch + (group + n) * GROUP, sums[t][n]);
            });
        }
    }
}

// The position of a padded position's slot; -1: the block has no such slot.
INLINE int64_t position_of(const Cache& cache, const Blocks& blocks, int64_t padded) {
    const int64_t slot = padded % blocks.span;
    return slot < cache.block_size ? (blocks.first + padded / blocks.span) * cache.block_size + slot : -1;
}

INLINE int64_t padded_of(const Cache& cache, const Blocks& blocks, int64_t position) {
    return (position / cache.block_size - blocks.first) * blocks.span + position % cache.block_size;
}

// Whatever lies outside the query's keys becomes minus infinity.
INLINE void mask(const Cache& cache, const Blocks& blocks, const Query& query, float* scores, int64_t size) {
    const int64_t low = padded_of(cache, blocks, query.low), last = padded_of(cache, blocks, query.high - 1);
    for (int64_t i = 0; i < low; ++i) scores[i] = -INFINITY;
    for (int64_t i = last + 1; i < size; ++i) scores[i] = -INFINITY;
    if (blocks.span == cache.block_size) return;
    for (int64_t i = low; i < last; ++i)
        if (i % blocks.span >= cache.block_size) scores[i] = -INFINITY;
}

INLINE float nearest_bfloat16(float x) {
    char bytes[2];
    BF16::put(bytes, x);
    return BF16::one(bytes);
}

INLINE void add_alibi(const Attend& op, const Blocks& blocks, int64_t head, float* scores, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        const int64_t position = position_of(op.cache, blocks, i);
        if (position < 0) continue;
        const float bias = op.alibi_bfloat16 ? nearest_bfloat16(op.slopes[head] * nearest_bfloat16(float(position)))
                                             : op.slopes[head] * float(position);
        scores[i] += float(op.alibi_scale) * bias;
    }
}

// Scores become e^(scaled score - largest), and their sum is returned, a sink's share included. `size` is whole
// sixteens. `rough`: what comes out is rounded to bfloat16.
template <bool rough>
INLINE float soften(const Attend& op, const Blocks& blocks, const Query& query, float* scores, int64_t size) {
    float scale = float(op.scale);
    if (op.softcap != 0 || op.slopes != nullptr) {
        const float cap = float(op.softcap);
        for (int64_t i = 0; i < size; i += 16)
            store(scores + i, fgsnap::each(load(scores + i), [=](vf v) {
                      v *= scale;
                      return cap == 0 ? v : cap * hyperbolic(v / cap);
                  }));
        if (op.slopes != nullptr) add_alibi(op, blocks, query.head, scores, size);
        scale = 1;
    }
    mask(op.cache, blocks, query, scores, size);
    V most = splat16(-INFINITY);
    for (int64_t i = 0; i < size; i += 16) most = both(most, load(scores + i), larger);
    float top = largest(most) * scale;
    const float sink = op.sinks.at == nullptr ? -INFINITY : element(op.sinks, query.head);
    if (sink > top) top = sink;
    constexpr float LOG2E = 1.44269504088896341f;
    V sums = zero();
    for (int64_t i = 0; i < size; i += 16) {
        const V p = fgsnap::each(load(scores + i), [=](vf v) {
            return rough ? rough_power(v * (scale * LOG2E) - top * LOG2E) : exponential(v * scale - top);
        });
        store(scores + i, p);
        sums = both(sums, p, [](vf a, vf b) { return a + b; });
    }
    return sum(sums) + (op.sinks.at == nullptr ? 0.0f : exponential(splat(sink - top))[0]);
}

// y[q] = the mean of the values, `lanes` of them from `lane` on, weighed by rows of p; T queries at a time.
template <class M, int T>
INLINE void mix(const Places<typename M::Number>& places, const Blocks& blocks, int64_t head, int64_t high,
                const char* p, int64_t pitch, int64_t lane, bool two, V (&sums)[T][2]) {
    constexpr int64_t WORD = M::WORD;
    const int64_t size = places.cache.block_size;
    for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = zero();
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
        const int64_t filled = high - block * size < size ? high - block * size : size;
        if (filled <= 0) break;
        const char* const at = places.values(blocks.table[block], head) + lane * 4;
        const char* const w[2] = {at, two ? at + LINE : at};
        const char* const x = p + (block - blocks.first) * blocks.span / WORD * M::X_BYTES;
        const char* const ahead =
            block + 1 < blocks.last ? places.values(blocks.table[block + 1], head) + lane * 4 : at;
        accumulate<M, T, 2, 1, SECOND_LEVEL>(sums, w, places.value_lanes * 4, (filled + WORD - 1) / WORD, x, pitch, ahead);
    }
}

// Some queries of one key head, in the order of their tokens.
template <class M>
void attend_queries(const Attend& op, const Step& step, const Query* queries, int64_t count, int64_t kv_head,
                    char* space) {
    using W = typename M::Number;
    const Cache& cache = op.cache;
    const Places<W> places{cache};
    const int32_t* table = step.tables[queries[0].token];
    const int64_t high = queries[count - 1].high;
    const Blocks blocks{table, queries[0].low / cache.block_size, (high + cache.block_size - 1) / cache.block_size,
                        places.groups * GROUP};
    const int64_t size = (blocks.last - blocks.first) * blocks.span, copied = copied_bytes<M>(cache.head_dim);
    float* const totals = reinterpret_cast<float*>(space);
    char* const q = space + up(count * 4, LINE);
    float* const scores = reinterpret_cast<float*>(q + count * copied);
    const int64_t q_item = op.q.type == Type::f32 ? 4 : 2, y_item = op.y.type == Type::f32 ? 4 : 2;
    for (int64_t i = 0; i < count; ++i) {
        const char* row = row_of(step, op.q, queries[i].token, op.heads * cache.head_dim);
        copy_input<M>(op.q.type, row + queries[i].head * cache.head_dim * q_item, cache.head_dim, q + i * copied);
    }
    score<M>(places, blocks, kv_head, {q, copied, count}, scores, size);
    for (int64_t i = 0; i < count; ++i) {
        float* own = scores + i * size;
        totals[i] = soften<M::X == Type::bf16>(op, blocks, queries[i], own, size);
        if (M::X == Type::bf16) write_row(Type::bf16, own, size, reinterpret_cast<char*>(own), false);
    }
    const int64_t most = rows_at_once(count);
    for (int64_t first = 0; first < count; first += most) {
        const int64_t rows = count - first < most ? count - first : most;
        for (int64_t lane = 0; lane < cache.value_dim; lane += 2 * GROUP)
            with_count(rows, [&](auto number) {
                constexpr int T = number.value;
                V sums[T][2];
                const char* p = reinterpret_cast<const char*>(scores + first * size);
                mix<M, T>(places, blocks, kv_head, high, p, size * 4, lane, lane + GROUP < cache.value_dim, sums);
                for (int t = 0; t < T; ++t) {
                    const Query& query = queries[first + t];
                    float values[2 * GROUP];
                    const float total = totals[first + t];
                    for (int n = 0; n < 2; ++n)
                        store(values + 16 * n, fgsnap::each(sums[t][n], [=](vf v) { return v / total; }));
                    const int64_t left = cache.value_dim - lane < 2 * GROUP ? cache.value_dim - lane : 2 * GROUP;
                    const int64_t at = query.head * cache.value_dim + lane, width = op.heads * cache.value_dim;
                    char* y = row_of(step, op.y, query.token, width) + at * y_item;
                    write_row(op.y.type, values, left, y, at + left == width);
                }
            });
    }
}

INLINE Query query_of(const Attend& op, const Step& step, int64_t token, int64_t head) {
    const int64_t position = step.positions[token], high = position + 1;
    int64_t low = op.window > 0 && high > op.window ? high - op.window : 0;
    if (op.chunk > 0 && position / op.chunk * op.chunk > low) low = position / op.chunk * op.chunk;
    return {token, head, low, high};
}

// A unit is one tile of tokens and one key head; every query head of that key head is done with it.
template <class M>
void attend_tiles(const Attend& op, const Step& step, const Share& share) {
    constexpr int64_t MOST = 64;
    const Cache& cache = op.cache;
    const int64_t group = op.heads / cache.kv_heads;
    const int64_t span = up(cache.block_size, GROUP);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const int32_t* tile = step.tiles + unit / cache.kv_heads * 2;
        const int64_t kv_head = unit % cache.kv_heads, total = tile[1] * group;
        const Query front = query_of(op, step, tile[0], 0), back = query_of(op, step, tile[0] + tile[1] - 1, 0);
        const int64_t size = ((back.high - 1) / cache.block_size - front.low / cache.block_size + 1) * span;
        int64_t most = SCORES / (4 * size) / TOKENS * TOKENS;
        most = most < TOKENS ? TOKENS : most > MOST ? MOST / TOKENS * TOKENS : most;
        const int64_t each_query = 4 + 4 * size + copied_bytes<M>(cache.head_dim);
        char* space = share.scratch.need(size_t(2 * LINE + most * each_query));
        for (int64_t first = 0; first < total; first += most) {
            Query queries[MOST];
            const int64_t count = total - first < most ? total - first : most;
            for (int64_t i = 0; i < count; ++i)
                queries[i] = query_of(op, step, tile[0] + (first + i) / group, kv_head * group + (first + i) % group);
            attend_queries<M>(op, step, queries, count, kv_head, space);
        }
    }
}

void attend(const Attend& op, const Step& step, const Share& share) {
    with_product(op.cache.type, op.q.type,
                 [&](auto m) { attend_tiles<decltype(m)>(op, step, share); });
}

}  // namespace
}  // namespace fgsnap
