// How long vnni_attention.cpp takes for a block with all it needs in the L1 cache: what the hardware allows.

#include "../vnni_attention.cpp"

#include <random>

#include "seconds_of.h"

namespace {

template <int D>
void measure(double* seconds) {
    const std::unique_ptr<Block<D>> block(new Block<D>);
    const std::unique_ptr<Queries<D>> queries(new Queries<D>);
    std::minstd_rand numbers;
    float rows[KEYS][D];
    for (auto& row : rows)
        for (float& x : row) x = (numbers() % 1000) / 500.0f - 1;
    block->count = KEYS;
    block->pack(rows[0], rows[0], D);
    queries->begin(rows[0], KEYS, D);
    seconds[0] = seconds_of([&] { queries->add(*block); });
}

}  // namespace

// Seconds for a block of queries and keys, on one thread, in the first of three numbers. Returns 1 if there is no
// kernel for this width.
extern "C" int limits(int width, int* block, double* seconds) {
    block[0] = QUERIES;
    block[1] = KEYS;
    return for_width(width, [&](auto width) { measure<width()>(seconds); }) ? 0 : 1;
}
