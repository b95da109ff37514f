// Passes over rows of logits, float32 as the model gave them or float64 as a request's edits left them.
#pragma once

#include "vector.h"

namespace fgsnap {
namespace {

constexpr int HALF = LANES / 2;  // numbers of 8 bytes in a register

typedef double vd __attribute__((vector_size(8 * HALF)));
typedef int64_t vl __attribute__((vector_size(8 * HALF)));
typedef float vs __attribute__((vector_size(4 * HALF)));

template <class T>
struct Wide;

template <>
struct Wide<float> {
    using Value = vf;
    using Word = vi;
    static constexpr int64_t COUNT = LANES;
    static constexpr int32_t SIZE = 0x7fffffff, INFINITE = 0x7f800000;
};

template <>
struct Wide<double> {
    using Value = vd;
    using Word = vl;
    static constexpr int64_t COUNT = HALF;
    static constexpr int64_t SIZE = 0x7fffffffffffffff, INFINITE = 0x7ff0000000000000;
};

template <class V, class T>
INLINE V take(const T* at) {
    V v;
    std::memcpy(&v, at, sizeof(v));
    return v;
}

INLINE vd wide(const double* at) { return take<vd>(at); }
INLINE vd wide(const float* at) {
#if defined(__AVX512F__)
    return (vd)_mm512_cvtps_pd((__m256)take<vs>(at));  // GCC 12 converts the two halves and joins them
#else
    return __builtin_convertvector(take<vs>(at), vd);
#endif
}

// The larger of each pair; b where a is NaN.
INLINE vd larger(vd a, vd b) {
#if defined(__AVX512F__)
    return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
    return a > b ? a : b;
#endif
}

INLINE vd select(vl mask, vd yes, vd no) { return (vd)(((vl)yes & mask) | ((vl)no & ~mask)); }

// Bit i tells whether lane i of a comparison holds.
INLINE uint32_t bits_of(vi mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX__)
    return uint32_t(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
    return uint32_t(_mm_movemask_ps((__m128)mask));
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= uint32_t(mask[i] != 0) << i;
    return bits;
#endif
}

INLINE uint32_t bits_of(vl mask) {
#if defined(__AVX512F__)
    return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX__)
    return uint32_t(_mm256_movemask_pd((__m256d)mask));
#elif defined(__x86_64__)
    return uint32_t(_mm_movemask_pd((__m128d)mask));
#else
    uint32_t bits = 0;
    for (int i = 0; i < HALF; ++i) bits |= uint32_t(mask[i] != 0) << i;
    return bits;
#endif
}

constexpr double MAGIC = 6755399441055744.0;  // what is added to it is rounded to the nearest integer

// y * 2^n for a y near 1 and a whole n from -1077 to 0, to within what is below 2^-1022.
INLINE vd scaled(vd y, vd n) {
#if defined(__AVX512F__)
    return (vd)_mm512_scalef_pd((__m512d)y, (__m512d)n);
#else
    const vl exponent = (vl)(n + MAGIC) - (vl)(MAGIC - vd{}) + 1023;
    return select(n < -1021.0, vd{}, y * (vd)(exponent << 52));
#endif
}

// e^x for x up to 0, to about one unit in the last place; 0 far below, at most below -708. The polynomial is off by
// 1.6e-17 of e^r at most, interpolated at Chebyshev's points.
INLINE vd exponential(vd x) {
    x = larger(x, -746.0 - vd{});
    const vd n = (x * 1.44269504088896340736 + MAGIC) - MAGIC;
    const vd r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    vd y = 2.510038549551032e-08 - vd{};
    y = y * r + 2.7620088445409746e-07;
    y = y * r + 2.7557268459997064e-06;
    y = y * r + 2.4801521295954376e-05;
    y = y * r + 0.00019841269863053618;
    y = y * r + 0.0013888888917213717;
    y = y * r + 0.008333333333330062;
    y = y * r + 0.04166666666662413;
    y = y * r + 0.16666666666666669;
    y = y * r + 0.5;
    y = y * r + 1.0;
    y = y * r + 1.0;
    return scaled(y, n);
}

INLINE vd weights_of(vd x, double most, double steepness) {
    return select(x == most, 1.0 - vd{}, exponential((x - most) * steepness));
}

// The last logits of a row, filled up to a register with such as weigh nothing.
template <class T>
INLINE vd wide_end(const T* at, int64_t count) {
    T end[HALF];
    for (int i = 0; i < HALF; ++i) end[i] = i < count ? at[i] : -T(INFINITY);
    return wide(end);
}

template <class T>
void weigh(const T* x, int64_t count, double most, double steepness, double* weights) {
    int64_t i = 0;
    for (; i + HALF <= count; i += HALF) {
        const vd w = weights_of(wide(x + i), most, steepness);
        std::memcpy(weights + i, &w, sizeof(w));
    }
    const vd w = weights_of(wide_end(x + i, count - i), most, steepness);
    for (int64_t j = 0; i + j < count; ++j) weights[i + j] = w[j];
}

template <class T>
void masses(const T* x, int64_t count, double most, double steepness, double* sums) {
    int64_t i = 0;
    while (i < count) {
        vd total{};
        const int64_t end = least(i + MASS, count);
        for (; i + HALF <= end; i += HALF) total += weights_of(wide(x + i), most, steepness);
        if (i < end) total += weights_of(wide_end(x + i, end - i), most, steepness);
        i = end;
        double sum = 0;
        for (int j = 0; j < HALF; ++j) sum += total[j];
        *sums++ = sum;
    }
}

// The largest number of a stretch, and as an integer the size of the largest or of NaN, which is above infinity's.
template <class T>
struct Most {
    using W = Wide<T>;
    typename W::Value value[2];
    typename W::Word size[2];
    T largest;
    bool nan;

