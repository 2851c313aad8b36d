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

template <int D, class N>
void measure(double* seconds) {
    using Head = Packed<D, N>;
    [[maybe_unused]] const TilesFor<N> tiles{};
    const auto block = allocate<Block<D, N>>(1);
    const auto keys = allocate<N>(Head::KEY_BLOCK);
    const auto values = allocate<N>(Head::VALUE_BLOCK);
    // Not zeros, with which AMX draws less power and so runs faster.
    std::minstd_rand numbers;
    const auto fill = [&](N* to, int64_t count) {
        for (int64_t n = 0; n < count; n++) {  // 1/8 to 2, either sign
            const bf16 number = 0x3e00 + numbers() % 0x200 + numbers() % 2 * 0x8000;
            const uint32_t bits = number << 16;
            std::memcpy(to + n, IS_BF16<N> ? (const void*)&number : &bits, sizeof(N));
        }
    };
    fill(block[0].q, sizeof block[0].q / sizeof(N));
    fill(keys.get(), Head::KEY_BLOCK);
    fill(values.get(), Head::VALUE_BLOCK);
    block[0].score(keys.get(), block[0].scores);
    seconds[0] = seconds_of([&] { block[0].score(keys.get(), block[0].scores); });
    seconds[1] = seconds_of([&] { block[0].add_values(values.get(), KEYS); });
    seconds[2] = seconds_of([&] { block[0].template weigh<true>(block[0].scores, block[0].weights); });
}

template <class N>
int measure(int width, double* seconds) {
    if (IS_BF16<N> && !tiles_allowed()) return 1;
    switch (width) {
        case 40: measure<40, N>(seconds); return 0;
        case 64: measure<64, N>(seconds); return 0;
        case 80: measure<80, N>(seconds); return 0;
        case 160: measure<160, N>(seconds); return 0;
        default: return 1;
    }
}

}  // namespace

// Seconds for 32 queries and 32 keys, on one thread: scores, product with the values, exponentials.
extern "C" int limits_fp32(int width, double* seconds) { return measure<float>(width, seconds); }
#ifdef WITH_BF16
extern "C" int limits_bf16(int width, double* seconds) { return measure<bf16>(width, seconds); }
#endif
