// How long the parts of amx_attention.cpp take with all they need in the L1 cache: what the hardware allows.

#include "../amx_attention.cpp"

#include <chrono>
#include <random>

namespace {

template <class Work>
double seconds_of(const Work& work) {
    constexpr int ROUNDS = 2000;
    double best = 1e9;
    for (int attempt = 0; attempt < 7; attempt++) {
        const auto began = std::chrono::steady_clock::now();
        for (int round = 0; round < ROUNDS; round++) {
            work();
            asm volatile("" ::: "memory");
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        best = std::min(best, took.count() / ROUNDS);
    }
    return best;
}

template <int D>
void measure(double* seconds) {
    using Head = Packed<D>;
    [[maybe_unused]] const Tiles tiles;
    const auto block = allocate<Block<D>>(1);
    const auto keys = allocate<bf16>(2 * Head::KEY_TILES * TILE_BF16);
    const auto values = allocate<bf16>(Head::VALUE_TILES * TILE_BF16);
    // Not zeros, with which AMX draws less power and so runs faster.
    std::minstd_rand numbers;
    const auto fill = [&](bf16* to, int64_t count) {
        for (int64_t n = 0; n < count; n++) to[n] = 0x3e00 + numbers() % 0x200 + numbers() % 2 * 0x8000;  // 1/8 to 2
    };
    fill(block[0].q, sizeof block[0].q / sizeof(bf16));
    fill(keys.get(), 2 * Head::KEY_TILES * TILE_BF16);
    fill(values.get(), Head::VALUE_TILES * TILE_BF16);
    block[0].score(keys.get(), block[0].scores);
    seconds[0] = seconds_of([&] { block[0].score(keys.get(), block[0].scores); });
    seconds[1] = seconds_of([&] { block[0].add_values(values.get(), KEYS); });
    seconds[2] = seconds_of([&] { block[0].template weigh<true>(block[0].scores, block[0].weights); });
}

}  // namespace

// Seconds for 32 queries and 32 keys, on one thread: scores, product with the values, exponentials.
extern "C" int measure_limits(int width, double* seconds) {
    if (!tiles_allowed()) return 1;
    switch (width) {
        case 40: measure<40>(seconds); return 0;
        case 64: measure<64>(seconds); return 0;
        case 80: measure<80>(seconds); return 0;
        case 160: measure<160>(seconds); return 0;
        default: return 1;
    }
}
