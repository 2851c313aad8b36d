// Attention for long sequences on CPUs with bf16 instructions: softmax(q kᵀ / √D) v.
//
// text2images.py builds this file with the C++ compiler that is there, and OpenVINO's model of the UNet then calls it
// for its long self-attentions. Products are in bf16 with fp32 sums. Inputs and outputs are fp32 or bf16, and have the
// layout [B, L, heads, D].
//
// How a head is computed, 32 queries at a time, over keys in chunks of 256:
//   scores   S [32, 32 keys] = q kᵀ       (product of two packed matrices)
//   weights  P [32, 256]     = 2^(S c - m) (c = log2 e / √D), rounded to bf16, and their sum for each query
//   output   O [32, D]      += P v         (product of two packed matrices)
// and at the end O / sum. S, P and O stay in the L1 and L2 caches: the [L, L] matrix of the scores, which makes
// attention slow, is never in memory. The packed keys and values of a head (1 MB at L = 4096) are read from L2.
//
// A tile is a register of AMX that holds 16 rows of 64 bytes. One instruction multiplies a tile of 16 x 32 bf16 numbers
// with one of 32 x 16, and adds the product to a tile of 16 x 16 fp32 numbers. So matrices are packed in tiles here,
// with the pairs of a column side by side in the second factor, as the instruction wants them. CPUs with
// AVX512-BF16 and no AMX have an instruction that does so for one row of a tile: it runs on the same packed matrices.
//
// Why no running maximum is needed where |q| |k| is bounded: by Cauchy and Schwarz, c q k lies between -B and B, with
// B := c |q| max |k|. So with m = 0 and B <= 80, the sum of a million weights lies between 2^-80 and 2^100: fp32 and
// bf16, which reach from 2^-126 to 2^127, hold that with all their digits. Where keys are fp32, their mean is subtracted from
// each before they are rounded: that leaves softmax as it is, makes the rounding smaller (as in SageAttention, arXiv
// 2410.02367), and, as the scores of a query then have mean 0, the largest lies between 0 and B: m = B / 2 allows
// B <= 160. (Rounding to bf16 moves a score by less than B / 100.) For queries with a larger B, or one that is not a
// number, m is the largest score so far, as in every online softmax.

#include <immintrin.h>
#include <sys/syscall.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#ifdef EMULATED_TILES  // tests, on CPUs without AMX
#include EMULATED_TILES
#endif

namespace {

using bf16 = uint16_t;

constexpr int TILE = 16;           // rows of a tile; columns of fp32
constexpr int PAIRS = 16;          // pairs of bf16 in a tile's row
constexpr int TILE_BF16 = 512;     // bf16 numbers in a tile
constexpr int TILE_FP32 = 256;     // fp32 numbers in a tile
constexpr int QUERIES = 32;        // queries computed at a time: two tiles
constexpr int KEYS = 32;           // keys of one block of scores: two tiles
constexpr int CHUNK = 256;         // keys between two products with the values
constexpr float LARGEST_BOUND = 80;  // 2^80 times a million, and 2^-80, are far from the ends of fp32
constexpr float LOG2_E = 1.44269504f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
    const int64_t bytes = ceil_div(std::max<int64_t>(count, 1) * sizeof(T), 64) * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return Buffer<T>(static_cast<T*>(memory));
}

// ---------------------------------------------------------------- numbers

