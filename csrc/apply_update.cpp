// g = Σ c z through a rule with state, over a span of one tensor. Compiled once for each
// instruction set.
#include "draw.h"
#include "pass.h"
#include "rank1.h"

namespace {

// A tile of a state, in the layout of the weights.
template <int DTYPE, bool SPLIT>
struct StateTile {
    typedef Tile<DTYPE> T;
    static void load(F* x, const char* p) {
        T::load(x, p);
        if (SPLIT && !T::SPLIT) S::split(x);
        if (!SPLIT && T::SPLIT) S::unsplit(x);
    }
    static void store(char* p, const F* x) {
        F y[8];
        std::memcpy(y, x, sizeof y);
        if (SPLIT && !T::SPLIT) S::unsplit(y);
        if (!SPLIT && T::SPLIT) S::split(y);
        T::store(p, y, p);
    }
};

inline F sign(F g) {
    const U magnitude = bits_as<U>(g) & 0x7FFFFFFFu;
    const I counts = spread_sign(0u - magnitude) & ~is_nan(g);
    return bits_as<F>(((bits_as<U>(g) & 0x80000000u) | bits_as<uint32_t>(1.0f)) &
                      bits_as<U>(counts));
}

constexpr int STATES[] = {0, 0, 1, 3};  // of each rule, Adam's with v_max

template <int DTYPE, int KIND, int RULE>
struct Update {
    typedef Tile<DTYPE> T;
    static constexpr int COUNT = STATES[RULE];
    const zk_pass& args;
    const zk_tensor& tensor;
    const int count;  // states there are: Adam has no v_max without amsgrad
    Directions<KIND, T::SPLIT> noise;
    std::vector<RoundKeys> rounding, state_rounding[2];

    Update(const zk_pass& a, const zk_tensor& t, uint64_t index)
        : args(a), tensor(t), count(RULE == ZK_ADAM && !a.amsgrad ? 2 : COUNT), noise(a, t, index) {
        if (a.stochastic) rounding = rounding_keys(a, t, index, 0);
        for (int i = 0; i < count && i < 2; i++)
            if (t.state_dtypes[i] == ZK_BFLOAT16)
                state_rounding[i] = rounding_keys(a, t, index, i + 1);
    }

    void load(F* x, const char* p, int i) {
        if (tensor.state_dtypes[i] == ZK_BFLOAT16)
            StateTile<ZK_BFLOAT16, T::SPLIT>::load(x, p);
        else
            StateTile<ZK_FLOAT32, T::SPLIT>::load(x, p);
    }

    void store(char* p, const F* x, int i) {
        if (tensor.state_dtypes[i] == ZK_BFLOAT16)
            StateTile<ZK_BFLOAT16, T::SPLIT>::store(p, x);
        else
            StateTile<ZK_FLOAT32, T::SPLIT>::store(p, x);
    }

    void round_state(F* x, int i, int64_t step, uint64_t index) {
        if (tensor.state_dtypes[i] != ZK_BFLOAT16) return;
        U u[8];
        uniform16<S, T::SPLIT>(u, (uint32_t)(index / 8), state_rounding[i][step]);
        for (int r = 0; r < 8; r++) x[r] = Tile<ZK_BFLOAT16>::stochastic(x[r], u[r]);
    }

    // From g and the states before the step to its direction d and the states after it.
    void rule(F* d, F state[][8], int64_t step, uint64_t index) {
        if (RULE == ZK_SIGN) {
            for (int r = 0; r < 8; r++) d[r] = sign(d[r]);
        } else if (RULE == ZK_MOMENTUM) {
            F* m = state[0];
            for (int r = 0; r < 8; r++) m[r] = S::fma(splat(args.beta1), m[r], d[r]);
            round_state(m, 0, step, index);
            for (int r = 0; r < 8; r++) d[r] = m[r];
        } else {
            F *m = state[0], *v = state[1];
            for (int r = 0; r < 8; r++) {
                m[r] = S::fma(splat(args.beta1), m[r], d[r] * args.one_minus_beta1);
                v[r] = S::fma(splat(args.beta2), v[r], d[r] * args.one_minus_beta2 * d[r]);
            }
            round_state(m, 0, step, index);
            round_state(v, 1, step, index);
            const F* divisor = v;
            if (args.amsgrad) {
                for (int r = 0; r < 8; r++) state[2][r] = S::max(v[r], state[2][r]);
                divisor = state[2];
            }
            const float scale = args.scales[step];
            for (int r = 0; r < 8; r++) d[r] = m[r] / (S::sqrt(divisor[r] * scale) + args.adam_eps);
        }
    }

