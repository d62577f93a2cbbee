// Passes and shifts from a file, with what the reference makes of them: every instruction set that
// is named must give those bits. golden.py writes the file: a word that says what a case is, its
// name, the struct of zokernels.h, and what its pointers point at, each as a count of bytes and
// the bytes.
//
// Usage: golden FILE ISA...

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "zokernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

const char* const NAMES[ZK_ISA_COUNT] = {"portable", "avx2", "avx512", "neon"};

[[noreturn]] void fail(const std::string& why) {
    std::fprintf(stderr, "%s\n", why.c_str());
    std::exit(1);
}

class File {
    std::vector<char> data;
    size_t at = 0;

 public:
    explicit File(const char* path) {
        std::ifstream in(path, std::ios::binary);
        if (!in) fail(std::string("can't read ") + path);
        data.assign(std::istreambuf_iterator<char>(in), {});
    }
    bool ended() const { return at == data.size(); }
    std::vector<char> bytes() {
        int64_t size = 0;
        if (data.size() - at < sizeof size) fail("the file ends within a case");
        std::memcpy(&size, &data[at], sizeof size);
        at += sizeof size;
        if ((int64_t)(data.size() - at) < size) fail("the file ends within a case");
        at += size;
        return std::vector<char>(data.begin() + (at - size), data.begin() + at);
    }
    std::string text() {
        const std::vector<char> b = bytes();
        return std::string(b.begin(), b.end());
    }
    template <class T>
    T record() {
        const std::vector<char> b = bytes();
        T x;
        if (b.size() != sizeof x) fail("a struct has another size here than where it was written");
        std::memcpy(&x, b.data(), sizeof x);
        return x;
    }
    template <class T>
    std::vector<T> list() {
        const std::vector<char> b = bytes();
        std::vector<T> x(b.size() / sizeof(T));
        if (!b.empty()) std::memcpy(x.data(), b.data(), b.size());
        return x;
    }
};

// Memory that begins at no vector's address, between bytes that nobody may write.
class Buffer {
    static constexpr size_t MARGIN = 64;
    static constexpr char MARK = (char)0xA5;
    std::vector<char> whole;
    size_t before, size;

 public:
    Buffer(size_t size, size_t shift)
        : whole(size + shift + 2 * MARGIN, MARK), before(MARGIN + shift), size(size) {}
    Buffer(const std::vector<char>& content, size_t shift) : Buffer(content.size(), shift) {
        if (size) std::memcpy(start(), content.data(), size);
    }
    char* start() { return whole.data() + before; }
    bool margins_kept() const {
        for (size_t i = 0; i < whole.size(); i++)
            if ((i < before || i >= before + size) && whole[i] != MARK) return false;
        return true;
    }
};

int bytes_of(int dtype) { return dtype == ZK_FLOAT32 ? 4 : 2; }

uint32_t number_at(const char* p, int dtype) {
    uint32_t x = 0;
    std::memcpy(&x, p, bytes_of(dtype));
    return x;
}

bool is_nan(uint32_t x, int dtype) {
    if (dtype == ZK_FLOAT32) return (x & 0x7FFFFFFF) > 0x7F800000;
    return (x & 0x7FFF) > (dtype == ZK_BFLOAT16 ? 0x7F80u : 0x7C00u);
}

// Says which element differs first, or that the margins were written; "" where all is right.
std::string difference(const std::vector<char>& expected, Buffer& got, int dtype) {
    const size_t each = bytes_of(dtype);
    for (size_t i = 0; i < expected.size(); i += each) {
        const uint32_t e = number_at(expected.data() + i, dtype);
        const uint32_t g = number_at(got.start() + i, dtype);
        if (e == g || (is_nan(e, dtype) && is_nan(g, dtype))) continue;
        char text[99];
        std::snprintf(text, sizeof text, "element %zu of %zu is 0x%08x, expected 0x%08x", i / each,
                      expected.size() / each, g, e);
        return text;
    }
    return got.margins_kept() ? "" : "bytes beside the elements were written";
}

// What a calling program may have set: rounding towards zero, subnormals taken for 0.
#if defined(__x86_64__)
uint64_t mode() { return _mm_getcsr() & ~0x3Fu; }
void set_mode(uint64_t m) { _mm_setcsr((unsigned)m); }
constexpr uint64_t HOSTILE = 0x1F80 | 0x6000 | 0x8000 | 0x40;
#elif defined(__aarch64__)
uint64_t mode() {
    uint64_t m;
    __asm__ volatile("mrs %0, fpcr" : "=r"(m));
    return m;
}
void set_mode(uint64_t m) { __asm__ volatile("msr fpcr, %0" ::"r"(m) : "memory"); }
// Also half precision without infinities, and NaN without its bits.
constexpr uint64_t HOSTILE = 1 << 24 | 3 << 22 | 1 << 26 | 1 << 25;
#else
uint64_t mode() { return 0; }
void set_mode(uint64_t) {}
constexpr uint64_t HOSTILE = 0;
#endif

template <class Args>
std::string run(int (*function)(const Args*, int), const Args& args, int isa) {
    const uint64_t before = mode();
    set_mode(HOSTILE);
    const uint64_t during = mode();
    const int refused = function(&args, isa);
    const uint64_t after = mode();
    set_mode(before);
    if (refused) return "it was refused";
    return during == after ? "" : "the caller's rounding mode was changed";
}

struct Tensor {
    zk_tensor as;
    std::vector<char> before, after, mirror, bits;
    std::vector<char> state_before[3], state_after[3];
};

struct Case {
    std::string name;
    zk_pass pass;
    std::vector<uint64_t> seeds, rounding_seeds;
    std::vector<float> coeffs, decays, rates, scales;
    std::vector<Tensor> tensors;

