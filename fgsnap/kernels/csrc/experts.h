// Mixtures of experts: which experts a token picks, whose tokens an expert has, and what it makes of them.
//
// The rows of one token's picks are its entries, token * top_k + pick. Every expert reads its matrices once a step, for
// all its entries together; a token's sum is taken in the order of the experts' numbers.
#pragma once

#include "attention.h"

namespace fgsnap {
namespace {

// A row of a picks register: numbers of experts, then their weights.
struct Picks {
    const char* at;
    int64_t top_k;

    int32_t expert(int64_t entry) const {
        int32_t number;
        std::memcpy(&number, at + (entry / top_k * 2 * top_k + entry % top_k) * 4, 4);
        return number;
    }
    float weight(int64_t entry) const {
        return F32::one(at + (entry / top_k * 2 * top_k + top_k + entry % top_k) * 4);
    }
};

// The index of the largest of n numbers, the first of equals; those of `taken` are passed over. -1: none is left.
INLINE int64_t best(const float* x, const bool* taken, int64_t n) {
    int64_t found = -1;
    for (int64_t i = 0; i < n; ++i)
        if (!taken[i] && (found < 0 || x[i] > x[found])) found = i;
    return found;
}

INLINE void softmax(float* x, int64_t n) {
    float most = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < n; ++i) total += x[i] = expf(x[i] - most);
    for (int64_t i = 0; i < n; ++i) x[i] /= total;
}

INLINE void score_experts(const Route& op, float* x, int64_t n) {
    if (!op.sigmoid) return softmax(x, n);
    for (int64_t i = 0; i < n; ++i) x[i] = 1.0f / (1.0f + expf(-x[i]));
}

// Marks as taken the experts of all but the best groups.
INLINE void keep_groups(const Route& op, const float* ranked, bool* taken, float* group_ranks, bool* kept) {
    const int64_t size = op.experts / op.groups;
    for (int64_t g = 0; g < op.groups; ++g) {
        const float* own = ranked + g * size;
        float first = -INFINITY, second = -INFINITY;
        for (int64_t i = 0; i < size; ++i) {
            if (own[i] > first) {
                second = first;
                first = own[i];
            } else if (own[i] > second) {
                second = own[i];
            }
        }
        group_ranks[g] = op.rank_by_two && size > 1 ? first + second : first;
        kept[g] = false;
    }
    for (int64_t i = 0; i < op.kept_groups; ++i) {
        const int64_t g = best(group_ranks, kept, op.groups);
        if (g >= 0) kept[g] = true;
    }
    for (int64_t e = 0; e < op.experts; ++e) taken[e] = !kept[e / size];
}

// A unit is one token.
void route(const Route& op, const Step& step, const Share& share) {
    const int64_t n = op.experts;
    float* const scores = reinterpret_cast<float*>(share.scratch.need(size_t(3 * n) * 4 + size_t(2 * n)));
    float* const ranked = scores + n;
    float* const group_ranks = ranked + n;
    bool* const taken = reinterpret_cast<bool*>(group_ranks + n);
    bool* const kept = taken + n;
    for (int64_t t = share.begin; t < share.end; ++t) {
        const float* logits = step.floats(op.logits) + t * n;
        std::memcpy(scores, logits, size_t(n) * 4);
        score_experts(op, scores, n);
        for (int64_t e = 0; e < n; ++e) {
            ranked[e] = scores[e] + (op.selection_bias.at == nullptr ? 0.0f : element(op.selection_bias, e));
            taken[e] = false;
        }
        if (op.kept_groups < op.groups) keep_groups(op, ranked, taken, group_ranks, kept);
        int32_t* const experts = reinterpret_cast<int32_t*>(step.floats(op.y)) + t * 2 * op.top_k;
        float* const weights = step.floats(op.y) + t * 2 * op.top_k + op.top_k;
        float total = 0;
        for (int64_t k = 0; k < op.top_k; ++k) {
            experts[k] = int32_t(best(op.select_first ? logits : ranked, taken, n));
            taken[experts[k]] = true;
            weights[k] = op.select_first ? logits[experts[k]] : scores[experts[k]];
        }
        if (op.select_first) score_experts(op, weights, op.top_k);
        for (int64_t k = 0; k < op.top_k; ++k) total += weights[k];
        for (int64_t k = 0; k < op.top_k; ++k)
            weights[k] = weights[k] / (op.renormalize ? total : 1.0f) * float(op.scale);
    }
}

// One unit does it all.
void assign(const Assign& op, const Step& step) {
    const Picks picks{step.registers[op.picks], op.top_k};
    const int64_t entries = step.tokens * op.top_k;
    int32_t* const starts = reinterpret_cast<int32_t*>(step.registers[op.y]);
    int32_t* const listed = starts + op.experts + 1;
    std::memset(starts, 0, size_t(op.experts + 1) * 4);
    for (int64_t entry = 0; entry < entries; ++entry) ++starts[picks.expert(entry) + 1];
    for (int64_t e = 0; e < op.experts; ++e) starts[e + 1] += starts[e];
    for (int64_t entry = 0; entry < entries; ++entry) listed[starts[picks.expert(entry)]++] = int32_t(entry);
    for (int64_t e = op.experts; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
}

struct Entries {
    const int32_t* at;
    int64_t count;
};

INLINE Entries entries_of(const Step& step, Register assigned, int64_t experts, int64_t expert) {
    const int32_t* starts = reinterpret_cast<const int32_t*>(step.registers[assigned]);
    return {starts + experts + 1 + starts[expert], starts[expert + 1] - starts[expert]};
}

// A unit is a panel of the inner width of one expert.
template <class M>
void expert_up_panels(const ExpertUp& op, const Step& step, const Share& share) {
    const int64_t panels = (op.inner + PANEL - 1) / PANEL, words = words_of<M>(op.in);
    const int64_t bytes = op.in * M::Number::BYTES, panel_bytes = words * PANEL * 4, copied = copied_bytes<M>(op.in);
    const int64_t most = step.tokens, rows_of_expert = op.inner * (op.gated ? 2 : 1);
    const Picks picks{step.registers[op.picks], op.top_k};
    char* const space = share.scratch.need(size_t(panel_bytes + most * (copied + 2 * PANEL * 4) + op.in * 4));
    float* const sums = reinterpret_cast<float*>(space + panel_bytes);
    float* const lifts = sums + most * PANEL;
    char* const inputs = reinterpret_cast<char*>(lifts + most * PANEL);
    float* const numbers = reinterpret_cast<float*>(inputs + most * copied);
    int64_t copied_expert = -1;
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const int64_t expert = unit / panels, first = unit % panels * PANEL, row = expert * rows_of_expert + first;
        const int64_t rows = op.inner - first < PANEL ? op.inner - first : PANEL;
        const Entries entries = entries_of(step, op.assigned, op.experts, expert);
        if (entries.count == 0) continue;
        for (int64_t i = 0; i < entries.count && copied_expert != expert; ++i) {
            const char* x = row_of(step, op.x, entries.at[i] / op.top_k, op.in);
            if (!op.weigh_input) {
                copy_input<M>(op.x.type, x, op.in, inputs + i * copied);
                continue;
            }
            read_row(op.x.type, x, op.in, numbers);
            const float weight = picks.weight(entries.at[i]);
            for (int64_t k = 0; k < op.in; ++k) numbers[k] *= weight;
            copy_input<M>(Type::f32, reinterpret_cast<const char*>(numbers), op.in, inputs + i * copied);
        }
        copied_expert = expert;
        const Rows x{inputs, copied, entries.count};
        const char* const lift = op.weight.at + (row + op.inner) * bytes;
        const char* const next = unit + 1 < share.until ? op.weight.at + (row + PANEL) * bytes : nullptr;
        const char* panel = panel_of(op.weight, row, rows, bytes, op.gated ? lift : next, space);
        const Panel gates{panel, op.gated ? lift : next, sums};
        product<M>(&gates, 1, words, x, op.weight.packed);
        float bias[2 * PANEL];
        read_bias(op.bias, row, rows, bias);
        if (op.gated) {
            panel = panel_of(op.weight, row + op.inner, rows, bytes, next, space);
            const Panel lifted{panel, next, lifts};
            product<M>(&lifted, 1, words, x, op.weight.packed);
            read_bias(op.bias, row + op.inner, rows, bias + PANEL);
        }
        const int64_t item = op.y.type == Type::f32 ? 4 : 2;
        for (int64_t i = 0; i < entries.count; ++i) {
            V z[2];
            for (int n = 0; n < 2; ++n) {
                const V gate = plus_bias(sums + i * PANEL + 16 * n, bias + 16 * n);
                const V up = op.gated ? plus_bias(lifts + i * PANEL + 16 * n, bias + PANEL + 16 * n) : zero();
                z[n] = activated(op.activation, gate, up, op.gated, float(op.clamp));
            }
            put_outputs(z, rows, op.y.type, row_of(step, op.y, entries.at[i], op.inner) + first * item, false,
                        first + rows == op.inner);
        }
    }
}

void expert_up(const ExpertUp& op, const Step& step, const Share& share) {
    with_product(op.weight.type, op.x.type,
                 [&](auto m) { expert_up_panels<decltype(m)>(op, step, share); });
}

// A unit is a panel of the outputs.
template <class M>
void expert_down_panels(const ExpertDown& op, const Step& step, const Share& share) {
    const int64_t words = words_of<M>(op.in), most = step.tokens;
    const int64_t bytes = op.in * M::Number::BYTES, panel_bytes = words * PANEL * 4, copied = copied_bytes<M>(op.in);
    const Picks picks{step.registers[op.picks], op.top_k};
    char* const space = share.scratch.need(size_t(panel_bytes + most * (copied + PANEL * 4)));
    float* const sums = reinterpret_cast<float*>(space + panel_bytes);
    char* const inputs = reinterpret_cast<char*>(sums + most * PANEL);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const int64_t first = unit * PANEL, rows = op.out - first < PANEL ? op.out - first : PANEL;
        for (int64_t t = 0; t < step.tokens; ++t)
            std::memset(step.floats(op.y) + t * op.out + first, 0, size_t(rows) * 4);
        for (int64_t expert = 0; expert < op.experts; ++expert) {
            const Entries entries = entries_of(step, op.assigned, op.experts, expert);
            if (entries.count == 0) continue;
            for (int64_t i = 0; i < entries.count; ++i)
                copy_input<M>(op.x.type, row_of(step, op.x, entries.at[i], op.in), op.in, inputs + i * copied);
            const int64_t row = expert * op.out + first;
            const char* panel = panel_of(op.weight, row, rows, bytes, nullptr, space);
            const Panel downs{panel, nullptr, sums};
            product<M>(&downs, 1, words, {inputs, copied, entries.count}, op.weight.packed);
            float bias[PANEL];
            read_bias(op.bias, row, rows, bias);
            for (int64_t i = 0; i < entries.count; ++i) {
                const float weight = op.weigh_input ? 1.0f : picks.weight(entries.at[i]);
                float* y = step.floats(op.y) + entries.at[i] / op.top_k * op.out + first;
                for (int64_t r = 0; r < rows; ++r) y[r] += weight * (sums[i * PANEL + r] + bias[r]);
            }
        }
    }
}

void expert_down(const ExpertDown& op, const Step& step, const Share& share) {
    with_product(op.weight.type, op.x.type,
                 [&](auto m) { expert_down_panels<decltype(m)>(op, step, share); });
}

}  // namespace
}  // namespace fgsnap
