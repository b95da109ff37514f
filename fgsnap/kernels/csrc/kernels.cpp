// The arithmetic of every op, compiled once for each instruction set (FGSNAP_VARIANT names it).
//
// An output element is always summed in the same order, whatever else is in the batch, however many threads there are
// and however wide the registers: sixteen running sums over the inputs, then one fixed tree. So a chunked prompt gives
// the bits of a whole one, and a batch the bits of its members alone.
//
// No standard library templates here: an AVX-512 copy of one could be linked into the portable path.
#include "tape.h"
#include "vector.h"

namespace fgsnap {
namespace {

// A register tile is T <= TOKENS tokens by ROWS<T> weight rows: as many sums as the registers hold.
#if LANES == 16
constexpr int TOKENS = 6;
template <int T>
constexpr int ROWS = 4;
#elif LANES == 8
constexpr int TOKENS = 4;
template <int T>
constexpr int ROWS = T == 1 ? 4 : T == 2 ? 2 : 1;
#else
constexpr int TOKENS = 3;
template <int T>
constexpr int ROWS = T == 1 ? 2 : 1;
#endif
constexpr int64_t PANEL = 4;  // a multiple of every ROWS

constexpr int QUERIES = 12;        // attention scores this many queries of one key head together
constexpr int64_t AHEAD = 2;       // panels of prefetch, into the second-level cache: the first one holds x
constexpr int64_t LONGEST_PAD = 16;

// --- dot products ---------------------------------------------------------------------------------------------------

// sums[t * R + r] += x[t] . w[r] over one step; x rows are `padded` floats apart, w rows `stride` bytes.
template <class W, int T, int R>
INLINE void step(const float* x, int64_t padded, const char* w, int64_t stride, V* sums) {
    for (int which = 0; which < 2; ++which) {
        V weights[R];
        for (int r = 0; r < R; ++r) weights[r] = W::half(w + r * stride, which);
        for (int t = 0; t < T; ++t) {
            const V values = load(x + t * padded + 16 * which);
            for (int r = 0; r < R; ++r) multiply_add(sums[t * R + r], values, weights[r]);
        }
    }
}

// y[t][r] = packed x[t] . w[r] for a T x R tile; y rows are `pitch` apart.
template <class W, int T, int R>
INLINE void tile(
    const float* x, int64_t padded, const char* w, int64_t stride, int64_t width, float* y, int64_t pitch) {
    V sums[T * R];
    for (int i = 0; i < T * R; ++i) sums[i] = zero();
    const int64_t whole = width / STEP * STEP;
    const int64_t ahead = AHEAD * R * stride;
    for (int64_t k = 0; k < whole; k += STEP) {
        const char* at = w + k * W::BYTES;
        for (int r = 0; r < R; ++r) __builtin_prefetch(at + r * stride + ahead, 0, 2);
        if (W::BYTES * STEP > 64)
            for (int r = 0; r < R; ++r) __builtin_prefetch(at + r * stride + ahead + 64, 0, 2);
        step<W, T, R>(x + k, padded, at, stride, sums);
    }
    if (whole < width) {
        constexpr int64_t PITCH = STEP * W::BYTES;
        char rest[R * PITCH] = {};
        const char* from = w + whole * W::BYTES;
        const size_t left = size_t((width - whole) * W::BYTES);
        for (int r = 0; r < R; ++r) std::memcpy(rest + r * PITCH, from + r * stride, left);
        step<W, T, R>(x + whole, padded, rest, PITCH, sums);
    }
    float flat[(T * R + 3) / 4 * 4];
    for (int i = 0; i < T * R / 4; ++i) {
        const Four four = sum4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        std::memcpy(flat + 4 * i, four.x, sizeof(four.x));
    }
    for (int i = T * R / 4 * 4; i < T * R; ++i) flat[i] = sum(sums[i]);
    for (int t = 0; t < T; ++t) std::memcpy(y + t * pitch, flat + t * R, R * sizeof(float));
}

template <class W, int T>
INLINE void panels(const float* x, int64_t padded, const char* w, int64_t stride, int64_t rows, int64_t width,
                   float* y, int64_t pitch) {
    constexpr int R = ROWS<T>;
    int64_t r = 0;
    for (; r + R <= rows; r += R) tile<W, T, R>(x, padded, w + r * stride, stride, width, y + r, pitch);
    if (R > 1)
        for (; r < rows; ++r) tile<W, T, 1>(x, padded, w + r * stride, stride, width, y + r, pitch);
}

// `count` tokens are worked off in tiles of this many: no more than TOKENS, and as even as can be.
INLINE int64_t tokens_at_once(int64_t count) {
    const int64_t tiles = (count + TOKENS - 1) / TOKENS;
    return tiles == 0 ? 1 : (count + tiles - 1) / tiles;
}

// y[t][r] = packed x[t] . w[r] for up to TOKENS tokens and any number of rows.
template <class W>
void dots(const float* x, int64_t tokens, int64_t padded, const char* w, int64_t stride, int64_t rows, int64_t width,
          float* y, int64_t pitch) {
    switch (tokens) {
        case 1: return panels<W, 1>(x, padded, w, stride, rows, width, y, pitch);
        case 2: return panels<W, 2>(x, padded, w, stride, rows, width, y, pitch);
        case 3: return panels<W, 3>(x, padded, w, stride, rows, width, y, pitch);
#if LANES >= 8
        case 4: return panels<W, 4>(x, padded, w, stride, rows, width, y, pitch);
#endif
#if LANES == 16
        case 5: return panels<W, 5>(x, padded, w, stride, rows, width, y, pitch);
        case 6: return panels<W, 6>(x, padded, w, stride, rows, width, y, pitch);
#endif
    }
}

INLINE float element(const char* at, Type type, int64_t index) {
    switch (type) {
        case Type::f32: return F32::one(at + 4 * index);
        case Type::bf16: return BF16::one(at + 2 * index);
        case Type::f16: return F16::one(at + 2 * index);
    }
    return 0;
}

void finish(const Linear& op, float* y, int64_t begin, int64_t rows) {
    if (op.bias != nullptr)
        for (int64_t r = 0; r < rows; ++r) y[r] += element(op.bias, op.bias_type, begin + r);
    if (op.multiplier != 1)
        for (int64_t r = 0; r < rows; ++r) y[r] *= float(op.multiplier);
    if (op.softcap != 0)
        for (int64_t r = 0; r < rows; ++r) y[r] = float(op.softcap) * tanhf(y[r] / float(op.softcap));
}

template <class W>
void linear_rows(const Linear& op, int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t padded = up(op.in, STEP), stride = op.in * W::BYTES, rows = end - begin;
    const char* w = op.weight + begin * stride;
    float* packed = scratch.need(size_t(TOKENS * padded));
    const int64_t most = tokens_at_once(op.count);
    for (int64_t first = 0; first < op.count; first += most) {
        const int64_t tokens = op.count - first < most ? op.count - first : most;
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = op.rows == nullptr ? first + t : op.rows[first + t];
            pack<W>(op.x + row * op.in, op.in, packed + t * padded);
            const int64_t later = row + most < op.count ? row + most : row;  // the next tile comes from further away
            for (int64_t k = 0; k < op.in; k += 16) __builtin_prefetch(op.x + later * op.in + k, 0, 2);
        }
        float* y = op.y + first * op.out + begin;
        dots<W>(packed, tokens, padded, w, stride, rows, op.in, y, op.out);
        for (int64_t t = 0; t < tokens; ++t) finish(op, y + t * op.out, begin, rows);
    }
}

// A unit is one row of the weight.
void linear(const Linear& op, int64_t begin, int64_t end, Scratch& scratch) {
    switch (op.weight_type) {
        case Type::f32: return linear_rows<F32>(op, begin, end, scratch);
        case Type::bf16: return linear_rows<BF16>(op, begin, end, scratch);
        case Type::f16: return linear_rows<F16>(op, begin, end, scratch);
    }
}

// --- one row at a time; a unit is one token -------------------------------------------------------------------------

void embed(const Embed& op, int64_t begin, int64_t end) {
    const int64_t bytes = op.type == Type::f32 ? 4 : 2;
    const float scale = float(op.scale);
    for (int64_t t = begin; t < end; ++t) {
        const char* row = op.table + op.tokens[t] * op.width * bytes;
        float* y = op.y + t * op.width;
        switch (op.type) {
            case Type::f32:
                for (int64_t i = 0; i < op.width; ++i) y[i] = F32::one(row + 4 * i) * scale;
                break;
            case Type::bf16:
                for (int64_t i = 0; i < op.width; ++i) y[i] = BF16::one(row + 2 * i) * scale;
                break;
            case Type::f16:
                for (int64_t i = 0; i < op.width; ++i) y[i] = F16::one(row + 2 * i) * scale;
                break;
        }
    }
}

// Sum of (x - mean)^power for power 1 (mean 0) or 2.
INLINE float moment(const float* x, int64_t width, float mean, bool squared) {
    V sums = zero();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        V v = load(x + i);
        for (int p = 0; p < PARTS; ++p) {
            const vf d = v.p[p] - mean;
            sums.p[p] += squared ? d * d : d;
        }
    }
    float total = sum(sums);
    for (; i < width; ++i) {
        const float d = x[i] - mean;
        total += squared ? d * d : d;
    }
    return total;
}

