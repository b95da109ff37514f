// The C interface that fgsnap/kernels/native.py loads: threads, the tape, and sampling.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "sample.h"
#include "tape.h"
#include "team.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fgsnap {
namespace {

constexpr int64_t SERIAL = 16384;       // an op on fewer numbers than this is not worth waking anyone for
constexpr int64_t CACHED = 256 * 1024;  // weight bytes a thread keeps near while all tokens pass over them

// All kernels this machine can run, the best first.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#ifdef FGSNAP_X86_VARIANTS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&kernels_v4);
    if (v3) found.push_back(&kernels_v3);
#endif
    found.push_back(&kernels_base);
    return found;
}

struct Engine {
    Team team;
    const Kernels& kernels;
};

struct Work {
    const void* record;
    Kind kind;
    int64_t units;
    int64_t grain;  // units taken at a time; all of them when one thread should do the op alone
    bool alone() const { return grain >= units; }
};

template <class T>
const T& as(const void* record) {
    return *static_cast<const T*>(record);
}

int64_t shared(int64_t units, int64_t numbers, int threads) {
    if (numbers < SERIAL || threads == 1) return units;
    return std::max<int64_t>(1, units / (threads * 4));
}

// Tiles times key heads; a few short sequences are not divided.
Work attend_work(const Attend& op, int threads) {
    const int64_t units = op.tile_count * op.cache.kv_heads;
    int64_t keys = 0;
    for (int64_t i = 0; i < op.tile_count && keys < SERIAL; ++i) keys += op.positions[op.tiles[2 * i]] + 1;
    const bool small = threads == 1 || keys * op.heads * op.cache.head_dim < 4 * SERIAL;
    return {&op, op.kind, units, small ? units : 1};
}

// Rows of weight taken at a time: few enough to stay cached and to divide the work, whole panels.
int64_t linear_grain(const Linear& op, const Kernels& kernels, int threads) {
    const int64_t bytes = op.in * (op.weight_type == Type::f32 ? 4 : 2);
    int64_t grain = op.out;
    if (threads > 1 && op.count * op.in * op.out >= SERIAL) grain = op.out / (threads * 4);
    if (op.count > 1) grain = std::min(grain, CACHED / std::max<int64_t>(bytes, 1));
    return std::max<int64_t>(grain / kernels.panel, 1) * kernels.panel;
}

Work measure(const void* record, const Kernels& kernels, int threads, size_t& bytes) {
    const Kind kind = as<Kind>(record);
    const auto rows = [&](auto& op, int64_t width) {
        bytes = sizeof(op);
        return Work{record, kind, op.count, shared(op.count, op.count * width, threads)};
    };
    switch (kind) {
        case Kind::embed: return rows(as<Embed>(record), as<Embed>(record).width);
        case Kind::norm: return rows(as<Norm>(record), as<Norm>(record).width);
        case Kind::add: return rows(as<Add>(record), as<Add>(record).width);
        case Kind::rope: return rows(as<Rope>(record), as<Rope>(record).half * 16);
        case Kind::append: {
            const auto& op = as<Append>(record);
            return rows(op, (op.heads + 2 * op.cache.kv_heads) * op.cache.head_dim);
        }
        case Kind::activate: return rows(as<Activate>(record), as<Activate>(record).inner * 8);
        case Kind::linear: {
            const auto& op = as<Linear>(record);
            bytes = sizeof(op);
            return {record, kind, op.count == 0 ? 0 : op.out, linear_grain(op, kernels, threads)};
        }
        case Kind::attend: {
            const auto& op = as<Attend>(record);
            bytes = sizeof(op);
            return attend_work(op, threads);
        }
    }
    bytes = 0;
    return {record, kind, 0, 0};
}

void compute(const Work& work, const Kernels& kernels, int64_t begin, int64_t end, Scratch& scratch) {
    switch (work.kind) {
        case Kind::embed: return kernels.embed(as<Embed>(work.record), begin, end);
        case Kind::norm: return kernels.norm(as<Norm>(work.record), begin, end);
        case Kind::add: return kernels.add(as<Add>(work.record), begin, end);
        case Kind::linear: return kernels.linear(as<Linear>(work.record), begin, end, scratch);
        case Kind::rope: return kernels.rope(as<Rope>(work.record), begin, end);
        case Kind::append: return kernels.append(as<Append>(work.record), begin, end, scratch);
        case Kind::attend: return kernels.attend(as<Attend>(work.record), begin, end, scratch);
        case Kind::activate: return kernels.activate(as<Activate>(work.record), begin, end);
    }
}

struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
};