    // tiles: the weights, then the states.
    void tile(char* const* tiles, const Place& at) {
        noise.enter(at.index);
        F w[8], state[COUNT ? COUNT : 1][8];
        I keep[8];
        T::load(w, tiles[0]);
        for (int i = 0; i < count; i++) load(state[i], tiles[1 + i], i);
        const bool masked = tensor.keep != ZK_KEEP_ALL;
        if (masked) keep_static<T::SPLIT>(keep, tensor, at);
        for (int64_t step = 0; step * args.queries < args.seed_count; step++) {
            if (tensor.keep == ZK_KEEP_MAGNITUDE)
                for (int r = 0; r < 8; r++) keep[r] = keep_magnitude(w[r], tensor.keep_threshold);
            F d[8] = {}, before[COUNT ? COUNT : 1][8];
            if (masked) std::memcpy(before, state, sizeof before);
            noise.add_any(d, step * args.queries, (step + 1) * args.queries, at.index);
            rule(d, state, step, at.index);
            for (int r = 0; r < 8; r++)
                d[r] = S::fma(splat(args.rates[step]), d[r], w[r] * args.decays[step]);
            if (args.stochastic) {
                U u[8];
                uniform16<S, T::SPLIT>(u, (uint32_t)(at.index / 8), rounding[step]);
                for (int r = 0; r < 8; r++) d[r] = T::stochastic(d[r], u[r]);
            } else {
                for (int r = 0; r < 8; r++) d[r] = T::nearest(d[r]);
            }
            for (int r = 0; r < 8; r++) w[r] = masked ? select(keep[r], d[r], w[r]) : d[r];
            for (int i = 0; i < count && masked; i++)
                for (int r = 0; r < 8; r++)
                    state[i][r] = select(keep[r], state[i][r], before[i][r]);
        }
        T::store(tiles[0], w, tiles[0]);
        for (int i = 0; i < count; i++) store(tiles[1 + i], state[i], i);
    }
};

template <int DTYPE, int KIND, int RULE>
void run(const zk_pass& args, const Span& span) {
    const zk_tensor& t = *span.tensor;
    Update<DTYPE, KIND, RULE> update(args, t, t.offset + span.begin);
    const auto tile = [&](char* const* tiles, const Place& at) { update.tile(tiles, at); };
    Stream streams[4] = {{(char*)t.out, Tile<DTYPE>::BYTES}};
    for (int i = 0; i < update.count; i++)
        streams[1 + i] = {(char*)t.states[i], t.state_dtypes[i] == ZK_BFLOAT16 ? 2 : 4};
    update.noise.walk(span, [&](const Span& part) {
        switch (update.count) {
            case 0:
                return for_each_tile<1>(part, streams, tile);
            case 1:
                return for_each_tile<2>(part, streams, tile);
            case 2:
                return for_each_tile<3>(part, streams, tile);
            default:
                return for_each_tile<4>(part, streams, tile);
        }
    });
}

template <int DTYPE, int KIND>
SpanFunction of_rule(int rule) {
    if (rule == ZK_SIGN) return run<DTYPE, KIND, ZK_SIGN>;
    return rule == ZK_MOMENTUM ? run<DTYPE, KIND, ZK_MOMENTUM> : run<DTYPE, KIND, ZK_ADAM>;
}

template <int DTYPE>
SpanFunction of_kind(int kind, int rule) {
    if (kind == ZK_GAUSSIAN) return of_rule<DTYPE, ZK_GAUSSIAN>(rule);
    return kind == ZK_RADEMACHER ? of_rule<DTYPE, ZK_RADEMACHER>(rule)
                                 : of_rule<DTYPE, ZK_RANK1>(rule);
}

}  // namespace

void ZK_ENTRY(apply_update)(const zk_pass& args, const Span& span) {
    const int dtype = span.tensor->dtype, kind = kind_of(args, *span.tensor);
    const SpanFunction function = dtype == ZK_FLOAT32    ? of_kind<ZK_FLOAT32>(kind, args.rule)
                                  : dtype == ZK_BFLOAT16 ? of_kind<ZK_BFLOAT16>(kind, args.rule)
                                                         : of_kind<ZK_FLOAT16>(kind, args.rule);
    function(args, span);
}
