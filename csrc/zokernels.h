// The plain C interface of the native backend. zokernels/backends/native.py mirrors it in ctypes.
#pragma once

#include <cstdint>

#define ZK_PUBLIC __attribute__((visibility("default")))

extern "C" {

enum { ZK_FLOAT32, ZK_BFLOAT16, ZK_FLOAT16 };
// Kinds of noise, see docs/noise.md; a direction of rank one has both of the last.
enum { ZK_GAUSSIAN, ZK_RADEMACHER, ZK_MASK, ZK_ROUNDING, ZK_LEFT, ZK_RIGHT, ZK_RANK1 = ZK_LEFT };
enum { ZK_KEEP_ALL, ZK_KEEP_RANDOM, ZK_KEEP_MAGNITUDE, ZK_KEEP_BITS };
enum { ZK_PORTABLE, ZK_AVX2, ZK_AVX512, ZK_NEON, ZK_ISA_COUNT };
enum { ZK_ADD_NOISE, ZK_SIGN, ZK_MOMENTUM, ZK_ADAM };  // what a pass does with the noise

struct zk_tensor {
    const void* in;  // in == out, or apart; an update works in place
    void* out;
    void* mirror;     // null, or where decay · in − Σ c z goes; see zk_run
    void* states[3];  // of an update, in the rule's order: m, v, v_max
    int64_t numel;
    int64_t columns;  // of the whole parameter, for ZK_RANK1; 0 makes it ZK_RADEMACHER
    uint64_t offset;  // index of the first element in the whole parameter
    uint32_t stream;
    int32_t dtype;
    int32_t state_dtypes[3];  // float32 or bfloat16
    int32_t keep;             // ZK_KEEP_…
    uint32_t keep_below;      // RANDOM: keep where the 16-bit draw is below
    uint64_t keep_seed;       // RANDOM
    const uint8_t* bits;      // BITS: element i has bit i % 8 of byte i / 8
    float keep_threshold;     // MAGNITUDE
};

struct zk_pass {
    const zk_tensor* tensors;
    int64_t tensor_count;
    const uint64_t* seeds;  // seed_count of these and of coeffs, `queries` of them a step
    const float* coeffs;
    int64_t seed_count;
    int64_t queries;
    const float* decays;  // one a step, as of the next three
    const uint64_t* rounding_seeds;
    const float* rates;   // update: −lr
    const float* scales;  // Adam: the factor on v̂
    int32_t rule;         // ZK_ADD_NOISE …
    int32_t kind;         // ZK_GAUSSIAN, ZK_RADEMACHER or ZK_RANK1
    int32_t stochastic;
    int32_t amsgrad;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, adam_eps;
    int32_t threads;
};

// A product's rows, `rows` of them for each of `lanes` points, one after the other.
struct zk_shift {
    const void* x;      // of `in` elements each
    const void* taken;  // ±1, `in` of them a lane
    const void* given;  // ±1, `out` of them a lane
    const void* bias;   // null, or `out` elements a lane
    const float* scales;
    void* y;  // of `out` elements each
    int64_t lanes, rows, in, out;
    int64_t signs_step, bias_step;  // from a lane's to the next one's; 0: they have it in common
    int32_t dtype;                  // of all but the scales
    int32_t threads;
};

// Runs one pass. Returns 0, or -1 if this CPU or build lacks the instruction set. A mirror is
// filled by ZK_ADD_NOISE only, in one step, with neither mask nor stochastic rounding.
ZK_PUBLIC int zk_run(const zk_pass* pass, int isa);

// y ← bias + scale · (x · taken) · given, rounded once. Returns as zk_run does.
ZK_PUBLIC int zk_run_shift(const zk_shift* shift, int isa);

// Whether this CPU and this build have an instruction set.
ZK_PUBLIC int zk_has_isa(int isa);
}