void norm(const Norm& op, int64_t begin, int64_t end) {
    const float offset = op.unit_offset ? 1.0f : 0.0f;
    for (int64_t t = begin; t < end; ++t) {
        const float* x = op.x + t * op.width;
        float* y = op.y + t * op.width;
        const float mean = op.how == NormKind::ln ? moment(x, op.width, 0, false) / float(op.width) : 0.0f;
        const float square = moment(x, op.width, mean, true) / float(op.width);
        const float scale = 1.0f / sqrtf(square + float(op.eps));
        for (int64_t i = 0; i < op.width; ++i) y[i] = (x[i] - mean) * scale;
        if (op.weight != nullptr) {
            switch (op.weight_type) {
                case Type::f32:
                    for (int64_t i = 0; i < op.width; ++i) y[i] *= F32::one(op.weight + 4 * i) + offset;
                    break;
                case Type::bf16:
                    for (int64_t i = 0; i < op.width; ++i) y[i] *= BF16::one(op.weight + 2 * i) + offset;
                    break;
                case Type::f16:
                    for (int64_t i = 0; i < op.width; ++i) y[i] *= F16::one(op.weight + 2 * i) + offset;
                    break;
            }
        }
        if (op.bias != nullptr)
            for (int64_t i = 0; i < op.width; ++i) y[i] += element(op.bias, op.bias_type, i);
    }
}

