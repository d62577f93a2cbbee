// What the threads of a pass share, and the entry of each instruction set.
#pragma once

#include "zokernels.h"

// A run of elements of one tensor whose indices share the high word of every block counter.
struct Span {
    const zk_tensor* tensor;
    int64_t begin, end;
};

// Spans are cut at multiples of this many elements (by index, not by place in memory).
constexpr int64_t SPAN = 1 << 16;

typedef void (*SpanFunction)(const zk_add_noise_args&, const Span&);

void add_noise_portable(const zk_add_noise_args&, const Span&);
void add_noise_avx2(const zk_add_noise_args&, const Span&);
void add_noise_avx512(const zk_add_noise_args&, const Span&);
