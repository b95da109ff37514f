// The inner loop of everything: panels of weight rows, keys or values times a few rows of activations.
//
// A lane is one output and sums over the words of its input in their order, so no sum depends on what else is in the
// batch, and there is nothing to add up across lanes. A tile is T rows of x by V times sixteen lanes, which is as many
// sums as the registers hold; every word of weight that is loaded is used T times, every word of x V times.
#pragma once

#include "vector.h"

namespace fgsnap {
namespace {

#if LANES == 16
constexpr int TOKENS = 10;
#elif LANES == 8
constexpr int TOKENS = 3;
#else
constexpr int TOKENS = 1;
#endif
constexpr int64_t LINE = 64;

// How a word of weight meets a word of x. Wide: both become float32; x rows are float32. Dots: x rows are bfloat16, and
// the processor adds both products of a word itself.
template <class W>
struct Wide {
    using Number = W;
    static constexpr Type X = Type::f32;
    static constexpr int64_t WORD = W::WORD, X_BYTES = 4 * W::WORD;
    template <int T, int N>
    INLINE void add(V (&sums)[T][N], const char* const (&w)[N], const char* x, int64_t pitch) {
        for (int which = 0; which < W::WORD; ++which) {
            V weight[N];
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < PARTS; ++i) {
                    vu word;
                    std::memcpy(&word, w[n] + i * sizeof(vu), sizeof(vu));
                    weight[n].p[i] = W::of(word, which);
                }
            for (int t = 0; t < T; ++t) {
                const vf value = splat(F32::one(x + t * pitch + 4 * which));
                for (int n = 0; n < N; ++n)
                    for (int i = 0; i < PARTS; ++i) sums[t][n].p[i] += weight[n].p[i] * value;
            }
        }
    }
};

#if defined(__AVX512BF16__)
struct Dots {
    using Number = BF16;
    static constexpr Type X = Type::bf16;
    static constexpr int64_t WORD = 2, X_BYTES = 4;
    template <int T, int N>
    INLINE void add(V (&sums)[T][N], const char* const (&w)[N], const char* x, int64_t pitch) {
        __m512bh weight[N];
        for (int n = 0; n < N; ++n) weight[n] = (__m512bh)_mm512_loadu_si512(w[n]);
        for (int t = 0; t < T; ++t) {
            int32_t word;
            std::memcpy(&word, x + t * pitch, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(word);
            for (int n = 0; n < N; ++n) sums[t][n].p[0] = _mm512_dpbf16_ps(sums[t][n].p[0], weight[n], value);
        }
    }
};
using Bfloat = Dots;
constexpr int64_t HAS_DOTS = 1;
#else
using Bfloat = Wide<BF16>;
constexpr int64_t HAS_DOTS = 0;
#endif

constexpr int FIRST_LEVEL = 3, SECOND_LEVEL = 2;  // caches, as __builtin_prefetch counts them

// Memory to fetch while a tile is computed: `lines` cache lines a word, into a level.
struct Ahead {
    const char* at;
    int lines;
    int level;
};

// sums += `words` words of N sixteens of lanes, each `stride` bytes apart, times T rows of x, `pitch` bytes apart.
template <class M, int T, int N, int LINES, int LEVEL>
INLINE void accumulate(V (&sums)[T][N], const char* const (&from)[N], int64_t stride, int64_t words, const char* x,
                       int64_t pitch, const char* ahead) {
    const char* w[N];
    for (int n = 0; n < N; ++n) w[n] = from[n];
    for (int64_t word = 0; word < words; ++word) {
        for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + line * LINE, 0, LEVEL);
        ahead += LINES * LINE;
        M::add(sums, w, x, pitch);
        for (int n = 0; n < N; ++n) w[n] += stride;
        x += M::X_BYTES;
    }
}

// T rows of x by one panel: y[t][0..PANEL) = or += the sums. y rows are PANEL apart.
template <class M, int T>
INLINE void tile(const char* w, int64_t words, const char* x, int64_t pitch, float* y, bool resume, Ahead ahead) {
    V sums[T][2];
    const char* const from[2] = {w, w + LINE};
    for (int t = 0; t < T; ++t)
        for (int n = 0; n < 2; ++n) sums[t][n] = resume ? load(y + t * PANEL + 16 * n) : zero();
    if (ahead.lines == 0)
        accumulate<M, T, 2, 0, SECOND_LEVEL>(sums, from, 2 * LINE, words, x, pitch, ahead.at);
    else if (ahead.lines == 1)
        accumulate<M, T, 2, 1, SECOND_LEVEL>(sums, from, 2 * LINE, words, x, pitch, ahead.at);
    else if (ahead.level == FIRST_LEVEL)
        accumulate<M, T, 2, 2, FIRST_LEVEL>(sums, from, 2 * LINE, words, x, pitch, ahead.at);
    else
        accumulate<M, T, 2, 2, SECOND_LEVEL>(sums, from, 2 * LINE, words, x, pitch, ahead.at);
    for (int t = 0; t < T; ++t)
        for (int n = 0; n < 2; ++n) store(y + t * PANEL + 16 * n, sums[t][n]);
}

// action(integral constant) for a number of rows from 1 to TOKENS.
template <int T>
struct Count {
    static constexpr int value = T;
};

template <class F>
INLINE void with_count(int64_t count, F action) {
    switch (count) {
        case 1: return action(Count<1>{});
#if LANES >= 8
        case 2: return action(Count<2>{});
        case 3: return action(Count<3>{});
#endif
#if LANES == 16
        case 4: return action(Count<4>{});
        case 5: return action(Count<5>{});
        case 6: return action(Count<6>{});
        case 7: return action(Count<7>{});
        case 8: return action(Count<8>{});
        case 9: return action(Count<9>{});
        case 10: return action(Count<10>{});
#endif
    }
}

// `count` rows are worked off in tiles of this many: no more than TOKENS, and as even as can be.
INLINE int64_t rows_at_once(int64_t count) {
    const int64_t tiles = (count + TOKENS - 1) / TOKENS;
    return tiles == 0 ? 1 : (count + tiles - 1) / tiles;
}

// --- packing --------------------------------------------------------------------------------------------------------

#if LANES == 16
// Sixteen rows of sixteen words, turned: out[word][row].
INLINE void turn(const char* rows, int64_t stride, char* out, int64_t out_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(out + (i + 4) * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(out + (i + 12) * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#else
INLINE void turn(const char* rows, int64_t stride, char* out, int64_t out_stride) {
    for (int r = 0; r < 16; ++r)
        for (int w = 0; w < 16; ++w) std::memcpy(out + w * out_stride + 4 * r, rows + r * stride + 4 * w, 4);
}
#endif

// Pack rows [first, first + count <= PANEL) of a row-major matrix with rows of `bytes` into a panel, zeros to the end
// of the panel and of the last word. What will be packed `next`, if anything, is fetched as it lies in memory.
INLINE void pack(const char* rows, int64_t count, int64_t bytes, const char* next, char* panel) {
    const int64_t words = (bytes + 3) / 4, whole = bytes / LINE;
    const char* const end = next == nullptr ? nullptr : next + PANEL * bytes;
    for (int half = 0; half < 2; ++half) {
        const int64_t own = count - 16 * half;
        if (own >= 16)
            for (int64_t block = 0; block < whole; ++block) {
                for (int i = 0; i < 16 && next < end; ++i, next += LINE) __builtin_prefetch(next, 0, 2);
                turn(rows + 16 * half * bytes + block * LINE, bytes, panel + block * 16 * 2 * LINE + half * LINE,
                     2 * LINE);
            }
        for (int r = 0; r < 16; ++r) {
            const char* row = rows + (16 * half + r) * bytes;
            for (int64_t word = own >= 16 ? whole * 16 : 0; word < words; ++word) {
                const int64_t left = bytes - 4 * word;
                int32_t value = 0;
                if (r < own) std::memcpy(&value, row + 4 * word, size_t(left < 4 ? left : 4));
                std::memcpy(panel + word * 2 * LINE + half * LINE + 4 * r, &value, 4);
            }
        }
    }
}

}  // namespace
}  // namespace fgsnap