void add(const Add& op, int64_t begin, int64_t end) {
    const float multiplier = float(op.multiplier);
    for (int64_t i = begin * op.width; i < end * op.width; ++i) op.x[i] += multiplier * op.branch[i];
}

INLINE vf silu(vf x) { return x / (exponential(-x) + 1.0f); }

INLINE vf gelu_tanh(vf x) {
    const vf inner = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
    const vf tanh = 1.0f - 2.0f / (exponential(inner + inner) + 1.0f);
    return x * 0.5f * (tanh + 1.0f);
}

INLINE vf gelu(vf x) {
    for (int i = 0; i < LANES; ++i) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
    return x;
}

INLINE vf relu(vf x) { return select(x < 0.0f, vf{}, x); }

// y = act(x) * up for `count` numbers; up null: 1.
template <class F>
INLINE void act_part(const float* x, const float* up, float* y, int64_t count, F act) {
    vf v{}, factor = splat(1.0f);
    std::memcpy(&v, x, size_t(count) * 4);
    if (up != nullptr) std::memcpy(&factor, up, size_t(count) * 4);
    v = act(v) * factor;
    std::memcpy(y, &v, size_t(count) * 4);
}

template <class F>
INLINE void each(const Activate& op, int64_t begin, int64_t end, F act) {
    const int64_t pitch = op.gated ? 2 * op.inner : op.inner, whole = op.inner / LANES * LANES;
    for (int64_t t = begin; t < end; ++t) {
        const float* x = op.x + t * pitch;
        const float* up = op.gated ? x + op.inner : nullptr;
        float* y = op.y + t * op.inner;
        for (int64_t i = 0; i < whole; i += LANES) act_part(x + i, up == nullptr ? up : up + i, y + i, LANES, act);
        if (whole < op.inner)
            act_part(x + whole, up == nullptr ? up : up + whole, y + whole, op.inner - whole, act);
    }
}

