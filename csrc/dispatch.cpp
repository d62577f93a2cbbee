// Cuts a pass in spans, shares them among threads, and picks the instruction set.
#include <pthread.h>

#include <algorithm>
#include <vector>

#include "pass.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Some 5 µs of work each: less is not worth waking a thread for.
constexpr int64_t MIN_PER_THREAD = 1 << 14;

// Elements from one change of a block counter's high word to the next.
constexpr uint64_t SAME_HIGH = 1ull << 35;

// Of a rank-one direction: rows in a span, as far as that stays below MOST_SPAN.
constexpr int64_t ROWS = 256, MOST_SPAN = 1 << 20;

// Spans that a thread takes at a time where there are many: neighbours share pages.
constexpr int64_t MOST_AT_A_TIME = 4;

// libgomp's pool does not survive a fork: a child that enters it hangs.
bool in_forked_child = false;
__attribute__((constructor)) void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
}

// Round to nearest even with subnormals, whatever mode the calling program set on this thread.
struct IeeeArithmetic {
#if defined(__x86_64__)
    unsigned saved = _mm_getcsr();
    IeeeArithmetic() { _mm_setcsr(0x1F80); }
    ~IeeeArithmetic() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;
    IeeeArithmetic() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
        set(0);
    }
    ~IeeeArithmetic() { set(saved); }
    static void set(uint64_t mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#endif
};

struct Functions {
    SpanFunction add_noise, apply_update;
    RowsFunction shift;
};
#define ZK_FUNCTIONS(isa) \
    Functions { add_noise_##isa, apply_update_##isa, shift_##isa }

Functions functions_of(int isa) {
#if defined(ZK_X86)
    if (isa == ZK_AVX512) return ZK_FUNCTIONS(avx512);
    if (isa == ZK_AVX2) return ZK_FUNCTIONS(avx2);
#elif defined(ZK_ARM)
    if (isa == ZK_NEON) return ZK_FUNCTIONS(neon);
#endif
    return ZK_FUNCTIONS(portable);
}

// How many threads are worth waking.
int threads_for(int64_t wanted, int64_t elements) {
    const int64_t useful = in_forked_child ? 1 : std::max<int64_t>(1, elements / MIN_PER_THREAD);
    return (int)std::min(wanted, useful);
}

// How many elements a span of a tensor has.
int64_t span_of(const zk_pass& args, const zk_tensor& t, int64_t elements) {
    // A layer's share for each thread is small: several spans each, so that none waits for long.
    const int64_t share = std::max(MIN_PER_THREAD, elements / (8 * args.threads));
    if (kind_of(args, t) == ZK_RANK1 && t.columns <= std::min(share, MOST_SPAN)) {
        // Whole rows: the signs of the columns are drawn once for all of them.
        int64_t rows = std::max(ROWS, SPAN / t.columns);
        while (rows * t.columns > std::min(share, MOST_SPAN)) rows /= 2;
        return rows * t.columns;
    }
    int64_t size = SPAN;
    while (size > share) size /= 2;
    return size;
}

std::vector<Span> cut(const zk_pass& args, int64_t elements) {
    std::vector<Span> spans;
    for (int64_t i = 0; i < args.tensor_count; i++) {
        const zk_tensor& t = args.tensors[i];
        const uint64_t offset = t.offset, count = t.numel, size = span_of(args, t, elements);
        // A span has whole rows, or a part of one.
        const uint64_t row = kind_of(args, t) == ZK_RANK1 ? t.columns : 0;
        for (uint64_t at = 0, end; at < count; at = end) {
            const auto next = [&](uint64_t multiple) {
                return at + multiple - (offset + at) % multiple;
            };
            end = std::min({count, next(size), next(SAME_HIGH)});
            if (size < row) end = std::min(end, next(row));
            spans.push_back({&t, (int64_t)at, (int64_t)end});
        }
    }
    return spans;
}

}  // namespace

extern "C" int zk_has_isa(int isa) {
    if (isa == ZK_PORTABLE) return 1;
#if defined(ZK_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (isa == ZK_AVX2) return avx2;
    if (isa == ZK_AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(ZK_ARM)
    if (isa == ZK_NEON) return 1;
#endif
    return 0;
}

extern "C" int zk_run(const zk_pass* args, int isa) {
    if (!zk_has_isa(isa)) return -1;
    const Functions functions = functions_of(isa);
    const bool update = args->rule != ZK_ADD_NOISE;
    const SpanFunction function = update ? functions.apply_update : functions.add_noise;
    int64_t elements = 0;
    for (int64_t i = 0; i < args->tensor_count; i++) elements += args->tensors[i].numel;
    const std::vector<Span> spans = cut(*args, elements);
    const int64_t count = (int64_t)spans.size();
    const int threads = threads_for(args->threads, elements);
    if (threads <= 1) {
        const IeeeArithmetic mode;
        for (const Span& span : spans) function(*args, span);
        return 0;
    }
    const int64_t fair = count / (4 * threads);
    const int64_t at_a_time = std::min(MOST_AT_A_TIME, std::max<int64_t>(1, fair));
#pragma omp parallel num_threads(threads)
    {
        const IeeeArithmetic mode;
#pragma omp for schedule(dynamic, at_a_time)
        for (int64_t i = 0; i < count; i++) function(*args, spans[i]);
    }
    return 0;
}

extern "C" int zk_run_shift(const zk_shift* args, int isa) {
    if (!zk_has_isa(isa)) return -1;
    const RowsFunction function = functions_of(isa).shift;
    const int64_t rows = args->lanes * args->rows;
    const int threads = threads_for(args->threads, rows * (args->in + args->out));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const IeeeArithmetic mode;
#pragma omp for
        for (int64_t i = 0; i < threads; i++)
            function(*args, rows * i / threads, rows * (i + 1) / threads);
    }
    return 0;
}
