// The C interface that fgsnap/kernels/library.py loads: threads, programs, and sampling.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "program.h"
#include "ranks.h"
#include "sample.h"
#include "team.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fgsnap {
namespace {

constexpr int64_t SMALL = 16384;  // an op on fewer numbers than this is not worth dividing
constexpr int64_t SHARES = 4;     // grains that a thread's range is worked off in, so that others can help
constexpr int64_t FINE = 16;      // the same of a product that is over when the last byte of its matrix is read

constexpr size_t NEAR = 4;           // ops from one product to the next one
constexpr int64_t FETCHED = 64 << 10;  // bytes of it that are fetched before it begins

// All kernels this machine can run, the best first.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#ifdef FGSNAP_X86_VARIANTS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#ifdef FGSNAP_AVX512BF16
    if (v4 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_bf16);
#endif
    if (v4) found.push_back(&kernels_v4);
    if (v3) found.push_back(&kernels_v3);
#endif
    found.push_back(&kernels_base);
    return found;
}

struct Engine {
    Team team;
    const Kernels& kernels;
    std::unique_ptr<Ranks> ranks;  // null: this is the only one
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
        case Kind::squares: return sizeof(Squares) / 8;
        case Kind::add: return sizeof(Add) / 8;
        case Kind::linear: return sizeof(Linear) / 8;
        case Kind::select: return sizeof(Select) / 8;
        case Kind::rope: return sizeof(Rope) / 8;
        case Kind::append: return sizeof(Append) / 8;
        case Kind::attend: return sizeof(Attend) / 8;
        case Kind::activate: return sizeof(Activate) / 8;
        case Kind::gate: return sizeof(Gate) / 8;
        case Kind::latent: return sizeof(Latent) / 8;
        case Kind::rotate: return sizeof(Rotate) / 8;
        case Kind::route: return sizeof(Route) / 8;
        case Kind::assign: return sizeof(Assign) / 8;
        case Kind::expert_up: return sizeof(ExpertUp) / 8;
        case Kind::expert_down: return sizeof(ExpertDown) / 8;
        case Kind::reduce: return sizeof(Reduce) / 8;
        case Kind::gather: return sizeof(Gather) / 8;
    }
    return 0;
}

