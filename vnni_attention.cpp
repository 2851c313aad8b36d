// Attention for long sequences in fp32, on CPUs with AVX512-VNNI or AVX-VNNI: softmax(q kᵀ / √D) v.
//
// text2images.py builds this file with the C++ compiler that is there, and OpenVINO's model of the UNet then calls it
// for attention of many queries where its float layers are in fp32. Inputs and output have the layout [B, L, heads, D].
//
// Inside, products are of 16-bit integers. VNNI's instruction VPDPWSSD multiplies pairs of them and adds the products
// to 32-bit sums, twice as many as fp32's does. Outputs then err by 3e-4 to 5e-4, relative (in bf16 by 4e-3).
//
// How a head is computed, some queries at a time, over keys in blocks of 64:
//   scores   S = k q          (integers: each query has a length of 32,000, and so has the longest key of the block)
//   weights  P = 2^(c S - m)  (m is the largest c S of the query in this block; integers up to 10,000)
//   output   O = O 2^(M - M') + P v 2^(m - M')  (M' is the query's largest m so far, M was that before this block;
//                                                integers up to 3,300 in each column of the block's v)
// and at the end O divided by the sum of P, which is made in the same way. No sum of products overflows: by Cauchy and
// Schwarz, a score is at most 32,000², and a block's products of weights and values add up to 64 * 10,000 * 3,300.
//
// Each lane of a vector is a query. So its maximum, its weights and their sum need nothing of other lanes; keys keep
// the order that they have in memory, and their numbers are broadcast, two at a time.

#include <immintrin.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

