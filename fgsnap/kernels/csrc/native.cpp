// The C interface that fgsnap/kernels/native.py loads: threads, the tape, and sampling.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "sample.h"
#include "tape.h"
#include "team.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fgsnap {
namespace {

constexpr int64_t SMALL = 16384;        // an op on fewer numbers than this is not worth dividing
constexpr int64_t CACHED = 256 * 1024;  // weight bytes a thread keeps near while all tokens pass over them
constexpr int64_t SHARES = 4;           // grains a thread should find, so that all finish together

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

template <class T>
const T& as(const void* record) {
    return *static_cast<const T*>(record);
}

struct Record {
    const void* words;
    Kind kind;
};

// The words that a record of this kind has; 0: there is no such kind.
int64_t length(Kind kind) {
    switch (kind) {
        case Kind::embed: return sizeof(Embed) / 8;
        case Kind::norm: return sizeof(Norm) / 8;
        case Kind::add: return sizeof(Add) / 8;
        case Kind::linear: return sizeof(Linear) / 8;
        case Kind::rope: return sizeof(Rope) / 8;
        case Kind::append: return sizeof(Append) / 8;
        case Kind::attend: return sizeof(Attend) / 8;
        case Kind::activate: return sizeof(Activate) / 8;
    }
    return 0;
}

// How an op divides into units, and units into grains, on a team of some threads.
class Divider {
   public:
    Divider(const Kernels& kernels, int threads) : kernels_(kernels), threads_(threads) {}

    Job::Phase divide(const Record& record) const {
        switch (record.kind) {
            case Kind::embed: return rows(as<Embed>(record.words), as<Embed>(record.words).width);
            case Kind::norm: return rows(as<Norm>(record.words), as<Norm>(record.words).width);
            case Kind::add: return rows(as<Add>(record.words), as<Add>(record.words).width);
            case Kind::rope: return rows(as<Rope>(record.words), as<Rope>(record.words).half * 16);
            case Kind::activate: return rows(as<Activate>(record.words), as<Activate>(record.words).inner * 8);
            case Kind::append: return append(as<Append>(record.words));
            case Kind::linear: return linear(as<Linear>(record.words));
            case Kind::attend: return attend(as<Attend>(record.words));
        }
        return {0, 1};
    }

   private:
    int64_t grain(int64_t units, int64_t numbers) const {
        if (numbers < SMALL || threads_ == 1) return std::max<int64_t>(units, 1);
        return std::max<int64_t>(1, units / (threads_ * SHARES));
    }

    template <class Op>
    Job::Phase rows(const Op& op, int64_t width) const {
        return {op.count, grain(op.count, op.count * width)};
    }

    Job::Phase append(const Append& op) const {
        return rows(op, (op.heads + 2 * op.cache.kv_heads) * op.cache.head_dim);
    }

    // Few enough rows of weight to stay cached while the tokens pass, and whole panels.
    Job::Phase linear(const Linear& op) const {
        const int64_t row_bytes = std::max<int64_t>(1, op.in * (op.weight_type == Type::f32 ? 4 : 2));
        int64_t rows = grain(op.out, op.count * op.in * op.out);
        if (op.count > 1) rows = std::min(rows, CACHED / row_bytes);
        return {op.count == 0 ? 0 : op.out, std::max<int64_t>(1, rows / kernels_.panel) * kernels_.panel};
    }

    // Tiles of tokens times key heads; a few short sequences are not divided.
    Job::Phase attend(const Attend& op) const {
        const int64_t units = op.tile_count * op.cache.kv_heads;
        int64_t keys = 0;
        for (int64_t i = 0; i < op.tile_count && keys < SMALL; ++i) keys += op.positions[op.tiles[2 * i]] + 1;
        const bool small = threads_ == 1 || keys * op.heads * op.cache.head_dim < 4 * SMALL;
        return {units, small ? units : 1};
    }

