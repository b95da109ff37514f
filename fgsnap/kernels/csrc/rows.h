// What is done with one row of activations at a time. A unit is one row.
#pragma once

#include "linear.h"

namespace fgsnap {
namespace {

INLINE void table_row(const Matrix& table, int64_t row, int64_t width, float* to) {
    with_type(table.type, [&](auto type) {
        using W = decltype(type);
        const char* at = table.at + row * width * W::BYTES;
        if (table.packed) at = table.at + row / PANEL * PANEL * width * W::BYTES + row % PANEL * 4;
        for (int64_t i = 0; i < width; ++i)
            to[i] = W::one(table.packed ? at + i / W::WORD * PANEL * 4 + i % W::WORD * W::BYTES : at + i * W::BYTES);
    });
}

void embed(const Embed& op, const Step& step, const Share& share) {
    const float scale = float(op.scale);
    for (int64_t t = share.begin; t < share.end; ++t) {
        float* y = step.floats(op.y) + t * op.width;
        const int64_t row = (op.by_position ? step.positions : step.ids)[t] - op.first;
        if (row < 0 || row >= op.table_rows) {
            std::memset(y, 0, size_t(op.width) * 4);
            continue;
        }
        table_row(op.table, row, op.width, y);
        for (int64_t i = 0; i < op.width; ++i) y[i] *= scale;
    }
}

// Sum of (x - mean)^power for power 1 (mean 0) or 2.
INLINE float moment(const float* x, int64_t width, float mean, bool squared) {
    V sums = zero();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        sums = both(sums, load(x + i), [=](vf total, vf v) {
            const vf d = v - mean;
            return total + (squared ? d * d : d);
        });
    float total = sum(sums);
    for (; i < width; ++i) {
        const float d = x[i] - mean;
        total += squared ? d * d : d;
    }
    return total;
}

// `square` is the mean of (x - mean)^2; x may be y.
INLINE void scale_row(const NormRule& rule, const float* x, int64_t width, float mean, float square, float* y) {
    const float offset = rule.unit_offset ? 1.0f : 0.0f;
    const float scale = 1.0f / sqrtf(square + float(rule.eps));
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * scale;
    if (rule.weight.at != nullptr)
        with_type(rule.weight.type, [&](auto type) {
            using W = decltype(type);
            for (int64_t i = 0; i < width; ++i) y[i] *= W::one(rule.weight.at + i * W::BYTES) + offset;
        });
    if (rule.bias.at != nullptr)
        for (int64_t i = 0; i < width; ++i) y[i] += element(rule.bias, i);
}

// x may be y.
INLINE void norm_row(const NormRule& rule, const float* x, int64_t width, float* y) {
    const float mean = rule.how == NormKind::ln ? moment(x, width, 0, false) / float(width) : 0.0f;
    scale_row(rule, x, width, mean, moment(x, width, mean, true) / float(width), y);
}

constexpr int64_t LOCAL = 256;  // numbers that are held on the stack between reading and writing

void norm(const Norm& op, const Step& step, const Share& share) {
    float* const values = reinterpret_cast<float*>(share.scratch.need(size_t(op.width) * 4));
    const int64_t x_item = op.x.type == Type::f32 ? 4 : 2, y_item = op.y.type == Type::f32 ? 4 : 2;
    for (int64_t t = share.begin; t < share.end; ++t) {
        read_row(op.x.type, row_of(step, op.x, t, op.pitch) + op.begin * x_item, op.width, values);
        if (op.squares < 0)
            norm_row(op.rule, values, op.width, values);
        else
            scale_row(op.rule, values, op.width, 0,
                      step.floats(op.squares)[t * op.columns + op.column] / float(op.whole), values);
        char* y = row_of(step, op.y, t, op.pitch) + op.begin * y_item;
        write_row(op.y.type, values, op.width, y, op.begin + op.width == op.pitch);
    }
}

void squares(const Squares& op, const Step& step, const Share& share) {
    float* const values = reinterpret_cast<float*>(share.scratch.need(size_t(op.width) * 4));
    const int64_t item = op.x.type == Type::f32 ? 4 : 2;
    for (int64_t t = share.begin; t < share.end; ++t) {
        read_row(op.x.type, row_of(step, op.x, t, op.pitch) + op.begin * item, op.width, values);
        step.floats(op.y)[t * op.columns + op.column] = moment(values, op.width, 0, true);
    }
}

void add(const Add& op, const Step& step, const Share& share) {
    const float multiplier = float(op.multiplier);
    for (int64_t t = share.begin; t < share.end; ++t) {
        const char* x = row_of(step, op.x, t, op.width);
        const char* branch = row_of(step, op.branch, t, op.width);
        float* y = step.floats(op.y) + t * op.width;
        for (int64_t at = 0; at < op.width; at += LOCAL) {
            float a[LOCAL], b[LOCAL];
            const int64_t count = op.width - at < LOCAL ? op.width - at : LOCAL;
            read_row(op.x.type, x + row_bytes(op.x.type, at), count, a);
            read_row(op.branch.type, branch + row_bytes(op.branch.type, at), count, b);
            for (int64_t i = 0; i < count; ++i) y[at + i] = a[i] + multiplier * b[i];
        }
    }
}

// A unit is one selected row.
void select(const Select& op, const Step& step, const Share& share) {
    const int64_t bytes = row_bytes(op.x.type, op.width);
    for (int64_t r = share.begin; r < share.end; ++r)
        std::memcpy(step.registers[op.y] + r * bytes, row_of(step, op.x, step.selected[r], op.width), size_t(bytes));
}

void activate(const Activate& op, const Step& step, const Share& share) {
    const int64_t pitch = op.gated ? 2 * op.inner : op.inner;
    for (int64_t t = share.begin; t < share.end; ++t) {
        const float* x = step.floats(op.x) + t * pitch;
        char* y = row_of(step, op.y, t, op.inner);
        for (int64_t at = 0; at < op.inner; at += LOCAL) {
            alignas(64) float a[LOCAL] = {}, b[LOCAL] = {};
            const int64_t count = op.inner - at < LOCAL ? op.inner - at : LOCAL;
            std::memcpy(a, x + at, size_t(count) * 4);
            if (op.gated) std::memcpy(b, x + op.inner + at, size_t(count) * 4);
            for (int64_t i = 0; i < count; i += 16)
                store(a + i, activated(op.how, load(a + i), load(b + i), op.gated, float(op.clamp)));
            write_row(op.y.type, a, count, y + row_bytes(op.y.type, at), true);
        }
    }
}

void gate(const Gate& op, const Step& step, const Share& share) {
    float* const x = reinterpret_cast<float*>(share.scratch.need(size_t(2 * up(op.width, 16)) * 4));
    float* const weight = x + up(op.width, 16);
    std::memset(x, 0, size_t(2 * up(op.width, 16)) * 4);
    table_row(op.weight, 0, op.width, weight);
    for (int64_t t = share.begin; t < share.end; ++t) {
        read_row(op.x.type, row_of(step, op.x, t, op.width), op.width, x);
        V sums = zero();
        for (int64_t i = 0; i < op.width; i += 16)
            for (int p = 0; p < PARTS; ++p) sums.p[p] += load(x + i).p[p] * load(weight + i).p[p];
        const float factor = sigmoid(splat(sum(sums)))[0];
        float* branch = step.floats(op.branch) + t * op.branch_width;
        for (int64_t i = 0; i < op.branch_width; ++i) branch[i] *= factor;
    }
}

// The angle is a float32 product, as checkpoints were trained with; its cosine is then taken exactly.
void rope(const Rope& op, const Step& step, const Share& share) {
    for (int64_t t = share.begin; t < share.end; ++t) {
        float* y = step.floats(op.y) + t * 2 * op.half;
        for (int64_t i = 0; i < op.half; ++i) {
            const float angle = float(step.positions[t]) * op.frequencies[i];
            y[i] = float(cos(double(angle))) * float(op.factor);
            y[op.half + i] = float(sin(double(angle))) * float(op.factor);
        }
    }
}

// The first 2 * half of `width` numbers, the first half of them against the second; x may be y.
INLINE void turn_pairs(const float* x, const float* angles, int64_t half, int64_t width, float* y) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i], c = angles[i], s = angles[half + i];
        y[i] = a * c - b * s;
        y[half + i] = b * c + a * s;
    }
    for (int64_t i = 2 * half; i < width; ++i) y[i] = x[i];
}

void rotate(const Rotate& op, const Step& step, const Share& share) {
    float* const turned = reinterpret_cast<float*>(share.scratch.need(size_t(op.width) * 4));
    const int64_t item = op.y.type == Type::f32 ? 4 : 2;
    for (int64_t t = share.begin; t < share.end; ++t) {
        const float* angles = op.angles < 0 ? nullptr : step.floats(op.angles) + t * 2 * op.half;
        char* y = row_of(step, op.y, t, op.y_pitch);
        for (int64_t h = 0; h < op.heads; ++h) {
            turn_pairs(step.floats(op.x) + t * op.x_pitch + h * op.x_step + op.x_begin, angles, op.half, op.width,
                       turned);
            const int64_t at = h * op.y_step + op.y_begin;
            write_row(op.y.type, turned, op.width, y + at * item, at + op.width == op.y_pitch);
        }
    }
}

}  // namespace
}  // namespace fgsnap
