// One add_noise pass over weights that are 0, and nothing else that grows with their number, so
// that two runs under an emulator that counts tell what a weight costs. See instructions.py.
//
// Usage: instructions ISA KIND DTYPE NUMEL COLUMNS

#include <cstdint>
#include <cstdlib>
#include <new>

#include "zokernels.h"

int main(int, char** argv) {
    const int isa = std::atoi(argv[1]);
    // Fresh pages are 0.
    static char weights[8 << 20];
    zk_tensor tensor{};
    tensor.in = tensor.out = weights;
    tensor.numel = std::atoll(argv[4]);
    tensor.columns = std::atoll(argv[5]);
    tensor.dtype = std::atoi(argv[3]);
    const uint64_t seed = 3;
    const float coeff = 1e-3f, decay = 1;
    zk_pass pass{};
    pass.tensors = &tensor;
    pass.tensor_count = 1;
    pass.seeds = pass.rounding_seeds = &seed;
    pass.coeffs = &coeff;
    pass.seed_count = pass.queries = 1;
    pass.decays = pass.rates = pass.scales = &decay;
    pass.rule = ZK_ADD_NOISE;
    pass.kind = std::atoi(argv[2]);
    pass.threads = 1;
    return tensor.numel > 2 << 20 || zk_run(&pass, isa);
}