void activate(const Activate& op, int64_t begin, int64_t end) {
    switch (op.how) {
        case Activation::silu: return each(op, begin, end, [](vf x) { return silu(x); });
        case Activation::gelu: return each(op, begin, end, [](vf x) { return gelu(x); });
        case Activation::gelu_tanh: return each(op, begin, end, [](vf x) { return gelu_tanh(x); });
        case Activation::relu: return each(op, begin, end, [](vf x) { return relu(x); });
    }
}

// --- rotation and cache ---------------------------------------------------------------------------------------------

// The angle is a float32 product, as checkpoints were trained with; its cosine is then taken exactly.
void rope(const Rope& op, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        float* y = op.y + t * 2 * op.half;
        for (int64_t i = 0; i < op.half; ++i) {
            const float angle = float(op.positions[t]) * op.frequencies[i];
            y[i] = float(cos(double(angle))) * float(op.factor);
            y[op.half + i] = float(sin(double(angle))) * float(op.factor);
        }
    }
}

INLINE void rotate(const float* x, const float* angles, int64_t half, int64_t width, float* y) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i], c = angles[i], s = angles[half + i];
        y[i] = a * c - b * s;
        y[half + i] = b * c + a * s;
    }
    for (int64_t i = 2 * half; i < width; ++i) y[i] = x[i];
}

INLINE int64_t slot(const Cache& cache, const int32_t* table, int64_t position, int64_t head) {
    const int64_t block = table[position / cache.block_size];
    return ((block * cache.kv_heads + head) * cache.block_size + position % cache.block_size) * cache.stride;
}

INLINE void put_row(const Cache& cache, char* rows, int64_t at, const float* x) {
    if (cache.type == Type::f32) {
        char* row = rows + at * 4;
        std::memcpy(row, x, size_t(cache.head_dim) * 4);
        std::memset(row + cache.head_dim * 4, 0, size_t(cache.stride - cache.head_dim) * 4);
        return;
    }
    char* row = rows + at * 2;
    if (cache.type == Type::bf16)
        for (int64_t i = 0; i < cache.head_dim; ++i) BF16::put(row + 2 * i, x[i]);
    else
        for (int64_t i = 0; i < cache.head_dim; ++i) F16::put(row + 2 * i, x[i]);
    std::memset(row + cache.head_dim * 2, 0, size_t(cache.stride - cache.head_dim) * 2);
}

void append(const Append& op, int64_t begin, int64_t end, Scratch& scratch) {
    const Cache& cache = op.cache;
    const int64_t dim = cache.head_dim;
    float* turned = scratch.need(size_t(dim));
    for (int64_t t = begin; t < end; ++t) {
        const float* x = op.qkv + t * (op.heads + 2 * cache.kv_heads) * dim;
        const float* angles = op.angles + t * 2 * op.half;
        const int32_t* table = op.blocks + op.tables[t];
        float* q = op.q + t * op.heads * dim;
        for (int64_t h = 0; h < op.heads; ++h) rotate(x + h * dim, angles, op.half, dim, q + h * dim);
        const float* keys = x + op.heads * dim;
        const float* values = keys + cache.kv_heads * dim;
        for (int64_t h = 0; h < cache.kv_heads; ++h) {
            const int64_t at = slot(cache, table, op.positions[t], h);
            rotate(keys + h * dim, angles, op.half, dim, turned);
            put_row(cache, cache.keys, at, turned);
            put_row(cache, cache.values, at, values + h * dim);
        }
    }
}

