// What Python records and C++ executes: a program of op records, each a row of 64-bit words that starts with its kind.
//
// fgsnap/kernels/native.py writes the same words in the same order; ABI goes up whenever a record changes. Python has
// checked every size before a record is written. A record names activations by register; where a register lies and how
// many rows it has is the step's business, so one program serves batches of any shape.
//
// Rows of a register are float32, or bfloat16 filled up with a zero to an even number. A row is as wide as its op says.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fgsnap {

constexpr int ABI = 7;
constexpr int64_t PANEL = 32;  // rows of a matrix that are computed together; those of a packed one lie together
constexpr int64_t TILE = 16;   // tokens of one sequence that attend together
constexpr int64_t MASS = 64;   // logits whose weights are summed together
constexpr int64_t FEW = 4;     // rows of x whose product with a matrix takes as long as the matrix takes to be read

enum class Kind : int64_t {
    embed,
    norm,
    add,
    linear,
    select,
    rope,
    append,
    attend,
    activate,
    gate,
    latent,
    rotate,
    route,
    assign,
    expert_up,
    expert_down,
    reduce,
    gather,
    squares,
};
enum class Type : int64_t { f32, bf16, f16 };
enum class NormKind : int64_t { rms, ln, l2 };
enum class Activation : int64_t { none, silu, gelu, gelu_tanh, relu, clamped_swiglu };

using Register = int64_t;

// What one forward is about; fgsnap/kernels/native.py writes it anew for every step.
struct Step {
    int64_t tokens;
    int64_t rows;
    int64_t tile_count;
    const int32_t* ids;
    const int32_t* positions;
    const int32_t* const* tables;  // the keys of token t's sequence live in blocks tables[t][position / block size]
    const int32_t* tiles;          // pairs (first token, tokens) of neighbours in one sequence
    const int32_t* selected;       // [rows] tokens whose logits are wanted
    char* const* registers;

    float* floats(Register r) const { return reinterpret_cast<float*>(registers[r]); }
};

// A batch as Python has it, in the order of its words, and what of a Step follows from it.
struct Ragged {
    int64_t sequences;
    int64_t tokens;
    int64_t rows;
    int64_t block_size;
    const int32_t* ids;
    const int32_t* positions;
    const int32_t* selected;
    const int32_t* starts;         // [sequences + 1]
    const int32_t* lengths;        // [sequences]
    const int32_t* sizes;          // [sequences] blocks in each table
    const int32_t* const* tables;  // [sequences]
    const int32_t** table_of;      // [tokens] to be written
    int32_t* tiles;                // room for sequences + tokens / TILE pairs
    int64_t tile_count;
    int64_t highest_block;
};

// One activation as an op sees it.
struct Operand {
    Register at;
    Type type;
};

// A mapped matrix, row-major or packed: panels of PANEL rows, in them word after word of 4 bytes the rows side by side.
struct Matrix {
    const char* at;
    Type type;
    int64_t packed;
};

// A mapped vector; null: there is none.
struct Vector {
    const char* at;
    Type type;
};

struct NormRule {
    NormKind how;
    Vector weight, bias;
    int64_t unit_offset;
    double eps;
};

// y = scale * table[id - first], where id is a token's id or, `by_position`, its position; zeros outside the table.
struct Embed {
    Kind kind;
    Register y;
    Matrix table;
    int64_t width, first, table_rows;
    double scale;
    int64_t by_position;
};

// Columns [begin, begin + width) of rows that are pitch numbers apart; y likewise.
// squares >= 0: the vector is part of one of `whole` numbers; number `column` of that register's rows of `columns` is the
// sum of its squares.
struct Norm {
    Kind kind;
    Operand x, y;
    int64_t width, pitch, begin;
    NormRule rule;
    Register squares;
    int64_t columns, column, whole;
};

// Number `column` of y's rows of `columns` = the sum of the squares of a part of x.
struct Squares {
    Kind kind;
    Operand x;
    Register y;
    int64_t width, pitch, begin, columns, column;
};

struct Add {
    Kind kind;
    Operand x, branch;
    Register y;
    int64_t width;
    double multiplier;
};

// z = multiplier * (x W^T + bias), then softcap, then the activation; y = z, or y += z.
//
// heads > 1: as many such products side by side: head h reads numbers [h * x_step, h * x_step + in) of a row of x, the
// matrix's rows [h * out, (h + 1) * out), and writes numbers [h * y_step, h * y_step + out) of a row of y. A gated
// activation's matrix has 2 * out rows: first all gates, then all ups. `selected`: rows, not tokens, are counted.
struct Linear {
    Kind kind;
    Operand x, y;
    Matrix weight;
    Vector bias;
    int64_t in, out, heads, x_pitch, x_step, y_pitch, y_step;
    int64_t selected, accumulate;
    Activation activation;
    int64_t gated;
    double clamp, multiplier, softcap;
};

struct Select {
    Kind kind;
    Operand x;
    Register y;
    int64_t width;
};

// y[t] = cos of all angles, then sin of all angles, times factor.
struct Rope {
    Kind kind;
    Register y;
    const float* frequencies;
    int64_t half;
    double factor;
};

// A layer's cache in words of 4 bytes, one number of float32 or two of the others. Keys: [block][kv head][group of 16
// slots][word of the head][16 slots]. Values: [block][kv head][word of the slots][value_dim rounded up to 16].
struct Cache {
    char* keys;
    char* values;
    Type type;
    int64_t block_size, kv_heads, head_dim, value_dim;
};

// temperature: 0 none, 1 logn, 2 step.
struct Append {
    Kind kind;
    Register qkv;
    Operand q;
    int64_t heads;
    Register angles;  // -1: no rotation
    int64_t half;
    int64_t normed, after_rope;
    NormRule query, key;
    int64_t temperature, base;
    double temperature_scale;
    Cache cache;
};

