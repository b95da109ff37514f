// What Python records and C++ executes: a tape of op records, each a row of 64-bit words that starts with its kind.
//
// fgsnap/kernels/native.py writes the same words in the same order; ABI goes up whenever a record changes. Python has
// checked every size before a record is written. Activations are float32 rows without padding. Nothing here allocates.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fgsnap {

constexpr int ABI = 1;

enum class Kind : int64_t { embed, norm, add, linear, rope, append, attend, activate };
enum class Type : int64_t { f32, bf16, f16 };
enum class NormKind : int64_t { rms, ln, l2 };
enum class Activation : int64_t { silu, gelu, gelu_tanh, relu };

struct Embed {
    Kind kind;
    const int32_t* tokens;
    const char* table;
    float* y;
    int64_t count, width;
    Type type;
    double scale;
};

struct Norm {
    Kind kind;
    NormKind how;
    const float* x;
    float* y;
    const char* weight;  // null: none
    const char* bias;    // null: none
    int64_t count, width;
    Type weight_type, bias_type;
    int64_t unit_offset;
    double eps;
};

struct Add {
    Kind kind;
    float* x;
    const float* branch;
    int64_t count, width;
    double multiplier;
};

// y = softcap(multiplier * (x[rows] W^T + bias)); rows null: all of x; softcap 0: none.
struct Linear {
    Kind kind;
    const float* x;
    const int32_t* rows;
    const char* weight;
    const char* bias;  // null: none
    float* y;
    int64_t count, in, out;
    Type weight_type, bias_type;
    double multiplier, softcap;
};

// y[t] = cos of all angles, then sin of all angles, times factor.
struct Rope {
    Kind kind;
    const int32_t* positions;
    const float* frequencies;
    float* y;
    int64_t count, half;
    double factor;
};

// A layer's cache: keys, then values, each [block][kv head][slot][stride], rows padded with zeros to the stride.
struct Cache {
    char* keys;
    char* values;
    Type type;
    int64_t block_size, kv_heads, head_dim, stride;
};

// Token t's keys live in blocks[tables[t] + position / block_size].
struct Append {
    Kind kind;
    const float* qkv;
    float* q;
    const float* angles;  // null: no rotation
    int64_t half;
    const int32_t* positions;
    const int32_t* tables;
    const int32_t* blocks;
    int64_t count, heads;
    Cache cache;
};

// tiles: pairs (first token, tokens) of neighbours in one sequence. window 0: all earlier keys.
struct Attend {
    Kind kind;
    const float* q;
    float* y;
    const int32_t* positions;
    const int32_t* tables;
    const int32_t* blocks;
    const int32_t* tiles;
    int64_t tile_count, heads, window;
    double scale;
    Cache cache;
};

struct Activate {
    Kind kind;
    Activation how;
    const float* x;
    float* y;
    int64_t count, inner, gated;
};

// A thread's own memory, grown when an op needs more; its contents do not outlive the call that asked.
class Scratch {
   public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch();
    float* need(size_t floats);

   private:
    float* data_ = nullptr;
    size_t size_ = 0;
};

// One instruction set's kernels. Each computes units [begin, end) of an op; what a unit is, is told by units() and
// no result depends on how the units are divided.
struct Kernels {
    const char* name;
    int64_t panel;  // linear works on this many weight rows at a time
    void (*embed)(const Embed&, int64_t begin, int64_t end);
    void (*norm)(const Norm&, int64_t begin, int64_t end);
    void (*add)(const Add&, int64_t begin, int64_t end);
    void (*linear)(const Linear&, int64_t begin, int64_t end, Scratch&);
    void (*rope)(const Rope&, int64_t begin, int64_t end);
    void (*append)(const Append&, int64_t begin, int64_t end, Scratch&);
    void (*attend)(const Attend&, int64_t begin, int64_t end, Scratch&);
    void (*activate)(const Activate&, int64_t begin, int64_t end);
};

extern const Kernels kernels_base;
#ifdef FGSNAP_X86_VARIANTS
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;
#endif

}  // namespace fgsnap