// --- attention ------------------------------------------------------------------------------------------------------

// One query of a tile: its row of q and y, the keys [low, high) it sees, and where its scores are.
struct Query {
    const float* q;
    float* y;
    int64_t token, low, high;
    float* scores;
    float total;
};

// Turn n scores into e^(scale (score - largest)) and return their sum; scores has room for n rounded up to a V.
float soften(float* scores, int64_t n, float scale) {
    for (int64_t i = n; i < up(n, LONGEST_PAD); ++i) scores[i] = -INFINITY;
    V most = load(scores);
    for (int p = 0; p < PARTS; ++p) most.p[p] *= scale;
    for (int64_t i = 0; i < n; i += 16) {
        V v = load(scores + i);
        for (int p = 0; p < PARTS; ++p) {
            v.p[p] *= scale;
            most.p[p] = select(v.p[p] > most.p[p], v.p[p], most.p[p]);
        }
        store(scores + i, v);
    }
    float lane[16], largest = -INFINITY;
    store(lane, most);
    for (int i = 0; i < 16; ++i) largest = lane[i] > largest ? lane[i] : largest;
    V sums = zero();
    for (int64_t i = 0; i < n; i += 16) {
        V v = load(scores + i);
        for (int p = 0; p < PARTS; ++p) {
            v.p[p] = exponential(v.p[p] - largest);
            sums.p[p] += v.p[p];
        }
        store(scores + i, v);
    }
    return sum(sums);
}

// y[h] = sum over keys of p[h] * value row, over STEP values of the head from `at` on, for H queries of one token.
template <class W, int H>
INLINE void mix(const Attend& op, const int32_t* table, const Query* queries, int64_t head, int64_t at) {
    const Cache& cache = op.cache;
    V first[H], second[H];
    for (int h = 0; h < H; ++h) first[h] = second[h] = zero();
    const int64_t low = queries[0].low, high = queries[0].high;
    for (int64_t key = low; key < high;) {
        const int64_t inside = cache.block_size - key % cache.block_size;
        const int64_t stop = key + inside < high ? key + inside : high;
        const char* row = cache.values + (slot(cache, table, key, head) + at) * W::BYTES;
        for (; key < stop; ++key, row += cache.stride * W::BYTES) {
            const V a = W::half(row, 0), b = W::half(row, 1);
            for (int h = 0; h < H; ++h) {
                const vf p = splat(queries[h].scores[key - low]);
                for (int i = 0; i < PARTS; ++i) {
                    first[h].p[i] += p * a.p[i];
                    second[h].p[i] += p * b.p[i];
                }
            }
        }
    }
    for (int h = 0; h < H; ++h) {
        float values[STEP];
        unpack<W>(first[h], second[h], values);
        const int64_t count = cache.head_dim - at < STEP ? cache.head_dim - at : STEP;
        for (int64_t i = 0; i < count; ++i) queries[h].y[at + i] = values[i] / queries[h].total;
    }
}

template <class W>
INLINE void mix_all(const Attend& op, const int32_t* table, const Query* queries, int64_t count, int64_t head) {
    for (int64_t at = 0; at < op.cache.head_dim; at += STEP)
        for (int64_t first = 0; first < count;) switch (count - first) {
                case 1: mix<W, 1>(op, table, queries + first, head, at); first += 1; break;
                case 2: mix<W, 2>(op, table, queries + first, head, at); first += 2; break;
                case 3: mix<W, 3>(op, table, queries + first, head, at); first += 3; break;
                default: mix<W, 4>(op, table, queries + first, head, at); first += 4; break;
            }
}