namespace {

#if defined(__AVX512VNNI__)  // 32 registers, of which COLUMNS x VECTORS hold sums
constexpr int LANES = 16, COLUMNS = 8;
#elif defined(__AVXVNNI__)  // 16 registers
constexpr int LANES = 8, COLUMNS = 4;
#else
#error "This CPU has no VNNI."
#endif
constexpr int VECTORS = 3, QUERIES = VECTORS * LANES;  // queries computed at a time
constexpr int KEYS = 64;                               // keys and values of a block
constexpr float LENGTH = 32000, LARGEST_WEIGHT = 10000, LARGEST_VALUE = 3300;
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -60;     // 2^-60 adds nothing, and is far from denormal numbers, which take long
constexpr float TINY = 1e-30f;    // numbers whose largest is not above this count as 0
constexpr float ROUND = 3 << 22;  // added to a small number, it rounds it to an integer, which its bits end with

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

Ints broadcast(int32_t x) { return Ints{} + x; }
Floats broadcast(float x) { return Floats{} + x; }
Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
template <class T>
T larger(T a, T b) { return a > b ? a : b; }

// sums + the products of a's and b's pairs of 16-bit integers
Ints multiply_add(Ints sums, Ints a, Ints b) {
#ifdef __AVX512VNNI__
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#endif
}

int32_t pair(int32_t low, int32_t high) { return (low & 0xffff) | (int32_t)((uint32_t)high << 16); }
Ints pair(Ints low, Ints high) { return (low & 0xffff) | (high << 16); }

// factor * 2^x for x <= 0, to 1e-4 of it: a cubic for what x has behind the point, times a float of this exponent.
Floats power(Floats x, float factor) {
    x = larger(x, broadcast(LOWEST));
    const Floats rounded = x + (ROUND + 127);  // whose bits end with the exponent as a float has it
    const Floats f = x - (rounded - (ROUND + 127));
    const Floats exponent = (Floats)((Ints)rounded << 23);
    const Floats cubic = ((f * (5.500861e-2f * factor) + 0.24221101f * factor) * f + 0.69328297f * factor) * f;
    return (cubic + factor) * exponent;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory that only grows.
class Workspace {
    std::unique_ptr<char, Free> memory;
    int64_t size = 0;

public:
    template <class T>
    T* at_least(int64_t count) {
        const int64_t bytes = ceil_div(count * sizeof(T), 64) * 64;
        if (bytes > size) {
            memory.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
            size = bytes;
        }
        if (memory == nullptr) throw std::bad_alloc();
        return reinterpret_cast<T*>(memory.get());
    }
};

// ---------------------------------------------------------------- integers of floats

// |x|, by fp64, whose range no square leaves
template <int D>
float length_of(const float* x) {
    double sums[8] = {}, squares = 0;  // of every eighth number, which a vector holds
    for (int d = 0; d < D; d += 8)
        for (int i = 0; i < 8; i++) sums[i] += (double)x[d + i] * x[d + i];
    for (const double sum : sums) squares += sum;
    return (float)std::sqrt(squares);
}

// x * factor as integers; 0 if there is no such factor, as x is not finite, or nearly 0
template <int D>
void to_integers(const float* x, float factor, int16_t* to) {
    for (int d = 0; d < D; d++) to[d] = factor > 0 ? (int16_t)std::rint(x[d] * factor) : 0;
}

float factor_for(float largest, float integer) {
    return largest > TINY && largest <= std::numeric_limits<float>::max() ? integer / largest : 0;
}

// A block of keys and values. What is not finite in it spoils the output of all queries.
template <int D>
struct Block {
    int count;
    float key_scale;        // what 1 stands for in the keys
    float value_scales[D];  // and in each column of the values
    alignas(64) int16_t keys[KEYS][D];
    alignas(64) int32_t values[KEYS / 2][D];  // of two keys each

    void pack(const float* k, const float* v, int64_t stride) {
        float longest = 0, nothing = 0;  // 0 times what is not finite is not a number
        for (int n = 0; n < count; n++) {
            const float length = length_of<D>(k + n * stride);
            longest = larger(longest, length);
            nothing += 0 * length;
        }
        key_scale = longest / LENGTH + nothing;
        for (int n = 0; n < KEYS; n++)  // repeats the last one, which changes no maximum
            to_integers<D>(k + std::min(n, count - 1) * stride, factor_for(longest, LENGTH), keys[n]);

        float largest[D] = {}, factors[D];
        std::fill(value_scales, value_scales + D, 0);
        for (int n = 0; n < count; n++)
            for (int d = 0; d < D; d++) {
                const float value = v[n * stride + d];
                largest[d] = larger(largest[d], std::fabs(value));
                value_scales[d] += 0 * value;
            }
        for (int d = 0; d < D; d++) {
            factors[d] = factor_for(largest[d], LARGEST_VALUE);
            value_scales[d] += largest[d] / LARGEST_VALUE;
        }
        const auto integer = [&](int n, int d) {
            return n < count && factors[d] > 0 ? (int32_t)std::rint(v[n * stride + d] * factors[d]) : 0;
        };
        for (int n = 0; n < KEYS; n += 2)
            for (int d = 0; d < D; d++) values[n / 2][d] = pair(integer(n, d), integer(n + 1, d));
    }
};

// ---------------------------------------------------------------- some queries of a head

// Adds to each of COLUMNS sums the products of `depth` rows with their cells: sums[j] += rows[p] * cell(p, j).
template <class Cell>
void product(Ints (&sums)[COLUMNS][VECTORS], const Ints (*rows)[VECTORS], int depth, const Cell& cell) {
    for (int p = 0; p < depth; p++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            const Ints column = broadcast(cell(p, j));
            for (int r = 0; r < VECTORS; r++) sums[j][r] = multiply_add(sums[j][r], rows[p][r], column);
        }
}

template <int D>
class Queries {
    Ints q[D / 2][VECTORS];  // two numbers of each query
    Ints scores[KEYS][VECTORS];
    Ints weights[KEYS / 2][VECTORS];  // of two keys each
    Floats output[D][VECTORS];
    Floats scale[VECTORS];    // of a score, but for the keys' scale, in octaves
    Floats largest[VECTORS];  // score so far, in octaves
    Floats sum[VECTORS];      // of the weights

    void score(const Block<D>& block, Ints (&most)[VECTORS]) {
        std::fill(most, most + VECTORS, broadcast(std::numeric_limits<int32_t>::min()));
        for (int n = 0; n < block.count; n += COLUMNS) {
            Ints sums[COLUMNS][VECTORS] = {};
            product(sums, q, D / 2, [&](int p, int j) {
                int32_t two;
                std::memcpy(&two, &block.keys[n + j][2 * p], 4);
                return two;
            });
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++)
                for (int r = 0; r < VECTORS; r++) {
                    scores[n + j][r] = sums[j][r];
                    most[r] = larger(most[r], sums[j][r]);
                }
        }
    }

    // Weights from the scores of `count` keys, the largest of which is `most`; returns their sum.
    Floats weigh(int r, int count, Floats octaves, Ints most) {
        const auto weight = [&](int n) {  // an integer in the last bits
            return (Ints)(power(to_floats(scores[n][r] - most) * octaves, LARGEST_WEIGHT) + ROUND);
        };
        Ints sum = {};
        for (int n = 0; n < count; n += 2) {
            const Ints two = pair(weight(n), n + 1 < count ? weight(n + 1) : Ints{});
            sum = multiply_add(sum, two, broadcast(pair(1, 1)));
            weights[n / 2][r] = two;
        }
        return to_floats(sum);
    }

public:
    void begin(const float* from, int rows, int64_t stride) {
        for (int n = 0; n < QUERIES; n++) {
            const float* row = from + std::min(n, rows - 1) * stride;
            const float length = length_of<D>(row);
            int16_t integers[D];
            to_integers<D>(row, factor_for(length, LENGTH), integers);
            for (int p = 0; p < D / 2; p++) q[p][n / LANES][n % LANES] = pair(integers[2 * p], integers[2 * p + 1]);
            scale[n / LANES][n % LANES] = length / LENGTH * (LOG2_E / __builtin_sqrtf(D));
        }
        std::fill(largest, largest + VECTORS, broadcast(std::numeric_limits<float>::lowest()));
        std::memset(sum, 0, sizeof sum);
        std::memset(output, 0, sizeof output);
    }

    void add(const Block<D>& block) {
        Ints most[VECTORS];
        Floats before[VECTORS], now[VECTORS];  // factors of what was summed up before, and of this block
        score(block, most);
        for (int r = 0; r < VECTORS; r++) {
            const Floats octaves = scale[r] * block.key_scale, top = to_floats(most[r]) * octaves;
            const Floats highest = larger(largest[r], top);
            before[r] = power(-larger(highest - largest[r], Floats{}), 1);
            now[r] = power(-larger(highest - top, Floats{}), 1);
            largest[r] = highest;
            const Floats added = weigh(r, block.count, octaves, most[r]);
            sum[r] = sum[r] * before[r] + added * now[r] + octaves * 0;  // not a number if that is none
        }
        for (int d = 0; d < D; d += COLUMNS) {
            Ints sums[COLUMNS][VECTORS] = {};
            product(sums, weights, ceil_div(block.count, 2), [&](int p, int j) { return block.values[p][d + j]; });
            for (int j = 0; j < COLUMNS; j++)
                for (int r = 0; r < VECTORS; r++) {
                    Floats& total = output[d + j][r];
                    total = total * before[r] + to_floats(sums[j][r]) * (now[r] * block.value_scales[d + j]);
                }
        }
    }

    void finish(float* to, int rows, int64_t stride) {
        for (int n = 0; n < rows; n++) {
            const float inverse = 1 / sum[n / LANES][n % LANES];
            for (int d = 0; d < D; d++) to[n * stride + d] = output[d][n / LANES][n % LANES] * inverse;
        }
    }
};

// ---------------------------------------------------------------- one attention

struct Sizes {
    int64_t batch, queries, keys, heads;
};

template <int D>
void attend(const float* q, const float* k, const float* v, float* out, const Sizes& sizes) {
    using Range = tbb::blocked_range<int64_t>;
    const int64_t stride = sizes.heads * D, heads = sizes.batch * sizes.heads;
    const int64_t blocks = ceil_div(sizes.keys, KEYS), groups = ceil_div(sizes.queries, QUERIES);
    // Kept for the thread's next call, as the system would clear new memory, which takes long.
    static thread_local Workspace workspace;
    Block<D>* const all = workspace.at_least<Block<D>>(heads * blocks);
    // Keys and values are packed once, for all queries, in the order in which they are in memory ...
    tbb::parallel_for(Range(0, sizes.batch * blocks, 1), [&](const Range& range) {
        for (int64_t number = range.begin(); number < range.end(); number++) {
            const int64_t sample = number / blocks, first = number % blocks * KEYS;
            for (int64_t head = 0; head < sizes.heads; head++) {
                const int64_t at = (sample * sizes.keys + first) * stride + head * D;
                Block<D>& block = all[(sample * sizes.heads + head) * blocks + number % blocks];
                block.count = std::min<int64_t>(KEYS, sizes.keys - first);
                block.pack(k + at, v + at, stride);
            }
        }
    });
    // ... then all groups of queries of all heads are shared out.
    tbb::parallel_for(Range(0, heads * groups, std::max<int64_t>(1, groups / 8)), [&](const Range& range) {
        static thread_local Workspace own;
        Queries<D>& some = *own.at_least<Queries<D>>(1);
        for (int64_t number = range.begin(); number < range.end(); number++) {
            const int64_t head = number / groups, row = number % groups * QUERIES;
            const int64_t at = (head / sizes.heads * sizes.queries + row) * stride + head % sizes.heads * D;
            const int rows = std::min<int64_t>(QUERIES, sizes.queries - row);
            some.begin(q + at, rows, stride);
            for (int64_t block = 0; block < blocks; block++) some.add(all[head * blocks + block]);
            some.finish(out + at, rows, stride);
        }
    });
}

// Calls `work` with the width as a constant; false if there is no kernel for heads of this width.
template <class Work>
bool for_width(int64_t width, const Work& work) {
    switch (width) {
        case 40: work(std::integral_constant<int, 40>()); return true;
        case 64: work(std::integral_constant<int, 64>()); return true;
        case 80: work(std::integral_constant<int, 80>()); return true;
        case 160: work(std::integral_constant<int, 160>()); return true;
        default: return false;
    }
}

}  // namespace

// q, out [batch, queries, heads, width]; k, v [batch, keys, heads, width]. Returns 1, and leaves `out` alone, if there
// is no kernel for this width.
extern "C" int attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries,
                         int64_t keys, int64_t heads, int64_t width, int threads) {
    tbb::task_arena arena(threads);
    const Sizes sizes{batch, queries, keys, heads};
    const auto compute = [&](auto width) { attend<width()>(q, k, v, out, sizes); };
    return arena.execute([&] { return for_width(width, compute) ? 0 : 1; });
}