// The first `count` of 16 numbers as fp32; the rest are 0.
__m512 load(const float* from, int count) { return _mm512_maskz_loadu_ps(_cvtu32_mask16((1u << count) - 1), from); }
__m512 load(const bf16* from, int count) {
    const __m256i raw = _mm256_maskz_loadu_epi16(_cvtu32_mask16((1u << count) - 1), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
void store(float* to, __m512 x, int count) { _mm512_mask_storeu_ps(to, _cvtu32_mask16((1u << count) - 1), x); }
void store(bf16* to, __m512 x, int count) {
    _mm256_mask_storeu_epi16(to, _cvtu32_mask16((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh(x));
}

// 2^x with a relative error below 1e-4 (weights are rounded to bf16, 4e-3): 2^floor(x) times a cubic in the rest.
__m512 exp2(__m512 x, __mmask16 valid) {
    const __m512 rest = _mm512_reduce_ps(x, 1);  // x - floor(x)
    __m512 p = _mm512_set1_ps(0.07802452f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.22606716f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.69583354f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.99992522f));
    return _mm512_maskz_scalef_ps(valid, p, x);
}

// ---------------------------------------------------------------- products of packed matrices

// C = A B, or C += A B, where A has two rows of tiles and B one column of tiles or two; `depth` is how many tiles the
// rows of A and the columns of B have, and `last_pairs` how many pairs of the last of them are not padding. Tile t of
// row i is at a + t * a_step + i * a_row, tile t of column j at b + t * b_step + j * b_column, and C's tile (i, j) at
// c + (2 j + i) * 256.
#if defined(__AMX_BF16__) || defined(EMULATED_TILES)

struct __attribute__((packed)) TileShapes {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

// The kernel gives a process tile registers when asked; 18 is their number among the register states.
bool tiles_allowed() {
#ifdef EMULATED_TILES
    return true;
#else
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
}

// GCC does not know how much of memory the instructions on tiles read and write: what is written before this is there.
inline void all_written() { asm volatile("" ::: "memory"); }

// All eight tiles have 16 rows of 64 bytes for as long as a thread computes here. Then it gets back the shapes it had:
// OpenVINO's kernels remember which they have set.
class Tiles {
    TileShapes before;

public:
    Tiles() {
        _tile_storeconfig(&before);
        all_written();
        TileShapes shapes;
        shapes.palette = 1;
        std::fill(shapes.bytes_per_row, shapes.bytes_per_row + 8, 64);
        std::fill(shapes.rows, shapes.rows + 8, 16);
        all_written();
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_loadconfig(&before); }
};

template <bool two_columns, bool add>
inline void product(const bf16* a, int64_t a_step, int64_t a_row, const bf16* b, int64_t b_step, int64_t b_column,
                    float* c, int depth, int) {
    all_written();
    if (!add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + TILE_FP32, 64);
        if (two_columns) {
            _tile_loadd(2, c + 2 * TILE_FP32, 64);
            _tile_loadd(3, c + 3 * TILE_FP32, 64);
        }
    }
    for (int t = 0; t < depth; t++) {
        _tile_loadd(4, a + t * a_step, 64);
        _tile_loadd(6, b + t * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + t * a_step + a_row, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (two_columns) {
            _tile_loadd(7, b + t * b_step + b_column, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + TILE_FP32, 64);
    if (two_columns) {
        _tile_stored(2, c + 2 * TILE_FP32, 64);
        _tile_stored(3, c + 3 * TILE_FP32, 64);
    }
}

#else

bool tiles_allowed() { return true; }
struct Tiles {};

template <bool two_columns, bool add>
inline void product(const bf16* a, int64_t a_step, int64_t a_row, const bf16* b, int64_t b_step, int64_t b_column,
                    float* c, int depth, int last_pairs) {
    constexpr int ROWS = 8, COLUMNS = two_columns ? 2 : 1;  // 16 of the 32 registers hold sums
    for (int row = 0; row < QUERIES; row += ROWS) {
        const bf16* rows = a + row / TILE * a_row + row % TILE * 32;
        float* sums = c + row / TILE * TILE_FP32 + row % TILE * TILE;
        __m512 sum[ROWS][COLUMNS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < COLUMNS; j++)
                sum[r][j] = add ? _mm512_load_ps(sums + r * TILE + j * 2 * TILE_FP32) : _mm512_setzero_ps();
        for (int t = 0; t < depth; t++) {
            const int pairs = t == depth - 1 ? last_pairs : PAIRS;
            for (int p = 0; p < pairs; p++) {
                __m512bh column[COLUMNS];
                for (int j = 0; j < COLUMNS; j++)
                    column[j] = (__m512bh)_mm512_load_si512(b + t * b_step + j * b_column + p * 32);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    int32_t pair;
                    std::memcpy(&pair, rows + t * a_step + r * 32 + p * 2, 4);
                    const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair);
                    for (int j = 0; j < COLUMNS; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], broadcast, column[j]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < COLUMNS; j++) _mm512_store_ps(sums + r * TILE + j * 2 * TILE_FP32, sum[r][j]);
    }
}

#endif

// ---------------------------------------------------------------- one attention

struct Sizes {
    int64_t batch, queries, keys, heads;
};

// Keys and values of one head, packed: keys [⌈L/16⌉][D/32] tiles of kᵀ, values [⌈L/32⌉][D/16] tiles.
template <int D>
struct Packed {
    static constexpr int KEY_TILES = (D + 31) / 32, VALUE_TILES = (D + 15) / 16;
    static constexpr int LAST_PAIRS = (D - 32 * (KEY_TILES - 1)) / 2;
    bf16 *keys, *values;
    bool centred = false;   // the mean of all keys was subtracted
    float longest_key = 0;  // max |k|

    template <class T>
    void pack(const T* k, const T* v, int64_t length, int64_t stride);
};

// Even and odd rows of 16 numbers -> 16 pairs of bf16, as the second factor's tiles have them.
__m512i interleave(__m512 even, __m512 odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

template <int D>
template <class T>
void Packed<D>::pack(const T* k, const T* v, int64_t length, int64_t stride) {
    __m512 mean[VALUE_TILES] = {};
    if (std::is_same_v<T, float>) {
        for (int64_t n = 0; n < length; n++)
            for (int t = 0; t < VALUE_TILES; t++)
                mean[t] = _mm512_add_ps(mean[t], load(k + n * stride + t * 16, std::min(16, D - t * 16)));
        __m512 zero = _mm512_setzero_ps();  // unless there are infinities or NaN
        for (auto& part : mean) {
            part = _mm512_mul_ps(part, _mm512_set1_ps(1.f / length));
            zero = _mm512_fmadd_ps(part, _mm512_setzero_ps(), zero);
        }
        centred = _mm512_reduce_add_ps(zero) == 0;
        if (!centred) std::fill(mean, mean + VALUE_TILES, _mm512_setzero_ps());
    }
    float longest = 0;
    for (int64_t n = 0; n < length; n++) {
        bf16* tile = keys + n / TILE * KEY_TILES * TILE_BF16 + n % TILE * 2;
        __m512 square = _mm512_setzero_ps();
        for (int t = 0; t < VALUE_TILES; t++) {
            const int count = std::min(16, D - t * 16);
            const __m512 x = _mm512_sub_ps(load(k + n * stride + t * 16, count), mean[t]);
            square = _mm512_fmadd_ps(x, x, square);
            // pair p of the column goes to row p of the tile: 8 pairs, 64 bytes apart
            const __m256i pairs = (__m256i)_mm512_cvtneps_pbh(x);
            bf16* rows = tile + t / 2 * TILE_BF16 + t % 2 * 8 * 32;
            alignas(32) int32_t pair[8];
            _mm256_store_si256((__m256i*)pair, pairs);
            for (int p = 0; p < 8; p++) std::memcpy(rows + p * 32, pair + p, 4);
        }
        const float sum = _mm512_reduce_add_ps(square);
        if (!(sum <= longest)) longest = sum;  // NaN as well
    }
    longest_key = std::sqrt(longest);

    for (int64_t n = 0; n < length; n += 2)
        for (int t = 0; t < VALUE_TILES; t++) {
            const int count = std::min(16, D - t * 16);
            const __m512 even = load(v + n * stride + t * 16, count);
            const __m512 odd = n + 1 < length ? load(v + (n + 1) * stride + t * 16, count) : _mm512_setzero_ps();
            bf16* tile = values + (n / KEYS * VALUE_TILES + t) * TILE_BF16;
            _mm512_store_si512(tile + n % KEYS / 2 * 32, interleave(even, odd));
        }
}

// What a thread needs to compute 32 queries of a head.
template <int D>
struct Block {
    using Head = Packed<D>;
    alignas(64) bf16 q[2 * Head::KEY_TILES * TILE_BF16];
    alignas(64) float scores[CHUNK / KEYS * 4 * TILE_FP32];
    alignas(64) bf16 weights[CHUNK / KEYS * 2 * TILE_BF16];
    alignas(64) float output[(Head::VALUE_TILES + 1) / 2 * 4 * TILE_FP32];
    alignas(64) float sums[QUERIES][TILE];  // of the weights, for each query in 16 parts
    float largest[QUERIES];                 // score so far, where there is no bound

    static constexpr float C() { return LOG2_E / __builtin_sqrtf(D); }

    template <class T>
    float pack_queries(const T* from, int rows, int64_t stride) {  // returns the largest |q|
        std::memset(q, 0, sizeof q);
        float longest = 0;
        for (int r = 0; r < rows; r++) {
            bf16* to = q + r / TILE * Head::KEY_TILES * TILE_BF16 + r % TILE * 32;
            __m512 square = _mm512_setzero_ps();
            for (int t = 0; t < Head::VALUE_TILES; t++) {
                const __m512 x = load(from + r * stride + t * 16, std::min(16, D - t * 16));
                square = _mm512_fmadd_ps(x, x, square);
                _mm256_store_si256((__m256i*)(to + t / 2 * TILE_BF16 + t % 2 * 16), (__m256i)_mm512_cvtneps_pbh(x));
            }
            const float sum = _mm512_reduce_add_ps(square);
            if (!(sum <= longest)) longest = sum;
        }
        return std::sqrt(longest);
    }

    // Scores of 32 queries and 32 keys: tiles of [keys half][queries half].
    void score(const bf16* keys, float* to) {
        constexpr int64_t row = Head::KEY_TILES * TILE_BF16;
        product<true, false>(q, TILE_BF16, row, keys, TILE_BF16, row, to, Head::KEY_TILES, Head::LAST_PAIRS);
    }

    // Weights 2^(c S - m) of 32 queries and the first `valid` of 32 keys, from their scores; adds to the sums.
    void weigh(const float* from, bf16* to, int valid, float offset) {
        const __m512 c = _mm512_set1_ps(C()), m = _mm512_set1_ps(offset);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        const __mmask16 left = _cvtu32_mask16(valid >= 16 ? 0xffff : (1u << valid) - 1);
        const __mmask16 right = _cvtu32_mask16(valid >= 32 ? 0xffff : valid > 16 ? (1u << (valid - 16)) - 1 : 0);
        for (int r = 0; r < QUERIES; r++) {
            const float* row = from + r / TILE * TILE_FP32 + r % TILE * TILE;
            const __m512 a = exp2(_mm512_fmsub_ps(_mm512_load_ps(row), c, m), left);
            const __m512 b = exp2(_mm512_fmsub_ps(_mm512_load_ps(row + 2 * TILE_FP32), c, m), right);
            const __m512bh rounded = _mm512_cvtne2ps_pbh(b, a);
            // sums what was rounded, so that the weights that the values are multiplied by add up to 1
            _mm512_store_ps(sums[r], _mm512_dpbf16_ps(_mm512_load_ps(sums[r]), rounded, ones));
            _mm512_store_si512(to + r / TILE * TILE_BF16 + r % TILE * 32, (__m512i)rounded);
        }
    }

    // Online softmax: finds each query's largest score so far, subtracts it from the chunk's scores, and scales what
    // was summed before. (Subtracting it first is exact where it matters; c times a large score is not.)
    void subtract_largest(int64_t keys) {
        const auto score_row = [&](int64_t n, int r) {
            return scores + (n / KEYS * 4 + n % KEYS / TILE * 2 + r / TILE) * TILE_FP32 + r % TILE * TILE;
        };
        for (int r = 0; r < QUERIES; r++) {
            __m512 found = _mm512_set1_ps(largest[r]);
            for (int64_t n = 0; n < keys; n += TILE) {
                const __mmask16 valid = _cvtu32_mask16(keys - n >= 16 ? 0xffff : (1u << (keys - n)) - 1);
                found = _mm512_mask_max_ps(found, valid, found, _mm512_load_ps(score_row(n, r)));
            }
            const float before = largest[r];
            largest[r] = _mm512_reduce_max_ps(found);
            const __m512 shift = _mm512_set1_ps(std::isinf(largest[r]) && largest[r] < 0 ? 0 : largest[r]);
            for (int64_t n = 0; n < keys; n += TILE)
                _mm512_store_ps(score_row(n, r), _mm512_sub_ps(_mm512_load_ps(score_row(n, r)), shift));
            if (largest[r] == before) continue;
            const __m512 scale = _mm512_set1_ps(std::exp2(C() * (before - largest[r])));
            _mm512_store_ps(sums[r], _mm512_mul_ps(_mm512_load_ps(sums[r]), scale));
            for (int t = 0; t < Head::VALUE_TILES; t++)
                _mm512_store_ps(output_row(r, t), _mm512_mul_ps(_mm512_load_ps(output_row(r, t)), scale));
        }
    }

    float* output_row(int r, int tile) { return output + (2 * tile + r / TILE) * TILE_FP32 + r % TILE * TILE; }

    void add_values(const bf16* values, int64_t keys) {
        const int depth = ceil_div(keys, KEYS);
        const int last_pairs = (keys - (depth - 1) * KEYS + 1) / 2;
        for (int t = 0; t < Head::VALUE_TILES; t += 2) {
            const auto add = t + 1 < Head::VALUE_TILES ? product<true, true> : product<false, true>;
            add(weights, 2 * TILE_BF16, TILE_BF16, values + t * TILE_BF16, Head::VALUE_TILES * TILE_BF16, TILE_BF16,
                output + 2 * t * TILE_FP32, depth, last_pairs);
        }
    }

    template <class T>
    void attend(const T* from, T* to, int rows, int64_t stride, const Head& head, int64_t length) {
        const float bound = C() * pack_queries(from, rows, stride) * head.longest_key;
        const bool bounded = bound <= (head.centred ? 2 : 1) * LARGEST_BOUND;
        const float m = bounded && head.centred ? bound / 2 : 0;
        std::fill(largest, largest + QUERIES, -std::numeric_limits<float>::infinity());
        std::memset(sums, 0, sizeof sums);
        std::memset(output, 0, sizeof output);
        for (int64_t begin = 0; begin < length; begin += CHUNK) {
            const int64_t keys = std::min<int64_t>(CHUNK, length - begin);
            const int blocks = ceil_div(keys, KEYS);
            const bf16* packed = head.keys + begin / TILE * Head::KEY_TILES * TILE_BF16;
            auto score_block = [&](int j) {
                score(packed + j * 2 * Head::KEY_TILES * TILE_BF16, scores + j * 4 * TILE_FP32);
            };
            // Products and exponentials run in different parts of the core: those of the next block come before these.
            for (int j = 0; j < (bounded ? 1 : blocks); j++) score_block(j);
            if (!bounded) subtract_largest(keys);
            for (int j = 0; j < blocks; j++) {
                if (bounded && j + 1 < blocks) score_block(j + 1);
                const int valid = std::min<int64_t>(KEYS, keys - j * KEYS);
                weigh(scores + j * 4 * TILE_FP32, weights + j * 2 * TILE_BF16, valid, m);
            }
            add_values(head.values + begin / KEYS * Head::VALUE_TILES * TILE_BF16, keys);
        }
        for (int r = 0; r < rows; r++) {
            const __m512 inverse = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(_mm512_load_ps(sums[r])));
            for (int t = 0; t < Head::VALUE_TILES; t++)
                store(to + r * stride + t * 16, _mm512_mul_ps(_mm512_load_ps(output_row(r, t)), inverse),
                      std::min(16, D - t * 16));
        }
    }
};

template <int D, class T>
void attend(const T* q, const T* k, const T* v, T* out, const Sizes& sizes) {
    using Head = Packed<D>;
    using Range = tbb::blocked_range<int64_t>;
    const int64_t stride = sizes.heads * D, heads = sizes.batch * sizes.heads;
    const int64_t key_size = ceil_div(sizes.keys, KEYS) * 2 * Head::KEY_TILES * TILE_BF16;
    const int64_t value_size = ceil_div(sizes.keys, KEYS) * Head::VALUE_TILES * TILE_BF16;
    const auto keys = allocate<bf16>(heads * key_size), values = allocate<bf16>(heads * value_size);
    const std::unique_ptr<Head[]> packed(new Head[heads]);
    const auto begin = [&](int64_t head, int64_t length) {
        return head / sizes.heads * length * stride + head % sizes.heads * D;
    };
    // Keys and values are packed once, for all queries; then all blocks of queries of all heads are shared out.
    tbb::parallel_for(Range(0, heads, 1), [&](const Range& range) {
        for (int64_t head = range.begin(); head < range.end(); head++) {
            packed[head].keys = keys.get() + head * key_size;
            packed[head].values = values.get() + head * value_size;
            const int64_t at = begin(head, sizes.keys);
            packed[head].pack(k + at, v + at, sizes.keys, stride);
        }
    });
    const int64_t blocks = ceil_div(sizes.queries, QUERIES), grain = std::max<int64_t>(1, blocks / 16);
    tbb::parallel_for(Range(0, heads * blocks, grain), [&](const Range& range) {
        [[maybe_unused]] const Tiles tiles;
        const auto block = allocate<Block<D>>(1);
        for (int64_t number = range.begin(); number < range.end(); number++) {
            const int64_t head = number / blocks, row = number % blocks * QUERIES;
            const int64_t at = begin(head, sizes.queries) + row * stride;
            const int rows = std::min<int64_t>(QUERIES, sizes.queries - row);
            block[0].attend(q + at, out + at, rows, stride, packed[head], sizes.keys);
        }
    });
}

// Whether there are kernels for heads of this width; `out` is written if so.
template <class T>
bool attend(const T* q, const T* k, const T* v, T* out, const Sizes& sizes, int64_t width) {
    if (!tiles_allowed()) return false;
    switch (width) {
        case 40: attend<40>(q, k, v, out, sizes); return true;
        case 64: attend<64>(q, k, v, out, sizes); return true;
        case 80: attend<80>(q, k, v, out, sizes); return true;
        case 160: attend<160>(q, k, v, out, sizes); return true;
        default: return false;
    }
}

}  // namespace

// q, out [batch, queries, heads, width]; k, v [batch, keys, heads, width]. Returns 1, and leaves `out` alone, if there is
// no kernel for this width, or if the system gives no tile registers.
#define ATTENTION(NAME, TYPE)                                                                                      \
    extern "C" int NAME(const TYPE* q, const TYPE* k, const TYPE* v, TYPE* out, int64_t batch, int64_t queries,    \
                        int64_t keys, int64_t heads, int64_t width, int threads) {                                 \
        tbb::task_arena arena(threads);                                                                            \
        const Sizes sizes{batch, queries, keys, heads};                                                            \
        return arena.execute([&] { return attend(q, k, v, out, sizes, width) ? 0 : 1; });                          \
    }
ATTENTION(attention_fp32, float)
ATTENTION(attention_bf16, bf16)
