// The plain C interface of the native backend. zokernels/backends/native.py mirrors it in ctypes.
#pragma once

#include <cstdint>

#define ZK_PUBLIC __attribute__((visibility("default")))

extern "C" {

enum { ZK_FLOAT32, ZK_BFLOAT16, ZK_FLOAT16 };
enum { ZK_GAUSSIAN, ZK_RADEMACHER, ZK_MASK, ZK_ROUNDING };  // kinds of noise; see docs/noise.md
enum { ZK_KEEP_ALL, ZK_KEEP_RANDOM, ZK_KEEP_MAGNITUDE, ZK_KEEP_BITS };
enum { ZK_PORTABLE, ZK_AVX2, ZK_AVX512 };

struct zk_tensor {
    const void* in;  // in == out, or apart
    void* out;
    int64_t numel;
    uint64_t offset;  // index of the first element in the whole parameter
    uint32_t stream;
    int32_t dtype;
    int32_t keep;          // ZK_KEEP_…
    uint32_t keep_below;   // RANDOM: keep where the 16-bit draw is below
    uint64_t keep_seed;    // RANDOM
    const uint8_t* bits;   // BITS: element i has bit i % 8 of byte i / 8
    float keep_threshold;  // MAGNITUDE
};

struct zk_add_noise_args {
    const zk_tensor* tensors;
    int64_t tensor_count;
    const uint64_t* seeds;  // seed_count of each of the next two, and of coeffs
    const float* coeffs;
    int64_t seed_count;
    const float* decays;             // one, or with each_step seed_count
    const uint64_t* rounding_seeds;  // likewise
    int32_t kind;
    int32_t stochastic;
    int32_t each_step;
    int32_t threads;
};

// Runs one pass. Returns 0, or -1 if this CPU or build lacks the instruction set.
ZK_PUBLIC int zk_add_noise(const zk_add_noise_args* args, int isa);

// Whether this CPU and this build have an instruction set.
ZK_PUBLIC int zk_has_isa(int isa);
}
