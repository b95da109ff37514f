// Sixteen floats at a time, on any machine: LANES is the width of one register, a V is as many as make sixteen.
//
// Sixteen everywhere, whatever the register, so that sums are taken in one order on every instruction set. Included by
// kernels.cpp alone, which is compiled once an instruction set: everything here has internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int PARTS = 16 / LANES;
constexpr int64_t STEP = 32;  // weights are read in steps of this many, see Pair

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

struct V {
    vf p[PARTS];
};

INLINE vf splat(float x) { return x - vf{}; }

INLINE V zero() {
    V v;
    for (int i = 0; i < PARTS; ++i) v.p[i] = vf{};
    return v;
}

INLINE V load(const float* at) {
    V v;
    for (int i = 0; i < PARTS; ++i) std::memcpy(&v.p[i], at + i * LANES, sizeof(vf));
    return v;
}

INLINE void store(float* at, const V& v) {
    for (int i = 0; i < PARTS; ++i) std::memcpy(at + i * LANES, &v.p[i], sizeof(vf));
}

INLINE void multiply_add(V& sum, const V& a, const V& b) {
    for (int i = 0; i < PARTS; ++i) sum.p[i] += a.p[i] * b.p[i];
}

INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

// The sum of sixteen lanes is always taken as the tree i + (i + 8), i + (i + 4), i + (i + 2), i + (i + 1).
struct Four {
    float x[4];
};

#if defined(__x86_64__)
INLINE __m128 quarter(const V& v) {
#if LANES == 16
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v.p[0]), _mm512_extractf32x8_ps(v.p[0], 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif LANES == 8
    const __m256 half = v.p[0] + v.p[1];
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
    return (v.p[0] + v.p[2]) + (v.p[1] + v.p[3]);
#endif
}

INLINE float sum(const V& v) {
    const __m128 q = quarter(v);
    const __m128 two = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE Four sum4(const V& a, const V& b, const V& c, const V& d) {
    __m128 r0 = quarter(a), r1 = quarter(b), r2 = quarter(c), r3 = quarter(d);
    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
    Four out;
    _mm_storeu_ps(out.x, _mm_add_ps(_mm_add_ps(r0, r2), _mm_add_ps(r1, r3)));
    return out;
}
#else
INLINE float sum(const V& v) {
    float lane[16];
    store(lane, v);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

INLINE Four sum4(const V& a, const V& b, const V& c, const V& d) { return {{sum(a), sum(b), sum(c), sum(d)}}; }
#endif

// e^x to about one unit in the last place; 0 below -87.3 and e^88 above 88; NaN stays NaN.
INLINE vf exponential(vf x) {
    const vf low = splat(-87.3f), high = splat(88.0f), magic = splat(12582912.0f);
    const vi tiny = x < low;
    x = select(tiny, low, x);
    x = select(x > high, high, x);
    const vf shifted = x * 1.44269504088896341f + magic;  // the magic number rounds to the nearest integer
    const vf n = shifted - magic;
    const vf r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
    vf y = splat(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const vi power = (((vi)shifted - (vi)magic) + 127) << 23;
    return select(tiny, vf{}, y * (vf)power);
}

// --- weight types ---------------------------------------------------------------------------------------------------

INLINE float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Each type reads STEP weights as two V. Two-byte types are read as pairs in a 32-bit lane: the even ones, then the odd
// ones, which costs no shuffle; pack() orders the activations to match.
struct F32 {
    static constexpr int64_t BYTES = 4;
    static constexpr bool PAIRED = false;
    INLINE V half(const char* at, int which) { return load(reinterpret_cast<const float*>(at) + 16 * which); }
    INLINE float one(const char* at) {
        float x;
        std::memcpy(&x, at, 4);
        return x;
    }
    INLINE void put(char* at, float x) { std::memcpy(at, &x, 4); }
};

struct Paired {
    static constexpr int64_t BYTES = 2;
    static constexpr bool PAIRED = true;
    INLINE vu pairs(const char* at, int part) {
        vu v;
        std::memcpy(&v, at + part * 4 * LANES, sizeof(v));
        return v;
    }
    INLINE uint16_t bits(const char* at) {
        uint16_t b;
        std::memcpy(&b, at, 2);
        return b;
    }
};

struct BF16 : Paired {
    INLINE V half(const char* at, int which) {
        V v;
        for (int i = 0; i < PARTS; ++i) {
            const vu u = pairs(at, i);
            v.p[i] = which ? (vf)(u & 0xffff0000u) : (vf)(u << 16);
        }
        return v;
    }
    INLINE float one(const char* at) { return as_float(uint32_t(bits(at)) << 16); }
    INLINE void put(char* at, float x) {
        const uint32_t u = as_bits(x);
        const uint16_t b = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
        std::memcpy(at, &b, 2);
    }
};

struct F16 : Paired {
    // A half's exponent and fraction, moved into a float's place, are the value divided by 2^112; subnormals included.
    INLINE V half(const char* at, int which) {
        V v;
        for (int i = 0; i < PARTS; ++i) {
            const vu u = which ? pairs(at, i) >> 16 : pairs(at, i) & 0xffffu;
            const vu special = (vu)((u & 0x7c00u) == 0x7c00u);
            const vf finite = (vf)((u & 0x7fffu) << 13) * 0x1p112f;
            v.p[i] = (vf)((vu)finite | (u & 0x8000u) << 16 | (special & 0x7f800000u));
        }
        return v;
    }
    INLINE float one(const char* at) {
        const uint32_t u = bits(at);
        const uint32_t finite = as_bits(as_float((u & 0x7fff) << 13) * 0x1p112f);
        return as_float(finite | (u & 0x8000) << 16 | ((u & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u));
    }
    INLINE void put(char* at, float x) {
        const uint32_t u = as_bits(x), size = u & 0x7fffffff;
        uint32_t h;
        if (size > 0x7f800000)
            h = 0x7e00;  // NaN
        else if (size >= as_bits(65520.0f))
            h = 0x7c00;  // rounds to infinity
        else if (size < as_bits(0x1p-14f))
            h = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);  // one half: its last place is a subnormal's
        else
            h = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
        const uint16_t b = uint16_t(h | (u >> 16 & 0x8000));
        std::memcpy(at, &b, 2);
    }
};

INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Copy a row of x in the order in which W reads its weights, zeros up to a whole step.
template <class W>
INLINE void pack(const float* x, int64_t width, float* to) {
    const int64_t whole = width / STEP * STEP;
    for (int64_t k = 0; k < whole; k += STEP)
        for (int i = 0; i < 16; ++i) {
            to[k + i] = W::PAIRED ? x[k + 2 * i] : x[k + i];
            to[k + 16 + i] = W::PAIRED ? x[k + 2 * i + 1] : x[k + 16 + i];
        }
    if (whole == width) return;
    float rest[STEP] = {};
    std::memcpy(rest, x + whole, size_t(width - whole) * 4);
    for (int i = 0; i < 16; ++i) {
        to[whole + i] = W::PAIRED ? rest[2 * i] : rest[i];
        to[whole + 16 + i] = W::PAIRED ? rest[2 * i + 1] : rest[16 + i];
    }
}

// The inverse of pack for one step.
template <class W>
INLINE void unpack(const V& first, const V& second, float* to) {
    float a[16], b[16];
    store(a, first);
    store(b, second);
    for (int i = 0; i < 16; ++i) {
        to[W::PAIRED ? 2 * i : i] = a[i];
        to[W::PAIRED ? 2 * i + 1 : 16 + i] = b[i];
    }
}

}  // namespace