    INLINE Most over(const T* x, int64_t count) {
        Most most{{-T(INFINITY) - typename W::Value{}, -T(INFINITY) - typename W::Value{}}, {}, -T(INFINITY), false};
        int64_t i = 0;
        for (; i + 2 * W::COUNT <= count; i += 2 * W::COUNT)
            for (int j = 0; j < 2; ++j) {
                const auto v = take<typename W::Value>(x + i + j * W::COUNT);
                const auto size = (typename W::Word)v & W::SIZE;
                most.value[j] = v > most.value[j] ? v : most.value[j];
                most.size[j] = size > most.size[j] ? size : most.size[j];
            }
        for (int j = 0; j < 2; ++j)
            for (int k = 0; k < W::COUNT; ++k) {
                if (most.value[j][k] > most.largest) most.largest = most.value[j][k];
                most.nan |= most.size[j][k] > W::INFINITE;
            }
        for (; i < count; ++i) {
            if (x[i] > most.largest) most.largest = x[i];
            most.nan |= x[i] != x[i];
        }
        return most;
    }
};

template <class T>
int64_t peak(const T* x, int64_t count) {
    constexpr int64_t STRETCH = 4096;
    T largest = -T(INFINITY);
    int64_t found = -1;
    for (int64_t i = 0; i < count; i += STRETCH) {
        const Most<T> most = Most<T>::over(x + i, least(STRETCH, count - i));
        if (most.nan) return -1;
        if (most.largest <= largest) continue;
        largest = most.largest;
        found = i;
    }
    if (found >= 0)
        while (x[found] != largest) ++found;
    return found;
}

// Writes first + i for each bit i of `bits`, and may write over what lies within a register behind them.
INLINE int64_t put_places(uint32_t bits, int64_t first, int32_t* to) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(int32_t(first)), lanes);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(bits), places));
    return __builtin_popcount(bits);
#else
    int64_t n = 0;
    for (; bits != 0; bits &= bits - 1) to[n++] = int32_t(first + __builtin_ctz(bits));
    return n;
#endif
}

template <class T>
int64_t above(const T* x, int64_t count, T bound, int32_t* found) {
    using W = Wide<T>;
    int64_t n = 0, i = 0;
    for (; i + W::COUNT <= count; i += W::COUNT) {
        const uint32_t bits = bits_of(take<typename W::Value>(x + i) >= bound);
        if (bits != 0) n += put_places(bits, i, found + n);
    }
    for (; i < count; ++i)
        if (x[i] >= bound) found[n++] = int32_t(i);
    return n;
}

}  // namespace
}  // namespace fgsnap
