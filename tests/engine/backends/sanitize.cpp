// Random passes through zk_run and zk_run_shift, for a build with sanitizers: every buffer ends
// where its elements do, so that a byte read or written beyond them is caught. Every instruction
// set and number of threads must give the bits of the portable code on one thread.
//
// Usage: sanitize [CASES] [SEED] [THREADS]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "zokernels.h"

namespace {

std::mt19937_64 source;

uint64_t below(uint64_t n) { return source() % n; }
bool chance(int percent) { return below(100) < (uint64_t)percent; }

template <class T>
T one_of(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
}

// Memory of exactly so many bytes from `start` on, and `shift` bytes before it.
struct Buffer {
    std::unique_ptr<char[]> whole;
    char* start;
    size_t size;

    Buffer(size_t bytes, size_t shift) : whole(new char[bytes + shift]), size(bytes) {
        start = whole.get() + shift;
    }
    Buffer copy() const {
        Buffer other(size, start - whole.get());
        if (size) std::memcpy(other.start, start, size);
        return other;
    }
};

int bytes_of(int dtype) { return dtype == ZK_FLOAT32 ? 4 : 2; }

bool is_nan(const char* p, int dtype) {
    if (dtype == ZK_FLOAT32) {
        uint32_t x;
        std::memcpy(&x, p, 4);
        return (x & 0x7FFFFFFF) > 0x7F800000;
    }
    uint16_t x;
    std::memcpy(&x, p, 2);
    return (x & 0x7FFF) > (dtype == ZK_BFLOAT16 ? 0x7F80 : 0x7C00);
}

// Numbers near 1 or, now and then, any bits at all.
void fill(Buffer& b, int dtype) {
    const bool any = chance(30);
    for (size_t i = 0; i < b.size; i += bytes_of(dtype)) {
        uint32_t x = (uint32_t)source();
        if (!any) {
            const uint32_t sign = x & 0x80000000u;
            x = dtype == ZK_FLOAT16 ? (x & 0x3FF0000u) | 0x30000000u
                                    : (x & 0x1FFFFFFu) | 0x3E000000u;
            x |= sign;
        }
        // The upper half of a binary32 number is a bfloat16 one.
        std::memcpy(b.start + i, (char*)&x + (dtype == ZK_FLOAT32 ? 0 : 2), bytes_of(dtype));
    }
}

int64_t size() {
    const int64_t near = one_of<int64_t>({0, 8, 64, 128, 1024, 2048, 4096, 1 << 14, 1 << 16});
    if (near >= 1 << 14 && !chance(25)) return (int64_t)below(300);
    return std::max<int64_t>(0, near + (int64_t)below(7) - 3);
}

uint64_t offset() {
    // Where the high words of the counters of Gaussian and Rademacher blocks change.
    const uint64_t near = one_of<uint64_t>({0, 0, 1 << 16, 1ull << 35, 1ull << 39, 1ull << 45});
    return near + below(300) - std::min<uint64_t>(near, 200);
}

// Of a rank-one direction: fewer and more than a tile has elements, a span, and all there are. The
// last ones lie where the high word of a column's block changes.
int64_t columns() {
    return one_of<int64_t>({0, 1, 3, 8, 31, 33, 100, 128, 256, 770, 2048, 3072, 20000, 70001,
                            (1ll << 39) + 1, 1ll << 45});
}

float coefficient() { return one_of<float>({1e-3f, -0.5f, 0.0f, 2e-30f, -1e-41f, 1e30f, 3.0f}); }

struct Tensor {
    int dtype, state_dtypes[3];
    Buffer in, out, bits;
    std::vector<Buffer> states;
    zk_tensor as;
    bool in_place, mirrored;
};

Tensor make_tensor(int rule, int state_count, bool mirrored) {
    const int dtype = one_of<int>({ZK_FLOAT32, ZK_BFLOAT16, ZK_FLOAT16});
    const int64_t n = size();
    const size_t bytes = n * bytes_of(dtype), shift = below(8) * bytes_of(dtype);
    const bool in_place = rule != ZK_ADD_NOISE || (!mirrored && chance(70));
    Tensor t{dtype,
             {},
             Buffer(bytes, shift),
             Buffer(bytes, shift),
             Buffer((n + 7) / 8, 0),
             {},
             {},
             in_place,
             mirrored};
    fill(t.in, dtype);
    std::memset(t.out.start, 0xA5, bytes);
    for (size_t i = 0; i < t.bits.size; i++) t.bits.start[i] = (char)source();
    for (int i = 0; i < state_count; i++) {
        t.state_dtypes[i] = one_of<int>({ZK_FLOAT32, ZK_BFLOAT16});
        const int each = bytes_of(t.state_dtypes[i]);
        t.states.emplace_back(n * each, below(5) * each);
        fill(t.states.back(), t.state_dtypes[i]);
    }
    t.as = {};
    t.as.numel = n;
    t.as.offset = offset();
    t.as.columns = columns();
    t.as.stream = (uint32_t)source();
    t.as.dtype = dtype;
    t.as.keep =
        one_of<int>({ZK_KEEP_ALL, ZK_KEEP_ALL, ZK_KEEP_RANDOM, ZK_KEEP_MAGNITUDE, ZK_KEEP_BITS});
    if (mirrored) t.as.keep = ZK_KEEP_ALL;
    t.as.keep_below = (uint32_t)below(65537);
    t.as.keep_seed = source();
    t.as.keep_threshold = one_of<float>({0.0f, 0.3f, 1.0f, 1e38f, __builtin_inff()});
    return t;
}

// What a pass over copies of the tensors leaves: of each its output, then its states or its mirror.
std::vector<Buffer> run(zk_pass pass, std::vector<Tensor>& tensors, int isa, int threads) {
    std::vector<Buffer> results;
    std::vector<Buffer> inputs;
    std::vector<zk_tensor> plain;
    for (const Tensor& t : tensors) {
        inputs.push_back(t.in.copy());
        results.push_back(t.in_place ? t.in.copy() : t.out.copy());
        zk_tensor as = t.as;
        as.out = results.back().start;
        as.in = t.in_place ? results.back().start : inputs.back().start;
        as.bits = as.keep == ZK_KEEP_BITS ? (const uint8_t*)t.bits.start : nullptr;
        if (t.mirrored) {
            results.push_back(t.out.copy());
            as.mirror = results.back().start;
        }
        for (size_t i = 0; i < t.states.size(); i++) {
            results.push_back(t.states[i].copy());
            as.states[i] = results.back().start;
            as.state_dtypes[i] = t.state_dtypes[i];
        }
        plain.push_back(as);
    }
    pass.tensors = plain.data();
    pass.tensor_count = (int64_t)plain.size();
    pass.threads = threads;
    if (zk_run(&pass, isa) != 0) {
        std::fprintf(stderr, "zk_run refused instruction set %d, which zk_has_isa has\n", isa);
        std::exit(1);
    }
    return results;
}

bool same(const Buffer& a, const Buffer& b, int dtype) {
    const int each = bytes_of(dtype);
    for (size_t i = 0; i < a.size; i += each)
        if (std::memcmp(a.start + i, b.start + i, each) != 0 &&
            !(is_nan(a.start + i, dtype) && is_nan(b.start + i, dtype)))
            return false;
    return true;
}

// The same without mirrors: each is the output of a pass with the coefficients' signs turned.
std::vector<Buffer> run_apart(zk_pass pass, std::vector<Tensor>& tensors) {
    std::vector<float> turned(pass.coeffs, pass.coeffs + pass.seed_count);
    for (float& c : turned) c = -c;
    for (Tensor& t : tensors) t.mirrored = false;
    std::vector<Buffer> plus = run(pass, tensors, ZK_PORTABLE, 1), both;
    pass.coeffs = turned.data();
    std::vector<Buffer> minus = run(pass, tensors, ZK_PORTABLE, 1);
    for (Tensor& t : tensors) t.mirrored = true;
    for (size_t i = 0; i < plus.size(); i++) {
        both.push_back(std::move(plus[i]));
        both.push_back(std::move(minus[i]));
    }
    return both;
}

// Returns false where two ways of running one random pass differ.
bool try_case(int most_threads) {
    const int rule = one_of<int>({ZK_ADD_NOISE, ZK_ADD_NOISE, ZK_SIGN, ZK_MOMENTUM, ZK_ADAM});
    const bool amsgrad = rule == ZK_ADAM && chance(50);
    const int state_count = rule == ZK_ADAM ? 2 + amsgrad : rule == ZK_MOMENTUM;
    const bool mirrored = rule == ZK_ADD_NOISE && chance(40);
    std::vector<Tensor> tensors;
    for (uint64_t i = 0, count = 1 + below(3); i < count; i++)
        tensors.push_back(make_tensor(rule, state_count, mirrored));
    const int64_t queries = 1 + (int64_t)below(5), steps = mirrored ? 1 : 1 + (int64_t)below(3);
    std::vector<uint64_t> seeds, rounding_seeds;
    std::vector<float> coeffs, decays, rates, scales;
    for (int64_t k = 0; k < queries * steps; k++)
        seeds.push_back(source()), coeffs.push_back(coefficient());
    for (int64_t s = 0; s < steps; s++) {
        rounding_seeds.push_back(chance(10) ? UINT64_MAX : source());
        decays.push_back(one_of<float>({1.0f, 0.99f, -2.0f}));
        rates.push_back(one_of<float>({-1e-3f, 0.5f}));
        scales.push_back(one_of<float>({1.0f, 1.7f}));
    }
    zk_pass pass{};
    pass.seeds = seeds.data();
    pass.coeffs = coeffs.data();
    pass.seed_count = queries * steps;
    pass.queries = queries;
    pass.decays = decays.data();
    pass.rounding_seeds = rounding_seeds.data();
    pass.rates = rates.data();
    pass.scales = scales.data();
    pass.rule = rule;
    pass.kind = one_of<int>({ZK_GAUSSIAN, ZK_RADEMACHER, ZK_RANK1, ZK_RANK1});
    pass.stochastic = !mirrored && chance(40);
    pass.amsgrad = amsgrad;
    pass.beta1 = 0.9f, pass.one_minus_beta1 = 0.1f;
    pass.beta2 = 0.99f, pass.one_minus_beta2 = 0.01f;
    pass.adam_eps = 1e-8f;

    const std::vector<Buffer> expected =
        mirrored ? run_apart(pass, tensors) : run(pass, tensors, ZK_PORTABLE, 1);
    const int parts = mirrored ? 1 : state_count;
    for (int isa = ZK_PORTABLE; isa < ZK_ISA_COUNT; isa++) {
        if (!zk_has_isa(isa)) continue;
        const std::vector<Buffer> got = run(pass, tensors, isa, 1 + (int)below(most_threads));
        size_t at = 0;
        for (const Tensor& t : tensors)
            for (int i = -1; i < parts; i++, at++)
                if (!same(expected[at], got[at], i < 0 || mirrored ? t.dtype : t.state_dtypes[i])) {
                    std::fprintf(stderr,
                                 "instruction set %d differs: kind %d, rule %d, dtype %d, %lld "
                                 "elements, %lld columns, buffer %d\n",
                                 isa, pass.kind, rule, t.dtype, (long long)t.as.numel,
                                 (long long)t.as.columns, i);
                    return false;
                }
    }
    return true;
}

// Returns false where a shift's rows depend on the number of threads.
bool try_shift(int most_threads) {
    const int dtype = one_of<int>({ZK_FLOAT32, ZK_BFLOAT16, ZK_FLOAT16}), each = bytes_of(dtype);
    zk_shift shift{};
    shift.lanes = 1 + (int64_t)below(3), shift.rows = (int64_t)below(9);
    shift.in = 1 + (int64_t)below(400), shift.out = 1 + (int64_t)below(9000);
    shift.signs_step = std::max(shift.in, shift.out);
    shift.bias_step = chance(50) ? shift.out : 0;
    shift.dtype = dtype;
    const int64_t rows = shift.lanes * shift.rows, apart = (shift.lanes - 1) * shift.signs_step;
    const size_t off = below(8) * each;
    Buffer x(rows * shift.in * each, off), bias(shift.lanes * shift.out * each, off);
    Buffer taken((apart + shift.in) * each, off), given((apart + shift.out) * each, off);
    for (Buffer* b : {&x, &bias, &taken, &given}) fill(*b, dtype);
    std::vector<float> scales(shift.lanes, coefficient());
    shift.x = x.start, shift.taken = taken.start, shift.given = given.start;
    shift.bias = chance(70) ? bias.start : nullptr;
    shift.scales = scales.data();
    for (int isa = ZK_PORTABLE; isa < ZK_ISA_COUNT; isa++) {
        if (!zk_has_isa(isa)) continue;
        Buffer alone(rows * shift.out * each, off), shared(alone.size, off);
        shift.y = alone.start, shift.threads = 1;
        zk_run_shift(&shift, isa);
        shift.y = shared.start, shift.threads = 1 + (int)below(most_threads);
        zk_run_shift(&shift, isa);
        if (!same(alone, shared, dtype)) {
            std::fprintf(stderr, "instruction set %d: a shift differs with threads\n", isa);
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 2000;
    const int most_threads = argc > 3 ? std::atoi(argv[3]) : 4;
    source.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    for (int i = 0; i < cases; i++)
        if (!try_case(most_threads) || !try_shift(most_threads)) {
            std::fprintf(stderr, "case %d differs\n", i);
            return 1;
        }
    int sets = 0;
    for (int isa = ZK_PORTABLE; isa < ZK_ISA_COUNT; isa++) sets += zk_has_isa(isa);
    std::printf("%d passes on %d instruction sets: clean, and the same bits\n", cases, sets);
    return 0;
}
