// Matrix products with what comes right before and after them: bias, scaling, activation, the residual's sum.
#pragma once

#include "panel.h"

namespace fgsnap {
namespace {

// Words of a panel that are worked off for all rows before the next ones: a tile's rows of x then stay in the first-
// level cache, and the panel's part in the second.
constexpr int64_t DEPTH = 512;
// Words between what few rows of x are multiplied by and what is fetched.
constexpr int64_t CLOSE = 96;
// Panels that many rows of x are multiplied by at once: as many as fit the second level beside their sums.
constexpr int64_t TOGETHER = 4;
// Rows that begin a multiple of CROWDED bytes apart share the sets of a first-level cache, which hold WAYS lines each.
constexpr int64_t CROWDED = 4096, WAYS = 8;

// --- activations ----------------------------------------------------------------------------------------------------

INLINE vf sigmoid(vf x) { return 1.0f / (exponential(-x) + 1.0f); }
INLINE vf silu(vf x) { return x / (exponential(-x) + 1.0f); }
INLINE vf gelu_tanh(vf x) {
    return x * 0.5f * (hyperbolic((x + x * x * x * 0.044715f) * 0.79788456080286536f) + 1.0f);
}

// 1 + erf(x / sqrt 2) by formula 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7.
INLINE vf gelu(vf x) {
    const vf size = select(x < 0.0f, -x, x) * 0.70710678118654752f;
    const vf t = 1.0f / (size * 0.3275911f + 1.0f);
    const vf series =
        t * (t * (t * (t * (t * 1.061405429f - 1.453152027f) + 1.421413741f) - 0.284496736f) + 0.254829592f);
    const vf tail = series * exponential(-size * size);
    return x * 0.5f * select(x < 0.0f, tail, 2.0f - tail);
}

// GPT-OSS's: gates are cut off above, ups on both sides.
INLINE vf clamped_swiglu(vf gate, vf lift, float clamp) {
    gate = select(gate > clamp, splat(clamp), gate);
    lift = select(lift > clamp, splat(clamp), lift);
    lift = select(lift < -clamp, splat(-clamp), lift);
    return (lift + 1.0f) * gate * sigmoid(gate * 1.702f);
}

// The activation of x, times `lift` when gated.
INLINE V activated(Activation how, const V& x, const V& lift, bool gated, float clamp) {
    const auto times = [&](V y) { return gated ? both(y, lift, [](vf a, vf b) { return a * b; }) : y; };
    switch (how) {
        case Activation::none: return times(x);
        case Activation::silu: return times(each(x, [](vf v) { return silu(v); }));
        case Activation::gelu: return times(each(x, [](vf v) { return gelu(v); }));
        case Activation::gelu_tanh: return times(each(x, [](vf v) { return gelu_tanh(v); }));
        case Activation::relu: return times(each(x, [](vf v) { return select(v < 0.0f, vf{}, v); }));
        case Activation::clamped_swiglu:
            return both(x, lift, [clamp](vf a, vf b) { return clamped_swiglu(a, b, clamp); });
    }
    return x;
}

// --- panels ---------------------------------------------------------------------------------------------------------

// Rows of x as a product's inner loop reads them: where they lie, or copied and converted.
struct Rows {
    const char* at;
    int64_t pitch;
    int64_t count;
};

template <class M>
INLINE int64_t words_of(int64_t in) {
    return (in + M::WORD - 1) / M::WORD;
}

// Bytes of a copied row of x; whole cache lines, so that rows do not share any.
template <class M>
INLINE int64_t copied_bytes(int64_t in) {
    return up(words_of<M>(in) * M::X_BYTES, LINE);
}

template <class M>
INLINE bool readable(Type type, int64_t in) {
    return type == M::X && (type == Type::bf16 || in % M::WORD == 0);
}

// One row's `in` numbers in the form that M reads.
template <class M>
INLINE void copy_input(Type type, const char* from, int64_t in, char* to) {
    const int64_t width = words_of<M>(in) * M::WORD;
    if (M::X == Type::bf16 && type == Type::bf16) {
        std::memcpy(to, from, size_t(2 * in));
        if (width > in) BF16::put(to + 2 * in, 0);
    } else if (M::X == Type::bf16) {
        write_row(Type::bf16, reinterpret_cast<const float*>(from), in, to, true);
    } else {
        float* const numbers = reinterpret_cast<float*>(to);
        read_row(type, from, in, numbers);
        for (int64_t i = in; i < width; ++i) numbers[i] = 0;
    }
}

// A panel of a product.
struct Panel {
    const char* at;
    const char* next;  // memory that is wanted afterwards and is fetched meanwhile, as much as a panel is long; or null
    float* sums;       // [row][0..PANEL)
};

// `rows` parts of rows of x side by side in `space`, with a pitch that spreads them over a cache.
INLINE const char* gathered(const char* from, int64_t pitch, int64_t rows, int64_t bytes, char* space) {
    for (int64_t t = 0; t < rows; ++t) std::memcpy(space + t * (bytes + LINE), from + t * pitch, size_t(bytes));
    return space;
}

// What to fetch while few rows of x are multiplied by a panel from word `done` on: a little ahead of what is read, and
// at the panel's end what comes next. One stretch of memory is read faster so than when it is fetched far ahead.
INLINE Ahead close_ahead(const Panel& panel, int64_t words, int64_t done) {
    const char* const at = words - done > CLOSE ? panel.at + (done + CLOSE) * 2 * LINE : panel.next;
    return {at, at == nullptr ? 0 : 2, FIRST_LEVEL};
}

// What to fetch while a panel's words [done, done + depth) are multiplied by more rows, for the pass-th time: the words
// after them, or what comes next, in one pass or in two halves.
INLINE Ahead far_ahead(const Panel& panel, int64_t words, int64_t done, int64_t depth, int64_t pass, bool once) {
    const char* const at = done + depth < words ? panel.at + (done + depth) * 2 * LINE : panel.next;
    if (at == nullptr || pass > 1) return {nullptr, 0, SECOND_LEVEL};
    return once ? Ahead{at, 2, SECOND_LEVEL} : Ahead{at + pass * depth * LINE, 1, SECOND_LEVEL};
}

// The sums of each panel = rows of x times it. What is read of x serves all `number` panels. `fetch`: also what follows
// in a panel is fetched before it is needed.
template <class M>
void product(const Panel* panels, int64_t number, int64_t words, const Rows& x, bool fetch) {
    alignas(LINE) char space[TOKENS * (DEPTH * M::X_BYTES + LINE)];
    const int64_t most = rows_at_once(x.count);
    const bool once = x.count <= most, few = x.count <= FEW && once;
    const bool crowded = TOKENS > WAYS / 2 && !once && x.pitch % CROWDED == 0;
    for (int64_t done = 0, depth; done < words; done += depth) {
        depth = least(words - done, DEPTH);
        if (few && words - done > CLOSE) depth = least(depth, words - done - CLOSE);
        for (int64_t first = 0; first < x.count; first += most) {
            const int64_t rows = least(x.count - first, most);
            const char* from = x.at + first * x.pitch + done * M::X_BYTES;
            const int64_t bytes = depth * M::X_BYTES, pitch = crowded ? bytes + LINE : x.pitch;
            if (crowded) from = gathered(from, x.pitch, rows, bytes, space);
            for (const Panel* panel = panels; panel < panels + number; ++panel) {
                Ahead ahead{nullptr, 0, SECOND_LEVEL};
                if (fetch && few) ahead = close_ahead(*panel, words, done);
                if (fetch && !few) ahead = far_ahead(*panel, words, done, depth, first / most, once);
                with_count(rows, [&](auto count) {
                    tile<M, count.value>(panel->at + done * 2 * LINE, depth, from, pitch, panel->sums + first * PANEL,
                                         done > 0, ahead);
                });
            }
        }
    }
}

// Where a panel of rows begins, packed into `space` unless it is already.
INLINE const char* panel_of(const Matrix& weight, int64_t row, int64_t rows, int64_t bytes, const char* next,
                            char* space) {
    const char* at = weight.at + row * bytes;
    if (weight.packed) return at;
    pack(at, rows, bytes, next, space);
    return space;
}

INLINE void read_bias(const Vector& bias, int64_t row, int64_t rows, float* to) {
    for (int64_t r = 0; r < PANEL; ++r) to[r] = bias.at != nullptr && r < rows ? element(bias, row + r) : 0.0f;
}

INLINE V plus_bias(const float* sums, const float* bias) {
    return both(load(sums), load(bias), [](vf a, vf b) { return a + b; });
}

// Write the `rows` first of a panel's outputs. `ends`: the row of y ends with them.
INLINE void put_outputs(const V (&z)[2], int64_t rows, Type type, char* to, bool accumulate, bool ends) {
    if (rows == PANEL && type == Type::f32) {
        float* y = reinterpret_cast<float*>(to);
        for (int n = 0; n < 2; ++n)
            store(y + 16 * n, accumulate ? both(load(y + 16 * n), z[n], [](vf a, vf b) { return a + b; }) : z[n]);
        return;
    }
    if (rows == PANEL) {
        for (int n = 0; n < 2; ++n) store_bf16(to + 32 * n, z[n]);
        return;
    }
    float values[PANEL];
    for (int n = 0; n < 2; ++n) store(values + 16 * n, z[n]);
    if (accumulate)
        for (int64_t r = 0; r < rows; ++r) values[r] += reinterpret_cast<float*>(to)[r];
    write_row(type, values, rows, to, ends);
}

// --- linear ---------------------------------------------------------------------------------------------------------

INLINE void linear_outputs(const Linear& op, const Step& step, const float* sums, const float* lifts, const float* bias,
                           int64_t count, int64_t column, int64_t rows) {
    const float multiplier = float(op.multiplier), cap = float(op.softcap);
    const int64_t item = op.y.type == Type::f32 ? 4 : 2;
    for (int64_t t = 0; t < count; ++t) {
        V z[2];
        for (int n = 0; n < 2; ++n) {
            z[n] = plus_bias(sums + t * PANEL + 16 * n, bias + 16 * n);
            if (multiplier != 1) z[n] = each(z[n], [=](vf v) { return v * multiplier; });
            if (cap != 0) z[n] = each(z[n], [=](vf v) { return cap * hyperbolic(v / cap); });
            if (op.activation == Activation::none) continue;
            const V lift = op.gated ? plus_bias(lifts + t * PANEL + 16 * n, bias + PANEL + 16 * n) : zero();
            z[n] = activated(op.activation, z[n], lift, op.gated, float(op.clamp));
        }
        put_outputs(z, rows, op.y.type, row_of(step, op.y, t, op.y_pitch) + column * item, op.accumulate,
                    column + rows == op.y_pitch);
    }
}

template <class M>
void linear_panels(const Linear& op, const Step& step, const Share& share) {
    const int64_t count = op.selected ? step.rows : step.tokens, panels = (op.out + PANEL - 1) / PANEL;
    const int64_t bytes = op.in * M::Number::BYTES, words = words_of<M>(op.in);
    const int64_t panel_bytes = words * PANEL * 4, copied = copied_bytes<M>(op.in), sides = op.gated ? 2 : 1;
    const bool direct = readable<M>(op.x.type, op.in), together = op.weight.packed && count > TOKENS;
    const int64_t x_item = op.x.type == Type::f32 ? 4 : 2, most = together ? TOGETHER / sides : 1;
    char* space = share.scratch.need(
        size_t(2 * panel_bytes + most * sides * count * PANEL * 4 + (direct ? 0 : count * copied)));
    float* const sums = reinterpret_cast<float*>(space + 2 * panel_bytes);
    char* const copies = reinterpret_cast<char*>(sums + most * sides * count * PANEL);
    // A gate's panel and that of its lift are two sides of a unit.
    const auto row = [&](int64_t unit, int64_t side) {
        return (unit / panels * sides + side) * op.out + unit % panels * PANEL;
    };
    const auto at = [&](int64_t unit, int64_t side) {
        return unit < share.until ? op.weight.at + row(unit, side) * bytes : nullptr;
    };
    const auto outputs = [&](int64_t unit) { return least(PANEL, op.out - unit % panels * PANEL); };
    int64_t copied_head = -1;
    for (int64_t unit = share.begin, number; unit < share.end; unit += number) {
        const int64_t head = unit / panels;
        number = least(most, least(share.end - unit, panels - unit % panels));
        const char* from = step.registers[op.x.at] + head * op.x_step * x_item;
        Rows x{from, row_bytes(op.x.type, op.x_pitch), count};
        if (!direct) {
            for (int64_t t = 0; t < count && copied_head != head; ++t)
                copy_input<M>(op.x.type, from + t * x.pitch, op.in, copies + t * copied);
            copied_head = head;
            x = {copies, copied, count};
        }
        Panel group[TOGETHER];
        for (int64_t i = 0; i < number * sides; ++i) {
            const int64_t own = unit + i / sides, side = i % sides;
            const char* const following = side + 1 < sides ? at(own, side + 1) : at(own + 1, 0);
            const char* const packed =
                panel_of(op.weight, row(own, side), outputs(own), bytes, following, space + side * panel_bytes);
            group[i] = {packed, together ? at(own + number, side) : following, sums + i * count * PANEL};
            if (!together) product<M>(group + i, 1, words, x, op.weight.packed);
        }
        if (together) product<M>(group, number * sides, words, x, true);
        for (int64_t i = 0; i < number; ++i) {
            const int64_t own = unit + i;
            float bias[2 * PANEL];
            for (int64_t side = 0; side < sides; ++side)
                read_bias(op.bias, row(own, side), outputs(own), bias + side * PANEL);
            linear_outputs(op, step, group[i * sides].sums, group[i * sides + sides - 1].sums, bias, count,
                           head * op.y_step + own % panels * PANEL, outputs(own));
        }
    }
}

// action(M{}) with how a weight of a type meets x of a type.
template <class F>
INLINE void with_product(Type weight, Type x, F action) {
    if (weight == Type::f32) return action(Wide<F32>{});
    if (weight == Type::f16) return action(Wide<F16>{});
    if (x == Type::bf16) return action(Bfloat{});
    return action(Wide<BF16>{});
}

// A unit is a panel of outputs of a head. bfloat16 weights meet float32 rows as they are, without rounding them.
void linear(const Linear& op, const Step& step, const Share& share) {
    with_product(op.weight.type, op.x.type,
                 [&](auto m) { linear_panels<decltype(m)>(op, step, share); });
}

}  // namespace
}  // namespace fgsnap