    const Kernels& kernels_;
    const int threads_;
};

class Step : public Job {
   public:
    Step(const Kernels& kernels, std::vector<Record> records, std::vector<Phase> phases)
        : Job(std::move(phases)), kernels_(kernels), records_(std::move(records)) {}

   private:
    void compute(size_t phase, int64_t begin, int64_t end, Scratch& scratch) override {
        const void* words = records_[phase].words;
        switch (records_[phase].kind) {
            case Kind::embed: return kernels_.embed(as<Embed>(words), begin, end);
            case Kind::norm: return kernels_.norm(as<Norm>(words), begin, end);
            case Kind::add: return kernels_.add(as<Add>(words), begin, end);
            case Kind::linear: return kernels_.linear(as<Linear>(words), begin, end, scratch);
            case Kind::rope: return kernels_.rope(as<Rope>(words), begin, end);
            case Kind::append: return kernels_.append(as<Append>(words), begin, end, scratch);
            case Kind::attend: return kernels_.attend(as<Attend>(words), begin, end, scratch);
            case Kind::activate: return kernels_.activate(as<Activate>(words), begin, end);
        }
    }

    const Kernels& kernels_;
    const std::vector<Record> records_;
};

struct Rows {
    const float* logits;
    int64_t rows, columns;
    const Sampling* how;  // null: lead
    Picked* picked;
    int64_t top;
    int64_t* top_tokens;
    double* top_logprobs;
};

class PickRows : public Job {
   public:
    explicit PickRows(const Rows& rows) : Job({{rows.rows, 1}}), rows_(rows) {}

   private:
    void compute(size_t, int64_t begin, int64_t end, Scratch&) override {
        for (int64_t r = begin; r < end; ++r) {
            const float* logits = rows_.logits + r * rows_.columns;
            rows_.picked[r] = rows_.how == nullptr
                                  ? lead(logits, rows_.columns)
                                  : pick(logits, rows_.columns, rows_.how[r], rows_.top_tokens + r * rows_.top,
                                         rows_.top_logprobs + r * rows_.top);
        }
    }

    const Rows rows_;
};

enum Outcome { DONE = 0, NO_MEMORY = 1, NO_TAPE = 2 };

Outcome run(Engine& engine, const std::shared_ptr<Job>& job) {
    engine.team.run(job);
    return job->failed() ? NO_MEMORY : DONE;
}

Outcome run_tape(Engine& engine, const int64_t* words, int64_t count) {
    const Divider divider(engine.kernels, engine.team.threads());
    std::vector<Record> records;
    std::vector<Job::Phase> phases;
    for (int64_t at = 0; at < count;) {
        const Record record{words + at, Kind(words[at])};
        const int64_t own = length(record.kind);
        if (own == 0 || own > count - at) return NO_TAPE;
        const Job::Phase phase = divider.divide(record);
        if (phase.units > 0) {
            records.push_back(record);
            phases.push_back(phase);
        }
        at += own;
    }
    return run(engine, std::make_shared<Step>(engine.kernels, std::move(records), std::move(phases)));
}

template <class Function>
int guarded(const Function& function) {
    try {
        return function();
    } catch (const std::exception&) {
        return NO_MEMORY;
    }
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
    return guarded([&] { return run_tape(*static_cast<Engine*>(handle), words, count); });
}

// top_tokens and top_logprobs have `top` places a row.
EXPORT int fgsnap_sample(void* handle, const float* logits, int64_t rows, int64_t columns, const Sampling* how,
                         Picked* picked, int64_t top, int64_t* top_tokens, double* top_logprobs) {
    const Rows work{logits, rows, columns, how, picked, top, top_tokens, top_logprobs};
    return guarded([&] { return run(*static_cast<Engine*>(handle), std::make_shared<PickRows>(work)); });
}

EXPORT int fgsnap_top_two(void* handle, const float* logits, int64_t rows, int64_t columns, Picked* picked) {
    const Rows work{logits, rows, columns, nullptr, picked, 0, nullptr, nullptr};
    return guarded([&] { return run(*static_cast<Engine*>(handle), std::make_shared<PickRows>(work)); });
}