int64_t panels(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

// How an op of one step divides into units, and units into grains, on a team of some threads.
class Divider {
   public:
    Divider(const Step& step, int threads) : step_(step), threads_(threads) {}

    Job::Phase divide(const Record& record) const {
        switch (record.kind) {
            case Kind::embed: return tokens(as<Embed>(record.words).width);
            case Kind::norm: return tokens(as<Norm>(record.words).width);
            case Kind::squares: return tokens(as<Squares>(record.words).width);
            case Kind::add: return tokens(as<Add>(record.words).width);
            case Kind::linear: return linear(as<Linear>(record.words));
            case Kind::select: return phase(step_.rows, step_.rows * as<Select>(record.words).width);
            case Kind::rope: return tokens(as<Rope>(record.words).half * 16);
            case Kind::append: return append(as<Append>(record.words));
            case Kind::attend: return attend(as<Attend>(record.words));
            case Kind::activate: return tokens(as<Activate>(record.words).inner * 8);
            case Kind::gate: return tokens(as<Gate>(record.words).width);
            case Kind::latent: return tokens(as<Latent>(record.words).cache.head_dim * 4);
            case Kind::rotate: return tokens(as<Rotate>(record.words).heads * as<Rotate>(record.words).width);
            case Kind::route: return tokens(as<Route>(record.words).experts * 16);
            case Kind::assign: return {1, 1};
            case Kind::expert_up: return expert_up(as<ExpertUp>(record.words));
            case Kind::expert_down: return expert_down(as<ExpertDown>(record.words));
            case Kind::reduce: return {1, 1};
            case Kind::gather: return {1, 1};
        }
        return {0, 1};
    }

   private:
    // `numbers` is about how many multiplications the whole op takes.
    Job::Phase phase(int64_t units, int64_t numbers, int64_t shares = SHARES) const {
        if (numbers < SMALL || threads_ == 1) return {units, std::max<int64_t>(units, 1)};
        return {units, std::max<int64_t>(1, units / (threads_ * shares))};
    }

    Job::Phase tokens(int64_t width) const { return phase(step_.tokens, step_.tokens * width); }

    Job::Phase append(const Append& op) const {
        return tokens((op.heads + 2 * op.cache.kv_heads) * op.cache.head_dim * 2);
    }

    Job::Phase linear(const Linear& op) const {
        const int64_t count = op.selected ? step_.rows : step_.tokens;
        if (count == 0) return {0, 1};
        return phase(op.heads * panels(op.out), op.heads * count * op.in * op.out, count <= FEW ? FINE : SHARES);
    }

    // Tiles of tokens times key heads; a few short sequences are not divided.
    Job::Phase attend(const Attend& op) const {
        const int64_t units = step_.tile_count * op.cache.kv_heads;
        int64_t keys = 0;
        for (int64_t i = 0; i < step_.tile_count && keys < SMALL; ++i) keys += step_.positions[step_.tiles[2 * i]] + 1;
        const bool small = threads_ == 1 || keys * op.heads * op.cache.head_dim < 4 * SMALL;
        return {units, small ? std::max<int64_t>(units, 1) : 1};
    }

    // Which experts have work is not known yet: an expert's panels are one grain, or a part of one.
    Job::Phase expert_up(const ExpertUp& op) const {
        const int64_t own = panels(op.inner);
        return {op.experts * own, threads_ == 1 ? op.experts * own : std::min<int64_t>(own, 8)};
    }

    Job::Phase expert_down(const ExpertDown& op) const {
        return phase(panels(op.out), step_.tokens * op.top_k * op.in * op.out);
    }

    const Step& step_;
    const int threads_;
};

class Forward : public Job {
   public:
    // `records` lie in `words`.
    Forward(Engine& engine, const Step& step, std::vector<int64_t> words, std::vector<Record> records,
            std::vector<Phase> phases)
        : Job(std::move(phases), engine.team.threads()),
          kernels_(engine.kernels),
          ranks_(engine.ranks.get()),
          step_(step),
          words_(std::move(words)),
          records_(std::move(records)) {}

    // Whether another rank has given up; to be asked when the job is done.
    bool alone() const { return alone_.load(); }

   private:
    void compute(size_t phase, const Share& share) override {
        const void* words = records_[phase].words;
        switch (records_[phase].kind) {
            case Kind::embed: return kernels_.embed(as<Embed>(words), step_, share);
            case Kind::norm: return kernels_.norm(as<Norm>(words), step_, share);
            case Kind::squares: return kernels_.squares(as<Squares>(words), step_, share);
            case Kind::add: return kernels_.add(as<Add>(words), step_, share);
            case Kind::linear: return kernels_.linear(as<Linear>(words), step_, share);
            case Kind::select: return kernels_.select(as<Select>(words), step_, share);
            case Kind::rope: return kernels_.rope(as<Rope>(words), step_, share);
            case Kind::append: return kernels_.append(as<Append>(words), step_, share);
            case Kind::attend: return kernels_.attend(as<Attend>(words), step_, share);
            case Kind::activate: return kernels_.activate(as<Activate>(words), step_, share);
            case Kind::gate: return kernels_.gate(as<Gate>(words), step_, share);
            case Kind::latent: return kernels_.latent(as<Latent>(words), step_, share);
            case Kind::rotate: return kernels_.rotate(as<Rotate>(words), step_, share);
            case Kind::route: return kernels_.route(as<Route>(words), step_, share);
            case Kind::assign: return kernels_.assign(as<Assign>(words), step_);
            case Kind::expert_up: return kernels_.expert_up(as<ExpertUp>(words), step_, share);
            case Kind::expert_down: return kernels_.expert_down(as<ExpertDown>(words), step_, share);
            case Kind::reduce: return reduce(as<Reduce>(words));
            case Kind::gather: return gather(as<Gather>(words));
        }
    }

    // A product begins with a panel that nobody has fetched: have it on its way while the small ops before it run.
    void meanwhile(size_t phase, int thread) override {
        if (records_[phase].kind != Kind::linear) return;
        for (size_t next = phase + 1; next < records_.size() && next <= phase + NEAR; ++next)
            if (records_[next].kind == Kind::linear) return fetch(as<Linear>(records_[next].words), next, thread);
    }

    void fetch(const Linear& op, size_t phase, int thread) const {
        const int64_t unit = first_unit(phase, thread), row = op.in * (op.weight.type == Type::f32 ? 4 : 2);
        const int64_t head = unit / panels(op.out), rows = op.out * (op.gated ? 2 : 1);
        const char* const at = op.weight.at + (head * rows + unit % panels(op.out) * PANEL) * row;
        const int64_t bytes = std::min(FETCHED, std::min(PANEL, op.out) * row);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    }

    void reduce(const Reduce& op) {
        if (ranks_ != nullptr && !ranks_->reduce(step_.floats(op.x), step_.tokens * op.width)) alone_.store(true);
    }

    void gather(const Gather& op) {
        if (ranks_ == nullptr) {
            for (int64_t r = 0; r < step_.rows; ++r)
                std::memcpy(step_.floats(op.y) + r * op.width, step_.floats(op.x) + r * op.part, size_t(op.width) * 4);
        } else if (!ranks_->gather(step_.floats(op.x), step_.rows, op.part, step_.floats(op.y), op.width)) {
            alone_.store(true);
        }
    }

    const Kernels& kernels_;
    Ranks* const ranks_;
    const Step step_;
    const std::vector<int64_t> words_;
    const std::vector<Record> records_;
    std::atomic<bool> alone_{false};
};

struct Rows {
    float* logits;
    int64_t rows, columns;
    const Sampling* const* how;  // null: lead
    const int64_t* positions;
    const int64_t* forced;  // null: none
    int64_t* tokens;
    double* logprobs;
    int64_t top;
    int64_t* top_tokens;
    double* top_logprobs;
};

class PickRows : public Job {
   public:
    PickRows(const Rows& rows, const Engine& engine)
        : Job({{rows.rows, grain(rows, engine.team.threads())}}, engine.team.threads()),
          rows_(rows),
          kernels_(engine.kernels) {}

   private:
    // A few numbers are not worth waking a thread for.
    static int64_t grain(const Rows& rows, int threads) {
        const int64_t all = std::max<int64_t>(rows.rows, 1);
        return rows.rows * rows.columns < SMALL ? all : std::max<int64_t>(1, all / (threads * SHARES));
    }

    void compute(size_t, const Share& share) override {
        for (int64_t r = share.begin; r < share.end; ++r) {
            const Picked picked = of(r, share.scratch);
            rows_.tokens[r] = picked.token;
            rows_.logprobs[r] = picked.logprob;
        }
    }

    Picked of(int64_t r, Scratch& scratch) const {
        float* const logits = rows_.logits + r * rows_.columns;
        if (rows_.how == nullptr) return lead(kernels_, logits, rows_.columns);
        const int64_t at = r * rows_.top;
        const Asked asked{rows_.how[r], rows_.positions[r], rows_.forced == nullptr ? -1 : rows_.forced[r],
                          rows_.top_tokens + at, rows_.top_logprobs + at};
        return pick(kernels_, logits, rows_.columns, asked, scratch);
    }

    const Rows rows_;
    const Kernels& kernels_;
};

// What end_on_bus_error says and returns.
char last_words[512];
size_t last_words_size;
int last_code;

extern "C" void end_now(int) {
    size_t said = 0;
    while (said < last_words_size) {
        const ssize_t now = write(STDERR_FILENO, last_words + said, last_words_size - said);
        if (now <= 0) break;
        said += size_t(now);
    }
    _exit(last_code);
}

enum Outcome { DONE = 0, NO_MEMORY = 1, NO_PROGRAM = 2, NO_RANKS = 3 };

Outcome run(Engine& engine, const std::shared_ptr<Job>& job) {
    engine.team.run(job);
    return job->failed() ? NO_MEMORY : DONE;
}

Outcome run_program(Engine& engine, const int64_t* program, int64_t count, const Step& step) {
    const Divider divider(step, engine.team.threads());
    // The job's own, for a late thread may look at them when the caller has let go of its program.
    std::vector<int64_t> words(program, program + count);
    std::vector<Record> records;
    std::vector<Job::Phase> phases;
    for (int64_t at = 0; at < count;) {
        const Record record{&words[size_t(at)], Kind(words[size_t(at)])};
        const int64_t own = length(record.kind);
        if (own == 0 || own > count - at) return NO_PROGRAM;
        const Job::Phase phase = divider.divide(record);
        if (phase.units > 0) {
            records.push_back(record);
            phases.push_back(phase);
        }
        at += own;
    }
    const auto forward =
        std::make_shared<Forward>(engine, step, std::move(words), std::move(records), std::move(phases));
    const Outcome outcome = run(engine, forward);
    return forward->alone() ? NO_RANKS : outcome;
}

Outcome pick_rows(Engine& engine, const Rows& rows) {
    return run(engine, std::make_shared<PickRows>(rows, engine));
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

// Whether the kernels of that name multiply bfloat16 rows as they are; -1: there are none of that name.
EXPORT int64_t fgsnap_dots(const char* instructions) {
    for (const Kernels* kernels : usable())
        if (std::strcmp(kernels->name, instructions) == 0) return kernels->dots;
    return -1;
}

// Null when the name is not among fgsnap_instructions or the threads cannot be started.
EXPORT void* fgsnap_open(int64_t threads, const char* instructions) {
    try {
        for (const Kernels* kernels : usable())
            if (std::strcmp(kernels->name, instructions) == 0) return new Engine{Team(int(threads)), *kernels, nullptr};
    } catch (const std::exception&) {
    }
    return nullptr;
}

EXPORT void fgsnap_close(void* handle) { delete static_cast<Engine*>(handle); }

// Bytes of shared memory for `count` ranks that lay `floats` numbers each together at a time.
EXPORT int64_t fgsnap_ranks_memory(int64_t count, int64_t floats) { return Ranks::memory_for(int(count), floats); }

// Makes this one of `count` ranks over shared memory, which must outlive it.
EXPORT void fgsnap_join(void* handle, char* memory, int64_t size, int64_t rank, int64_t count) {
    static_cast<Engine*>(handle)->ranks = std::make_unique<Ranks>(memory, size, int(rank), int(count));
}

// Tells all ranks over this shared memory that one of them has ended.
EXPORT void fgsnap_give_up(char* memory, int64_t size, int64_t count) { Ranks(memory, size, 0, int(count)).give_up(); }

// Executes the records in words[0, count) in order. 0: done; 1: out of memory; 2: not a program; 3: another
// rank has ended.
EXPORT int fgsnap_run(void* handle, const int64_t* words, int64_t count, const Step* step) {
    return guarded([&] { return run_program(*static_cast<Engine*>(handle), words, count, *step); });
}

// A token, and where it was asked for its logprob, for each row; top_tokens and top_logprobs have `top` places a row.
// The logits may be written to.
EXPORT int fgsnap_sample(void* handle, float* logits, int64_t rows, int64_t columns, const Sampling* const* how,
                         const int64_t* positions, const int64_t* forced, int64_t* tokens, double* logprobs,
                         int64_t top, int64_t* top_tokens, double* top_logprobs) {
    const Rows work{logits, rows, columns, how, positions, forced, tokens, logprobs, top, top_tokens, top_logprobs};
    return guarded([&] { return pick_rows(*static_cast<Engine*>(handle), work); });
}

EXPORT int fgsnap_top_two(void* handle, float* logits, int64_t rows, int64_t columns, int64_t* tokens,
                          double* margins) {
    const Rows work{logits, rows, columns, nullptr, nullptr, nullptr, tokens, margins, 0, nullptr, nullptr};
    return guarded([&] { return pick_rows(*static_cast<Engine*>(handle), work); });
}

// From now on a page of a mapped file that cannot be read (SIGBUS) ends the process with this text and code.
EXPORT void fgsnap_end_on_bus_error(const char* text, int64_t size, int64_t code) {
    last_words_size = std::min(size_t(size), sizeof(last_words));
    std::memcpy(last_words, text, last_words_size);
    last_code = int(code);
    struct sigaction action = {};
    action.sa_handler = end_now;
    sigaction(SIGBUS, &action, nullptr);
}