// window and chunk 0: all earlier keys; softcap 0: none.
struct Attend {
    Kind kind;
    Operand q, y;
    int64_t heads, window, chunk;
    double scale, softcap;
    const float* slopes;  // null: no ALiBi
    double alibi_scale;
    int64_t alibi_bfloat16;
    Vector sinks;
    Cache cache;
};

struct Activate {
    Kind kind;
    Activation how;
    Register x;
    Operand y;
    int64_t inner, gated;
    double clamp;
};

// branch *= sigmoid(x . weight)
struct Gate {
    Kind kind;
    Register branch;
    Operand x;
    Matrix weight;
    int64_t width, branch_width;
};

// A row of x is a latent [value_dim], which is normed, and a key [2 * half], which is rotated: together one key of the
// cache, and the latent alone its value.
struct Latent {
    Kind kind;
    Register x;
    NormRule rule;
    Register angles;
    int64_t half;
    Cache cache;
};

// Numbers [h * x_step + x_begin, ... + width) of every head of x, rotated, to [h * y_step + y_begin, ...) of y.
struct Rotate {
    Kind kind;
    Register x;
    Operand y;
    int64_t heads, x_pitch, x_step, x_begin, y_pitch, y_step, y_begin, width;
    Register angles;
    int64_t half;
};

// How tokens pick experts; see ops.RouterArgs. A row of y is top_k expert numbers (int32), then their top_k weights.
struct Route {
    Kind kind;
    Register logits, y;
    int64_t experts, top_k;
    int64_t sigmoid, select_first, groups, kept_groups, rank_by_two, renormalize;
    double scale;
    Vector selection_bias;
};

// Turns picks round. y, int32: experts + 1 starts, then tokens * top_k entries token * top_k + pick, expert by expert.
struct Assign {
    Kind kind;
    Register picks, y;
    int64_t experts, top_k;
};

// Row entry of y = activation(x[token] W_e^T + bias_e) for all entries of all experts.
struct ExpertUp {
    Kind kind;
    Operand x, y;
    Register picks, assigned;
    Matrix weight;
    Vector bias;
    int64_t experts, top_k, in, inner, gated;
    Activation activation;
    double clamp;
    int64_t weigh_input;
};

// y[token] = sum over its experts, in the order of their numbers, of weight * (x[entry] W_e^T + bias_e).
struct ExpertDown {
    Kind kind;
    Operand x;
    Register y, picks, assigned;
    Matrix weight;
    Vector bias;
    int64_t experts, top_k, in, out, weigh_input;
};

// x = the sum over all ranks, in rank order.
struct Reduce {
    Kind kind;
    Register x;
    int64_t width;
};

// y = the ranks' rows of x, `part` numbers each, side by side; cut off at `width`. Both are rows of logits.
struct Gather {
    Kind kind;
    Register x, y;
    int64_t part, width;
};

// A thread's own memory, grown when an op needs more; its contents do not outlive the call that asked.
class Scratch {
   public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch();
    char* need(size_t bytes);

   private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

// What one thread is to compute of an op: units [begin, end). Most likely it then goes on to `until`, whose memory may
// be fetched ahead.
struct Share {
    int64_t begin, end, until;
    Scratch& scratch;
};

// Passes over a row of logits. A logit x weighs e^((x - most) * steepness); one that equals `most` weighs 1, even where
// both are infinite.
template <class T>
struct Scan {
    // Where the largest is, the first of equals; -1: there is NaN, or nothing above -infinity.
    int64_t (*peak)(const T* x, int64_t count);
    // sums[b] = the weights of x[b * MASS, (b + 1) * MASS) together.
    void (*masses)(const T* x, int64_t count, double most, double steepness, double* sums);
    void (*weigh)(const T* x, int64_t count, double most, double steepness, double* weights);
    // Where x is at least `bound`, ascending; returns how many there are. `found` has room for 16 more than `count`.
    int64_t (*above)(const T* x, int64_t count, T bound, int32_t* found);
};

// One instruction set's kernels. What a unit of an op is, is told beside each kernel, and no result depends on how the
// units are divided.
struct Kernels {
    const char* name;
    int64_t dots;  // whether bfloat16 rows are multiplied as they are, by the processor's own instruction
    void (*embed)(const Embed&, const Step&, const Share&);
    void (*norm)(const Norm&, const Step&, const Share&);
    void (*squares)(const Squares&, const Step&, const Share&);
    void (*add)(const Add&, const Step&, const Share&);
    void (*linear)(const Linear&, const Step&, const Share&);
    void (*select)(const Select&, const Step&, const Share&);
    void (*rope)(const Rope&, const Step&, const Share&);
    void (*append)(const Append&, const Step&, const Share&);
    void (*attend)(const Attend&, const Step&, const Share&);
    void (*activate)(const Activate&, const Step&, const Share&);
    void (*gate)(const Gate&, const Step&, const Share&);
    void (*latent)(const Latent&, const Step&, const Share&);
    void (*rotate)(const Rotate&, const Step&, const Share&);
    void (*route)(const Route&, const Step&, const Share&);
    void (*assign)(const Assign&, const Step&);
    void (*expert_up)(const ExpertUp&, const Step&, const Share&);
    void (*expert_down)(const ExpertDown&, const Step&, const Share&);
    Scan<float> floats;
    Scan<double> doubles;
};

extern const Kernels kernels_base;
#ifdef FGSNAP_X86_VARIANTS
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;
#endif
#ifdef FGSNAP_AVX512BF16
extern const Kernels kernels_bf16;
#endif

}  // namespace fgsnap
