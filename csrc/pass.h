// What the threads of a pass share, and the entries of each instruction set.
#pragma once

#include "zokernels.h"

// A run of elements of one tensor whose indices share the high word of every block counter.
struct Span {
    const zk_tensor* tensor;
    int64_t begin, end;
};

// Spans are cut at multiples of this many elements (by index, not by place in memory), and those
// of a rank-one direction between rows.
constexpr int64_t SPAN = 1 << 16;

// The kind of noise that a pass adds to a tensor.
inline int kind_of(const zk_pass& pass, const zk_tensor& tensor) {
    return pass.kind == ZK_RANK1 && tensor.columns == 0 ? ZK_RADEMACHER : pass.kind;
}

typedef void (*SpanFunction)(const zk_pass&, const Span&);
typedef void (*RowsFunction)(const zk_shift&, int64_t begin, int64_t end);

// ZK_ENTRY(add_noise) is add_noise_avx2 where ZK_ISA is avx2.
#define ZK_JOIN2(a, b) a##_##b
#define ZK_JOIN(a, b) ZK_JOIN2(a, b)
#define ZK_ENTRY(name) ZK_JOIN(name, ZK_ISA)

#define ZK_DECLARE(isa)                                   \
    void add_noise_##isa(const zk_pass&, const Span&);    \
    void apply_update_##isa(const zk_pass&, const Span&); \
    void shift_##isa(const zk_shift&, int64_t, int64_t);
ZK_DECLARE(portable)
ZK_DECLARE(avx2)
ZK_DECLARE(avx512)
ZK_DECLARE(neon)