struct Step {
    const Kernels& kernels;
    std::vector<Work> works;
    std::unique_ptr<Counter[]> counters;
    std::atomic<bool> failed{false};
};

// One op: whoever is free takes the next grain. An op that is done alone is done by thread 0.
void take(Step& step, size_t index, int thread, Scratch& scratch) {
    const Work& work = step.works[index];
    if (work.alone()) {
        if (thread == 0 && work.units > 0) compute(work, step.kernels, 0, work.units, scratch);
        return;
    }
    std::atomic<int64_t>& next = step.counters[index].next;
    for (int64_t begin; (begin = next.fetch_add(work.grain, std::memory_order_relaxed)) < work.units;)
        compute(work, step.kernels, begin, std::min(begin + work.grain, work.units), scratch);
}

// Every op waits for the one before, except that thread 0 need not wait for itself.
void run_step(void* argument, Team& team, int thread) {
    Step& step = *static_cast<Step*>(argument);
    for (size_t i = 0; i < step.works.size(); ++i) {
        if (i > 0 && !(step.works[i - 1].alone() && step.works[i].alone())) team.barrier();
        try {
            take(step, i, thread, team.scratch(thread));
        } catch (const std::exception&) {
            step.failed = true;
        }
    }
}

struct Rows {
    const float* logits;
    int64_t rows, columns;
    const Sampling* how;  // null: lead
    Picked* picked;
    int64_t top;
    int64_t* top_tokens;
    double* top_logprobs;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
};

void pick_rows(void* argument, Team&, int) {
    Rows& work = *static_cast<Rows*>(argument);
    for (int64_t r; (r = work.next.fetch_add(1)) < work.rows;) {
        const float* logits = work.logits + r * work.columns;
        try {
            work.picked[r] = work.how == nullptr ? lead(logits, work.columns)
                                                 : pick(logits, work.columns, work.how[r],
                                                        work.top_tokens + r * work.top, work.top_logprobs + r * work.top);
        } catch (const std::exception&) {
            work.failed = true;
        }
    }
}

int together(Engine& engine, Rows& work) {
    if (work.rows == 1)
        pick_rows(&work, engine.team, 0);
    else
        engine.team.run(pick_rows, &work);
    return work.failed ? 1 : 0;
}

}  // namespace
}  // namespace fgsnap

using namespace fgsnap;

EXPORT int fgsnap_abi() { return ABI; }

// The name of the index-th best set of kernels for this machine, null beyond the last.
EXPORT const char* fgsnap_instructions(int64_t index) {
    const auto found = usable();
    return index >= 0 && index < int64_t(found.size()) ? found[size_t(index)]->name : nullptr;
}

// Null when the name is not among fgsnap_instructions or the threads cannot be started.
EXPORT void* fgsnap_open(int64_t threads, const char* instructions) {
    try {
        for (const Kernels* kernels : usable())
            if (std::strcmp(kernels->name, instructions) == 0) return new Engine{Team(int(threads)), *kernels};
    } catch (const std::exception&) {
    }
    return nullptr;
}

EXPORT void fgsnap_close(void* handle) { delete static_cast<Engine*>(handle); }

// Executes the records in words[0, count) in order. 0: done; 1: out of memory; 2: not a tape.
EXPORT int fgsnap_run(void* handle, const int64_t* words, int64_t count) {
    Engine& engine = *static_cast<Engine*>(handle);
    try {
        Step step{engine.kernels, {}, nullptr, {}};
        step.works.reserve(size_t(count / 6 + 1));
        for (int64_t at = 0; at < count;) {
            size_t bytes = 0;
            step.works.push_back(measure(words + at, engine.kernels, engine.team.threads(), bytes));
            if (bytes == 0 || int64_t(bytes / 8) > count - at) return 2;
            at += int64_t(bytes / 8);
        }
        step.counters.reset(new Counter[step.works.size()]);
        engine.team.run(run_step, &step);
        return step.failed ? 1 : 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// top_tokens and top_logprobs have `top` places a row.
EXPORT int fgsnap_sample(void* handle, const float* logits, int64_t rows, int64_t columns, const Sampling* how,
                         Picked* picked, int64_t top, int64_t* top_tokens, double* top_logprobs) {
    Rows work{logits, rows, columns, how, picked, top, top_tokens, top_logprobs, {}, {}};
    return together(*static_cast<Engine*>(handle), work);
}

EXPORT int fgsnap_top_two(void* handle, const float* logits, int64_t rows, int64_t columns, Picked* picked) {
    Rows work{logits, rows, columns, nullptr, picked, 0, nullptr, nullptr, {}, {}};
    return together(*static_cast<Engine*>(handle), work);
}