template <class W>
void score(const Attend& op, const int32_t* table, const float* packed, int64_t count, int64_t head, int64_t low,
           int64_t high, float* scores, int64_t pitch) {
    const Cache& cache = op.cache;
    const int64_t most = tokens_at_once(count);
    for (int64_t key = low; key < high;) {
        const int64_t inside = cache.block_size - key % cache.block_size;
        const int64_t rows = key + inside < high ? inside : high - key;
        const char* w = cache.keys + slot(cache, table, key, head) * W::BYTES;
        for (int64_t first = 0; first < count; first += most)
            dots<W>(packed + first * cache.stride, count - first < most ? count - first : most, cache.stride, w,
                    cache.stride * W::BYTES, rows, cache.stride, scores + first * pitch + key - low, pitch);
        key += rows;
    }
}

// Some queries, at most QUERIES, of one key head and one sequence, in the order of their tokens.
template <class W>
void attend_queries(const Attend& op, Query* queries, int64_t count, int64_t head, Scratch& scratch) {
    const int64_t dim = op.cache.head_dim, stride = op.cache.stride;
    const int64_t low = queries[0].low, high = queries[count - 1].high;
    const int64_t pitch = up(high - low, LONGEST_PAD) + LONGEST_PAD;
    float* packed = scratch.need(size_t(count * (stride + pitch)));
    float* scores = packed + count * stride;
    for (int64_t i = 0; i < count; ++i) pack<W>(queries[i].q, dim, packed + i * stride);
    const int32_t* table = op.blocks + op.tables[queries[0].token];
    score<W>(op, table, packed, count, head, low, high, scores, pitch);
    for (int64_t i = 0; i < count; ++i) {
        Query& query = queries[i];
        query.scores = scores + i * pitch + query.low - low;
        query.total = soften(query.scores, query.high - query.low, float(op.scale));
    }
    for (int64_t first = 0, last; first < count; first = last) {
        for (last = first; last < count && queries[last].token == queries[first].token;) ++last;
        mix_all<W>(op, table, queries + first, last - first, head);
    }
}

// A unit is one tile of tokens and one key head; every query head of that key head is done with it.
template <class W>
void attend_tiles(const Attend& op, int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t group = op.heads / op.cache.kv_heads, dim = op.cache.head_dim;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int32_t* tile = op.tiles + unit / op.cache.kv_heads * 2;
        const int64_t head = unit % op.cache.kv_heads, total = tile[1] * group;
        for (int64_t first = 0; first < total; first += QUERIES) {
            Query queries[QUERIES];
            const int64_t count = total - first < QUERIES ? total - first : QUERIES;
            for (int64_t i = 0; i < count; ++i) {
                const int64_t token = tile[0] + (first + i) / group;
                const int64_t row = (token * op.heads + head * group + (first + i) % group) * dim;
                const int64_t high = int64_t(op.positions[token]) + 1;
                const int64_t low = op.window > 0 && high > op.window ? high - op.window : 0;
                queries[i] = {op.q + row, op.y + row, token, low, high, nullptr, 0};
            }
            attend_queries<W>(op, queries, count, head, scratch);
        }
    }
}

void attend(const Attend& op, int64_t begin, int64_t end, Scratch& scratch) {
    switch (op.cache.type) {
        case Type::f32: return attend_tiles<F32>(op, begin, end, scratch);
        case Type::bf16: return attend_tiles<BF16>(op, begin, end, scratch);
        case Type::f16: return attend_tiles<F16>(op, begin, end, scratch);
    }
}

}  // namespace

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const Kernels JOIN(kernels_, FGSNAP_VARIANT) = {
    TEXT(FGSNAP_VARIANT), PANEL, embed, norm, add, linear, rope, append, attend, activate,
};

}  // namespace fgsnap
