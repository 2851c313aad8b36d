#include <algorithm>
#include <chrono>

// The least of seven means of 2,000 calls.
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
