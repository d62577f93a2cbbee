// w ← round(decay · w + Σ c z) over a span of one tensor. Compiled once for each instruction set.
#include "draw.h"
#include "pass.h"
#include "rank1.h"

namespace {

template <int DTYPE, int KIND>
struct Pass {
    typedef Tile<DTYPE> T;
    const zk_pass& args;
    const zk_tensor& tensor;
    Directions<KIND, T::SPLIT> noise;
    std::vector<RoundKeys> rounding;
    bool plain, steps;

    Pass(const zk_pass& a, const zk_tensor& t, uint64_t index)
        : args(a), tensor(t), noise(a, t, index) {
        steps = !a.stochastic && t.keep == ZK_KEEP_ALL && noise.exact;
        plain = steps && a.queries == a.seed_count;
        if (a.stochastic) rounding = rounding_keys(a, t, index, 0);
    }

    // No mask, one rounding to nearest: what a training step does.
    ZK_INLINE void tile_plain(char* out, const char* in, const Place& at) {
        F w[8], acc[8];
        T::load(w, in);
        const float decay = args.decays[0];
        if (decay != 1)
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) w[r] *= decay;
        noise.add(acc, w, 0, args.seed_count, at.index);
        T::store(out, acc, in);
    }

    // Both sides of a difference from one draw.
    ZK_INLINE void tile_mirrored(char* mirror, char* out, const char* in, const Place& at) {
        F plus[8], minus[8];
        T::load(plus, in);
        if (args.decays[0] != 1)
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) plus[r] *= args.decays[0];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) minus[r] = plus[r];
        noise.add_both(plus, minus, at.index);
        T::store(out, plus, in);
        T::store(mirror, minus, in);
    }

    // No mask, and rounding to nearest after each step: what a replay does.
    ZK_INLINE void tile_steps(char* out, const char* in, const Place& at) {
        F w[8];
        T::load(w, in);
        for (int64_t step = 0, from = 0; from < args.seed_count; step++, from += args.queries) {
            const float decay = args.decays[step];
            if (decay != 1)
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) w[r] *= decay;
            noise.add(w, w, from, from + args.queries, at.index);
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) w[r] = T::nearest(w[r]);
        }
        T::store(out, w, in);
    }

    void tile_general(char* out, const char* in, const Place& at) {
        F w[8];
        I keep[8];
        T::load(w, in);
        keep_static<T::SPLIT>(keep, tensor, at);
        for (int64_t step = 0; step * args.queries < args.seed_count; step++) {
            if (tensor.keep == ZK_KEEP_MAGNITUDE)
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) keep[r] = keep_magnitude(w[r], tensor.keep_threshold);
            F acc[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) acc[r] = w[r] * args.decays[step];
            noise.add_any(acc, step * args.queries, (step + 1) * args.queries, at.index);
            if (args.stochastic) {
                U u[8];
                uniform16<S, T::SPLIT>(u, (uint32_t)(at.index / 8), rounding[step]);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) acc[r] = T::stochastic(acc[r], u[r]);
            } else {
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) acc[r] = T::nearest(acc[r]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) w[r] = select(keep[r], acc[r], w[r]);
        }
        T::store(out, w, in);
    }
};

template <int DTYPE, int KIND>
void run(const zk_pass& args, const Span& span) {
    const zk_tensor& t = *span.tensor;
    Pass<DTYPE, KIND> pass(args, t, t.offset + span.begin);
    constexpr int BYTES = Tile<DTYPE>::BYTES;
    const Stream streams[] = {
        {(char*)t.in, BYTES, false}, {(char*)t.out, BYTES}, {(char*)t.mirror, BYTES}};
    pass.noise.walk(span, [&](const Span& part) {
        if (t.mirror)
            for_each_tile<3>(part, streams, [&](char* const* tiles, const Place& at) ZK_ALWAYS {
                pass.noise.enter(at.index);
                pass.tile_mirrored(tiles[2], tiles[1], tiles[0], at);
            });
        else if (pass.plain)
            for_each_tile<2>(part, streams, [&](char* const* tiles, const Place& at) ZK_ALWAYS {
                pass.noise.enter(at.index);
                pass.tile_plain(tiles[1], tiles[0], at);
            });
        else
            for_each_tile<2>(part, streams, [&](char* const* tiles, const Place& at) ZK_ALWAYS {
                pass.noise.enter(at.index);
                pass.steps ? pass.tile_steps(tiles[1], tiles[0], at)
                           : pass.tile_general(tiles[1], tiles[0], at);
            });
    });
}

template <int DTYPE>
SpanFunction of_kind(int kind) {
    if (kind == ZK_GAUSSIAN) return run<DTYPE, ZK_GAUSSIAN>;
    return kind == ZK_RADEMACHER ? run<DTYPE, ZK_RADEMACHER> : run<DTYPE, ZK_RANK1>;
}

}  // namespace

void ZK_ENTRY(add_noise)(const zk_pass& args, const Span& span) {
    const int dtype = span.tensor->dtype, kind = kind_of(args, *span.tensor);
    const SpanFunction function = dtype == ZK_FLOAT32    ? of_kind<ZK_FLOAT32>(kind)
                                  : dtype == ZK_BFLOAT16 ? of_kind<ZK_BFLOAT16>(kind)
                                                         : of_kind<ZK_FLOAT16>(kind);
    function(args, span);
}
