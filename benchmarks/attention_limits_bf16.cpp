// How long the parts of amx_attention.cpp take with all they need in the L1 cache: what the hardware allows.

#include "../amx_attention.cpp"

#include <random>

#include "seconds_of.h"

namespace {

template <int D>
void measure(double* seconds) {
    using Head = Packed<D>;
    [[maybe_unused]] const Tiles tiles{};
    const auto block = allocate<Block<D>>(1);
    const auto keys = allocate<bf16>(Head::KEY_BLOCK);
    const auto values = allocate<bf16>(Head::VALUE_BLOCK);
    // Not zeros, with which AMX draws less power and so runs faster.
    std::minstd_rand numbers;
    const auto fill = [&](bf16* to, int64_t count) {
        for (int64_t n = 0; n < count; n++)  // 1/8 to 2, either sign
            to[n] = 0x3e00 + numbers() % 0x200 + numbers() % 2 * 0x8000;
    };
    fill(block[0].q, sizeof block[0].q / sizeof(bf16));
    fill(keys.get(), Head::KEY_BLOCK);
    fill(values.get(), Head::VALUE_BLOCK);
    block[0].score(keys.get(), block[0].scores);
    seconds[0] = seconds_of([&] { block[0].score(keys.get(), block[0].scores); });
    seconds[1] = seconds_of([&] { block[0].add_values(values.get(), KEYS); });
    seconds[2] = seconds_of([&] { block[0].template weigh<true>(block[0].scores, block[0].weights); });
}

}  // namespace

// Seconds for a block of queries and keys, on one thread: scores, product with the values, exponentials. Returns 1 if
// there is no kernel for this width, or the system gives no tile registers.
extern "C" int limits(int width, int* block, double* seconds) {
    if (!tiles_allowed()) return 1;
    block[0] = QUERIES;
    block[1] = KEYS;
    return for_width(width, [&](auto width) { measure<width()>(seconds); }) ? 0 : 1;
}
