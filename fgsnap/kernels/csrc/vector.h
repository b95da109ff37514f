// Sixteen floats at a time, on any machine: LANES is the width of one register, a V is as many as make sixteen.
//
// Included by kernels.cpp alone, which is compiled once an instruction set: everything here has internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "program.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

namespace fgsnap {
namespace {

constexpr int PARTS = 16 / LANES;

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

struct V {
    vf p[PARTS];
};

INLINE vf splat(float x) { return x - vf{}; }

INLINE V splat16(float x) {
    V v;
    for (int i = 0; i < PARTS; ++i) v.p[i] = splat(x);
    return v;
}

INLINE V zero() { return splat16(0); }

INLINE V load(const float* at) {
    V v;
    for (int i = 0; i < PARTS; ++i) std::memcpy(&v.p[i], at + i * LANES, sizeof(vf));
    return v;
}

INLINE void store(float* at, const V& v) {
    for (int i = 0; i < PARTS; ++i) std::memcpy(at + i * LANES, &v.p[i], sizeof(vf));
}

// f of every register of v.
template <class F>
INLINE V each(V v, F f) {
    for (int i = 0; i < PARTS; ++i) v.p[i] = f(v.p[i]);
    return v;
}

template <class F>
INLINE V both(V a, const V& b, F f) {
    for (int i = 0; i < PARTS; ++i) a.p[i] = f(a.p[i], b.p[i]);
    return a;
}

INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf larger(vf a, vf b) { return select(a > b, a, b); }

// The tree i + (i + 8), i + (i + 4), i + (i + 2), i + (i + 1), on every machine.
INLINE float sum(const V& v) {
    float lane[16];
    store(lane, v);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

INLINE float largest(const V& v) {
    float lane[16];
    store(lane, v);
    for (int i = 1; i < 16; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    return lane[0];
}

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

// 2^x for x <= 0 to 3e-6 of its size, for what is rounded to bfloat16 anyway; 0 far below; NaN stays NaN.
INLINE vf rough_power(vf x) {
    const vf magic = splat(12582912.0f), low = splat(-126.0f);
    const vi tiny = x < low;
    x = select(tiny, low, x);
    const vf shifted = x + magic;
    const vf f = x - (shifted - magic);
    vf y = splat(0.00956999f);
    y = y * f + 0.05591755f;
    y = y * f + 0.24024745f;
    y = y * f + 0.69312185f;
    y = y * f + 0.99999926f;
    return select(tiny, vf{}, (vf)((vi)y + (((vi)shifted - (vi)magic) << 23)));
}

INLINE vf hyperbolic(vf x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

// --- numbers of 4 and 2 bytes ---------------------------------------------------------------------------------------

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

INLINE uint16_t two_bytes(const char* at) {
    uint16_t b;
    std::memcpy(&b, at, 2);
    return b;
}

// Each type tells how a lane's word of 4 bytes becomes WORD numbers, and how single numbers are read and written.
struct F32 {
    static constexpr int64_t BYTES = 4, WORD = 1;
    INLINE vf of(vu word, int) { return (vf)word; }
    INLINE float one(const char* at) {
        float x;
        std::memcpy(&x, at, 4);
        return x;
    }
    INLINE void put(char* at, float x) { std::memcpy(at, &x, 4); }
};

struct BF16 {
    static constexpr int64_t BYTES = 2, WORD = 2;
    INLINE vf of(vu word, int which) { return which ? (vf)(word & 0xffff0000u) : (vf)(word << 16); }
    INLINE float one(const char* at) { return as_float(uint32_t(two_bytes(at)) << 16); }
    INLINE void put(char* at, float x) {
        const uint32_t u = as_bits(x);
        const uint16_t b = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
        std::memcpy(at, &b, 2);
    }
};

struct F16 {
    // A half's exponent and fraction, moved into a float's place, are the value divided by 2^112; subnormals included.
    INLINE vf of(vu word, int which) {
        const vu u = which ? word >> 16 : word & 0xffffu;
        const vu special = (vu)((u & 0x7c00u) == 0x7c00u);
        const vf finite = (vf)((u & 0x7fffu) << 13) * 0x1p112f;
        return (vf)((vu)finite | (u & 0x8000u) << 16 | (special & 0x7f800000u));
    }
    static constexpr int64_t BYTES = 2, WORD = 2;
    INLINE float one(const char* at) {
        const uint32_t u = two_bytes(at);
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

// action(T{}) with the struct of a type.
template <class F>
INLINE void with_type(Type type, F action) {
    switch (type) {
        case Type::f32: return action(F32{});
        case Type::bf16: return action(BF16{});
        case Type::f16: return action(F16{});
    }
}

INLINE float element(const Vector& v, int64_t index) {
    switch (v.type) {
        case Type::f32: return F32::one(v.at + 4 * index);
        case Type::bf16: return BF16::one(v.at + 2 * index);
        case Type::f16: return F16::one(v.at + 2 * index);
    }
    return 0;
}

INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- rows of activations --------------------------------------------------------------------------------------------

INLINE int64_t row_bytes(Type type, int64_t width) { return type == Type::f32 ? 4 * width : 2 * up(width, 2); }

INLINE char* row_of(const Step& step, const Operand& x, int64_t row, int64_t pitch) {
    return step.registers[x.at] + row * row_bytes(x.type, pitch);
}

// Sixteen bfloat16 numbers, as they lie in memory, from and to a V.
INLINE V load_bf16(const char* at) {
    V v;
    for (int i = 0; i < PARTS; ++i) {
        vh h;
        std::memcpy(&h, at + i * sizeof(h), sizeof(h));
        v.p[i] = (vf)(__builtin_convertvector(h, vu) << 16);
    }
    return v;
}

INLINE void store_bf16(char* at, const V& v) {
    for (int i = 0; i < PARTS; ++i) {
        const vu u = (vu)v.p[i];
        const vu nan = (vu)(v.p[i] != v.p[i]);
        const vu rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
        const vh h = __builtin_convertvector((rounded & ~nan) | ((u >> 16 | 0x40u) & nan), vh);
        std::memcpy(at + i * sizeof(h), &h, sizeof(h));
    }
}

// Read `count` numbers of a row as float32.
INLINE void read_row(Type type, const char* from, int64_t count, float* to) {
    if (type == Type::f32) {
        std::memcpy(to, from, size_t(count) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, load_bf16(from + 2 * i));
    for (; i < count; ++i) to[i] = BF16::one(from + 2 * i);
}

// Write `count` numbers; an odd number of bfloat16 is filled up with a zero where a row ends.
INLINE void write_row(Type type, const float* from, int64_t count, char* to, bool ends) {
    if (type == Type::f32) {
        std::memcpy(to, from, size_t(count) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store_bf16(to + 2 * i, load(from + i));
    for (; i < count; ++i) BF16::put(to + 2 * i, from[i]);
    if (ends && count % 2 != 0) BF16::put(to + 2 * count, 0);
}

}  // namespace
}  // namespace fgsnap