    Case(File& f) : name(f.text()), pass(f.record<zk_pass>()) {
        seeds = f.list<uint64_t>(), coeffs = f.list<float>(), decays = f.list<float>();
        rounding_seeds = f.list<uint64_t>(), rates = f.list<float>(), scales = f.list<float>();
        pass.seeds = seeds.data(), pass.coeffs = coeffs.data(), pass.decays = decays.data();
        pass.rounding_seeds = rounding_seeds.data();
        pass.rates = rates.data(), pass.scales = scales.data();
        pass.threads = 1;
        for (int64_t i = 0; i < pass.tensor_count; i++) {
            Tensor t;
            t.as = f.record<zk_tensor>();
            t.before = f.bytes(), t.after = f.bytes(), t.mirror = f.bytes(), t.bits = f.bytes();
            for (int s = 0; s < 3; s++) t.state_before[s] = f.bytes(), t.state_after[s] = f.bytes();
            tensors.push_back(t);
        }
    }

    std::string check(int isa) {
        if (pass.rule != ZK_ADD_NOISE) return check(isa, true);
        const std::string apart = check(isa, false);
        return apart.empty() && tensors[0].mirror.empty() ? check(isa, true) : apart;
    }

    std::string check(int isa, bool in_place) {
        std::vector<zk_tensor> given;
        std::vector<Buffer> in, out, mirror, bits, states;
        for (size_t i = 0; i < tensors.size(); i++) {
            const Tensor& t = tensors[i];
            const size_t shift = (i + 1) * bytes_of(t.as.dtype);
            in.emplace_back(t.before, shift);
            out.emplace_back(t.before.size(), shift);
            mirror.emplace_back(t.mirror.size(), 3 * shift);
            bits.emplace_back(t.bits, 0);
            for (int s = 0; s < 3; s++)
                states.emplace_back(t.state_before[s], shift + s * bytes_of(t.as.state_dtypes[s]));
        }
        for (size_t i = 0; i < tensors.size(); i++) {
            zk_tensor as = tensors[i].as;
            as.in = in[i].start();
            as.out = in_place ? in[i].start() : out[i].start();
            as.mirror = tensors[i].mirror.empty() ? nullptr : mirror[i].start();
            as.bits = tensors[i].bits.empty() ? nullptr : (const uint8_t*)bits[i].start();
            for (int s = 0; s < 3; s++) as.states[s] = states[3 * i + s].start();
            given.push_back(as);
        }
        zk_pass args = pass;
        args.tensors = given.data();
        std::string wrong = run(zk_run, args, isa);
        const auto compare = [&](const std::vector<char>& expected, Buffer& got, int dtype,
                                 size_t i, const std::string& what) {
            const std::string d = difference(expected, got, dtype);
            if (wrong.empty() && !d.empty())
                wrong = "tensor " + std::to_string(i) + ", " + what + ": " + d;
        };
        for (size_t i = 0; i < tensors.size(); i++) {
            const Tensor& t = tensors[i];
            const int dtype = t.as.dtype;
            compare(t.after, in_place ? in[i] : out[i], dtype, i, in_place ? "in place" : "out");
            if (!in_place) compare(t.before, in[i], dtype, i, "what was read");
            compare(t.mirror, mirror[i], dtype, i, "mirror");
            for (int s = 0; s < 3; s++)
                compare(t.state_after[s], states[3 * i + s], t.as.state_dtypes[s], i,
                        "state " + std::to_string(s));
        }
        return wrong;
    }
};

struct ShiftCase {
    std::string name;
    zk_shift shift;
    std::vector<char> x, taken, given, bias, y;
    std::vector<float> scales;

    ShiftCase(File& f) : name(f.text()), shift(f.record<zk_shift>()) {
        x = f.bytes(), taken = f.bytes(), given = f.bytes(), bias = f.bytes();
        scales = f.list<float>(), y = f.bytes();
        shift.scales = scales.data();
        shift.threads = 1;
    }

    std::string check(int isa) {
        const size_t each = bytes_of(shift.dtype);
        Buffer in(x, each), first(taken, 3 * each), second(given, each), third(bias, 5 * each);
        Buffer out(y.size(), each);
        zk_shift args = shift;
        args.x = in.start(), args.taken = first.start(), args.given = second.start();
        args.bias = bias.empty() ? nullptr : third.start();
        args.y = out.start();
        const std::string wrong = run(zk_run_shift, args, isa);
        return wrong.empty() ? difference(y, out, shift.dtype) : wrong;
    }
};

template <class C>
int failures(C made, const std::vector<int>& isas) {
    int failed = 0;
    for (const int isa : isas) {
        const std::string wrong = made.check(isa);
        if (wrong.empty()) continue;
        std::fprintf(stderr, "%s, %s: %s\n", NAMES[isa], made.name.c_str(), wrong.c_str());
        failed++;
    }
    return failed;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) fail("usage: golden FILE ISA...");
    std::vector<int> isas;
    for (int i = 2; i < argc; i++)
        for (int isa = 0; isa <= ZK_ISA_COUNT; isa++) {
            if (isa == ZK_ISA_COUNT || (argv[i] == std::string(NAMES[isa]) && !zk_has_isa(isa)))
                fail(std::string(argv[i]) + " is not here");
            if (argv[i] != std::string(NAMES[isa])) continue;
            isas.push_back(isa);
            break;
        }
    File file(argv[1]);
    int cases = 0, failed = 0;
    for (; !file.ended(); cases++) {
        const std::string what = file.text();
        failed += what == "shift" ? failures(ShiftCase(file), isas) : failures(Case(file), isas);
    }
    std::printf("%d cases on %zu instruction sets, %d failures\n", cases, isas.size(), failed);
    return failed != 0;
}
