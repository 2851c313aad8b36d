// Attention for long sequences in bf16, on CPUs with AVX512-BF16, AVX512-VBMI and perhaps AMX: softmax(q kᵀ / √D) v.
//
// text2images.py builds this file with the C++ compiler that is there, and OpenVINO's model of the UNet then calls it
// for attention of many queries where its float layers are in bf16. Inputs and output have the layout [B, L, heads, D].
//
// How a head is computed, 32 queries at a time, over keys in chunks of 256:
//   scores   S [32, 32 keys] = q kᵀ          (product of two packed matrices)
//   weights  P [32, 256]     = 2^(S c)       (c = log2 e / √D; rounded to bf16)
//   output   O [32, D + 1]  += P [v, 1]      (product of two packed matrices; the last column is the weights' sum)
// and at the end O / sum. S, P and O stay in the L1 and L2 caches: the [L, L] matrix of the scores, which makes
// attention slow, is never in memory. The packed keys and values of a head (1 MB at L = 4096) are read from L2.
//
// A tile is a register of AMX that holds 16 rows of 64 bytes. One instruction multiplies a tile of 16 x 32 bf16 numbers
// with one of 32 x 16, and adds the product to a tile of 16 x 16 fp32 numbers. So matrices are packed in tiles here,
// with the pairs of a column side by side in the second factor, as the instruction wants them. CPUs with
// AVX512-BF16 and no AMX have an instruction that does so for one row of a tile: it runs on the same packed matrices.
//
// Exponentials would take longer than the products, so weights are made by integer instructions, 32 at a time. Read as
// an integer, the bits of a bf16 number are 128 times 127 + its logarithm, but that between powers of two there is a
// straight line in the logarithm's place. So those of 2^x are 128 (127 + x), rounded, less what the line has more: that
// is in a table of 64 bytes. Such weights err by 2.0e-3 (rms), where an exact exponential, rounded to bf16, errs by
// 1.7e-3. Their sum is taken of the weights as they are, so that they add up to 1.
//
// Why no running maximum is needed where |q| |k| is bounded: by Cauchy and Schwarz, c q k lies between -B and B, with
// B := c |q| max |k|. So with B <= 80, the sum of a million weights lies between 2^-80 and 2^100: fp32 and bf16, which
// reach from 2^-126 to 2^127, hold that with all their digits. (Rounding to bf16 moves a score by less than B / 100.)
// For queries with a larger B, or one that is not a number, the largest score so far is subtracted from every score, as
// in every online softmax.

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

constexpr int TILE = 16;                // rows of a tile; cells of a row, each of which holds a pair
constexpr int ROW = 2 * TILE;           // bf16 numbers in a tile's row
constexpr int TILE_BF16 = TILE * ROW;   // bf16 numbers in a tile
constexpr int TILE_FP32 = TILE * TILE;  // fp32 numbers in a tile
constexpr int QUERIES = 32;             // queries computed at a time: two tiles
constexpr int GROUP = 4;                // times as many queries go through the keys together
constexpr int KEYS = 32;                // keys of one block of scores: two tiles
constexpr int CHUNK = 256;              // keys between two products with the values
constexpr float LARGEST_BOUND = 80;     // 2^80 times a million, and 2^-80, are far from the ends of fp32
constexpr int OCTAVE = 256;             // x is computed in 256ths: two for each of bf16's numbers
constexpr float LOG2_E = 1.44269504f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

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

// Memory that only grows.
class Workspace {
    Buffer<bf16> memory;
    int64_t size = 0;

public:
    bf16* at_least(int64_t count) {
        if (count > size) {
            memory = allocate<bf16>(count);
            size = count;
        }
        return memory.get();
    }
};

// ---------------------------------------------------------------- numbers

// The first `count` of 16 numbers as fp32; the rest are 0.
__m512 load(const bf16* from, int count) {
    const __m256i raw = _mm256_maskz_loadu_epi16(_cvtu32_mask16((1u << count) - 1), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
void store(bf16* to, __m512 x, int count) {
    _mm256_mask_storeu_epi16(to, _cvtu32_mask16((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh(x));
}

// 256 times what a straight line between powers of two has more than the logarithm: f - (2^f - 1), where f is what x
// has behind the point, in 64 steps. Kept as 255 less that, which fits a byte and can be added. x comes with 2 / 256
// more, so that both together are 257: 1 / 256 is half of bf16's last bit, which rounds, and the rest is carried.
struct Excess {
    alignas(64) uint8_t bytes[64];

    Excess() {
        for (int step = 0; step < 64; step++) {
            const double f = (step - 0.125) / 64;  // of x = step / 64 + (0, 1, 2 or 3 less 2) / 256, in the middle
            bytes[step] = std::lround(255 - OCTAVE * (f - (std::exp2(f) - 1)));
        }
    }
};
const Excess EXCESS;

// 2^(S c) of 32 scores, by the integer instructions described above; `largest` is subtracted from each score, unless all
// are bounded. The instruction that packs two rows of 16 integers takes four of each in turn, so the weights come as
// keys 0-3, 16-19, 4-7, 20-23, ...
template <bool bounded>
void weigh_keys(bf16* to, __m512 left, __m512 right, float largest, float octaves) {
    const __m512i excess = _mm512_load_si512(EXCESS.bytes), bias = _mm512_set1_epi16(126 * OCTAVE);
    const __m512 c = _mm512_set1_ps(OCTAVE * octaves), two = _mm512_set1_ps(2);
    if (!bounded) {
        left = _mm512_sub_ps(left, _mm512_set1_ps(largest));
        right = _mm512_sub_ps(right, _mm512_set1_ps(largest));
    }
    const __m512i low = _mm512_cvtps_epi32(_mm512_fmadd_ps(left, c, two));
    const __m512i high = _mm512_cvtps_epi32(_mm512_fmadd_ps(right, c, two));
    __m512i x = _mm512_packs_epi32(low, high);
    if (!bounded) {  // 2^-126 and less count as 0; keys that are padding may have a larger score
        x = _mm512_max_epi16(x, _mm512_set1_epi16(-126 * OCTAVE));
        x = _mm512_min_epi16(x, _mm512_set1_epi16(2));
    }
    // Adds 126 in the high byte and, by the first 6 bits behind the point, 255 - excess in the low byte.
    const __m512i step = _mm512_srli_epi16(x, 2);
    const __m512i more = _mm512_mask_permutexvar_epi8(bias, 0x5555555555555555, step, excess);
    _mm512_store_si512(to, _mm512_srli_epi16(_mm512_add_epi16(x, more), 1));
}

// ---------------------------------------------------------------- products of packed matrices

// C = A B, or C += A B, where A has two rows of tiles and B one column of tiles or two; `depth` is how many tiles the
// rows of A and the columns of B have, and `last_cells` how many cells of the last of them are not padding. Tile t of
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
                    float* c, int depth, int last_cells) {
    constexpr int ROWS = 8, COLUMNS = two_columns ? 2 : 1;  // 16 of the 32 registers hold sums
    for (int row = 0; row < QUERIES; row += ROWS) {
        const bf16* rows = a + row / TILE * a_row + row % TILE * ROW;
        float* sums = c + row / TILE * TILE_FP32 + row % TILE * TILE;
        __m512 sum[ROWS][COLUMNS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < COLUMNS; j++)
                sum[r][j] = add ? _mm512_load_ps(sums + r * TILE + j * 2 * TILE_FP32) : _mm512_setzero_ps();
        for (int t = 0; t < depth; t++) {
            const int cells = t == depth - 1 ? last_cells : TILE;
            for (int p = 0; p < cells; p++) {
                __m512i column[COLUMNS];
                for (int j = 0; j < COLUMNS; j++)
                    column[j] = _mm512_load_si512(b + t * b_step + j * b_column + p * ROW);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    int32_t cell;
                    std::memcpy(&cell, rows + t * a_step + r * ROW + 2 * p, 4);
                    const __m512i broadcast = _mm512_set1_epi32(cell);
                    for (int j = 0; j < COLUMNS; j++)
                        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)broadcast, (__m512bh)column[j]);
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

// Keys and values of one head, packed in blocks of 32: keys [2][KEY_TILES] tiles of kᵀ; values [VALUE_TILES] tiles of
// [v, 1].
template <int D>
struct Packed {
    static constexpr int PARTS = (D + 15) / 16;  // of 16 numbers each
    static constexpr int KEY_TILES = (D + ROW - 1) / ROW, VALUE_TILES = D / 16 + 1;
    static constexpr int LAST_CELLS = (D - ROW * (KEY_TILES - 1)) / 2;
    static constexpr int KEY_BLOCK = 2 * KEY_TILES * TILE_BF16, VALUE_BLOCK = VALUE_TILES * TILE_BF16;
    bf16 *keys, *values;
    float longest_key;  // max |k|; infinite where one is not finite
};

// Numbers 16 t .. 16 t + 15 of a row of D; 0 where there are none.
template <int D>
__m512 load_part(const bf16* row, int t) {
    const int count = std::min(16, D - 16 * t);
    return count > 0 ? load(row + 16 * t, count) : _mm512_setzero_ps();
}

// |x|² from the 16 sums of its squares; infinite unless it is finite.
float squared_length(__m512 squares) {
    const float sum = _mm512_reduce_add_ps(squares);
    return sum < INFINITE ? sum : INFINITE;
}

// Tile t's row of one vector of D numbers; adds their squares.
template <int D>
__m512i load_row(const bf16* from, int t, __m512& squares) {
    const __m512 left = load_part<D>(from, 2 * t), right = load_part<D>(from, 2 * t + 1);
    squares = _mm512_fmadd_ps(left, left, _mm512_fmadd_ps(right, right, squares));
    return (__m512i)_mm512_cvtne2ps_pbh(right, left);
}

// Packs up to 32 keys; the rest are 0. Returns the largest |k|².
template <int D>
float pack_keys(const bf16* k, int count, int64_t stride, bf16* to) {
    const __m512i column = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(TILE));
    float longest = 0;
    for (int half = 0; half < 2; half++) {
        __m512 squares[TILE] = {};
        for (int t = 0; t < Packed<D>::KEY_TILES; t++, to += TILE_BF16) {
            alignas(64) int32_t cells[TILE][TILE] = {};  // of this tile's numbers, for each key
            for (int n = 0; n < std::min(TILE, count - half * TILE); n++)
                _mm512_store_si512(cells[n], load_row<D>(k + (half * TILE + n) * stride, t, squares[n]));
            for (int p = 0; p < TILE; p++)  // cell p of all keys is row p of the tile
                _mm512_store_si512(to + p * ROW, _mm512_i32gather_epi32(column, &cells[0][p], 4));
        }
        for (const __m512& sums : squares) longest = std::max(longest, squared_length(sums));
    }
    return longest;
}

// Packs up to 32 values, each with a 1 as its last number; the rest are 0. Keys are in the order of weigh_keys.
template <int D>
void pack_values(const bf16* v, int count, int64_t stride, bf16* to) {
    for (int t = 0; t < Packed<D>::VALUE_TILES; t++, to += TILE_BF16)
        for (int row = 0; row < TILE; row++) {
            __m512i cells[2];  // of the row's two keys
            for (int i = 0; i < 2; i++) {
                const int key = row / 4 * 4 + row / 2 % 2 * TILE + row % 2 * 2 + i;
                __m512 part = key < count ? load_part<D>(v + key * stride, t) : _mm512_setzero_ps();
                const bool one = key < count && t == Packed<D>::VALUE_TILES - 1;
                if (one) part = _mm512_mask_mov_ps(part, 1 << 15, _mm512_set1_ps(1));
                cells[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(part));
            }
            _mm512_store_si512(to + row * ROW, _mm512_or_si512(cells[0], _mm512_slli_epi32(cells[1], 16)));
        }
}

// What a thread needs to compute 32 queries of a head.
template <int D>
struct Block {
    using Head = Packed<D>;
    static constexpr int SIZE = TILE_BF16;
    alignas(64) bf16 q[2 * Head::KEY_TILES * SIZE];
    alignas(64) float scores[CHUNK / KEYS * 4 * TILE_FP32];
    alignas(64) bf16 weights[CHUNK / KEYS * 2 * SIZE];
    alignas(64) float output[(Head::VALUE_TILES + 1) / 2 * 4 * TILE_FP32];
    float largest[QUERIES];  // score so far, where there is no bound
    bool spoiled[QUERIES];   // by a score that is infinite or not a number

    static constexpr float C() { return LOG2_E / __builtin_sqrtf(D); }

    float pack_queries(const bf16* from, int rows, int64_t stride) {  // returns the largest |q|
        std::memset(q, 0, sizeof q);
        float longest = 0;
        for (int r = 0; r < rows; r++) {
            bf16* to = q + r / TILE * Head::KEY_TILES * SIZE + r % TILE * ROW;
            __m512 squares = _mm512_setzero_ps();
            for (int t = 0; t < Head::KEY_TILES; t++)
                _mm512_store_si512(to + t * SIZE, load_row<D>(from + r * stride, t, squares));
            longest = std::max(longest, squared_length(squares));
        }
        return std::sqrt(longest);
    }

    // Scores of 32 queries and 32 keys: tiles of [keys half][queries half].
    void score(const bf16* keys, float* to) {
        constexpr int64_t row = Head::KEY_TILES * SIZE;
        product<true, false>(q, SIZE, row, keys, SIZE, row, to, Head::KEY_TILES, Head::LAST_CELLS);
    }

    // Weights 2^(S c) of 32 queries and 32 keys, from their scores; where those are not bounded, less the largest.
    template <bool bounded>
    void weigh(const float* from, bf16* to) {
        for (int half = 0; half < 2; half++, from += TILE_FP32, to += SIZE)
#pragma GCC unroll 16
            for (int r = 0; r < TILE; r++) {
                const __m512 left = _mm512_load_ps(from + r * TILE);
                const __m512 right = _mm512_load_ps(from + r * TILE + 2 * TILE_FP32);
                const float most = largest[half * TILE + r];
                weigh_keys<bounded>(to + r * ROW, left, right, most, C());
            }
    }

    // Online softmax: finds each query's largest score so far, and scales what was summed up before.
    void find_largest(int64_t keys) {
        for (int r = 0; r < QUERIES; r++) {
            __m512 found = _mm512_set1_ps(largest[r]);
            __mmask16 bad = 0;
            for (int64_t n = 0; n < keys; n += TILE) {
                const float* row = scores + (n / TILE * 2 + r / TILE) * TILE_FP32 + r % TILE * TILE;
                const __mmask16 valid = _cvtu32_mask16(keys - n >= TILE ? 0xffff : (1u << (keys - n)) - 1);
                const __m512 x = _mm512_load_ps(row);
                found = _mm512_mask_max_ps(found, valid, found, x);
                bad |= _mm512_mask_cmp_ps_mask(valid, x, _mm512_set1_ps(INFINITE), _CMP_NLT_UQ);
            }
            const float before = largest[r];
            largest[r] = _mm512_reduce_max_ps(found);
            spoiled[r] = spoiled[r] || bad != 0;
            if (largest[r] == before) continue;
            const float octaves = C() * (before - largest[r]);
            const __m512 scale = _mm512_set1_ps(octaves > -100 ? std::exp2(octaves) : 0);
            for (int t = 0; t < Head::VALUE_TILES; t++)
                _mm512_store_ps(output_row(r, t), _mm512_mul_ps(_mm512_load_ps(output_row(r, t)), scale));
        }
    }

    float* output_row(int r, int tile) { return output + (2 * tile + r / TILE) * TILE_FP32 + r % TILE * TILE; }

    void add_values(const bf16* values, int64_t keys) {
        const int depth = ceil_div(keys, KEYS);
        for (int t = 0; t < Head::VALUE_TILES; t += 2) {
            const auto add = t + 1 < Head::VALUE_TILES ? product<true, true> : product<false, true>;
            add(weights, 2 * SIZE, SIZE, values + t * SIZE, Head::VALUE_TILES * SIZE, SIZE, output + 2 * t * TILE_FP32,
                depth, TILE);
        }
    }

    template <bool bounded>
    void add_chunk(const bf16* keys, const bf16* values, int64_t count) {
        const int blocks = ceil_div(count, KEYS);
        // The next block's products come before this one's weights, which the core can compute at the same time.
        const int ahead = bounded ? 1 : blocks;
        const auto scores_of = [&](int j) { return scores + (bounded ? j % 2 : j) * 4 * TILE_FP32; };
        const auto score_block = [&](int j) { score(keys + j * Head::KEY_BLOCK, scores_of(j)); };
        for (int j = 0; j < ahead; j++) score_block(j);
        if (!bounded) find_largest(count);
        for (int j = 0; j < blocks; j++) {
            if (j + ahead < blocks) score_block(j + ahead);
            weigh<bounded>(scores_of(j), weights + j * 2 * SIZE);
        }
        add_values(values, count);
    }

    bool bounded;

    void begin(const bf16* from, int rows, int64_t stride, const Head& head) {
        bounded = pack_queries(from, rows, stride) * head.longest_key * C() <= LARGEST_BOUND;
        std::fill(largest, largest + QUERIES, -INFINITE);
        std::fill(spoiled, spoiled + QUERIES, false);
        std::memset(output, 0, sizeof output);
    }

    // A chunk of `count` keys and values, the first of which is `first`.
    void add(const Head& head, int64_t first, int64_t count) {
        const bf16* keys = head.keys + first / KEYS * Head::KEY_BLOCK;
        const bf16* values = head.values + first / KEYS * Head::VALUE_BLOCK;
        bounded ? add_chunk<true>(keys, values, count) : add_chunk<false>(keys, values, count);
    }

    void finish(bf16* to, int rows, int64_t stride) {
        for (int r = 0; r < rows; r++) {
            const float sum = output_row(r, Head::VALUE_TILES - 1)[TILE - 1];
            const __m512 inverse = _mm512_set1_ps(spoiled[r] ? std::nanf("") : 1 / sum);
            for (int t = 0; t < Head::PARTS; t++)
                store(to + r * stride + t * 16, _mm512_mul_ps(_mm512_load_ps(output_row(r, t)), inverse),
                      std::min(16, D - t * 16));
        }
    }
};

template <int D>
void attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, const Sizes& sizes) {
    using Head = Packed<D>;
    using Range = tbb::blocked_range<int64_t>;
    const int64_t stride = sizes.heads * D, heads = sizes.batch * sizes.heads;
    const int64_t key_blocks = ceil_div(sizes.keys, KEYS);
    // Kept for the thread's next call, as the system would clear new memory, which takes as long as packing.
    static thread_local Workspace workspace;
    bf16* const packed = workspace.at_least(heads * key_blocks * (Head::KEY_BLOCK + Head::VALUE_BLOCK));
    const std::unique_ptr<Head[]> all(new Head[heads]);
    for (int64_t head = 0; head < heads; head++) {
        all[head].keys = packed + head * key_blocks * Head::KEY_BLOCK;
        all[head].values = packed + (heads * Head::KEY_BLOCK + head * Head::VALUE_BLOCK) * key_blocks;
    }
    // Keys and values are packed once, for all queries, in the order in which they are in memory ...
    const std::unique_ptr<float[]> longest(new float[heads * key_blocks]);
    tbb::parallel_for(Range(0, sizes.batch * key_blocks, 1), [&](const Range& range) {
        for (int64_t number = range.begin(); number < range.end(); number++) {
            const int64_t sample = number / key_blocks, block = number % key_blocks;
            const int count = std::min<int64_t>(KEYS, sizes.keys - block * KEYS);
            for (int64_t head = sample * sizes.heads; head < (sample + 1) * sizes.heads; head++) {
                const int64_t at = (sample * sizes.keys + block * KEYS) * stride + head % sizes.heads * D;
                float& length = longest[head * key_blocks + block];
                length = pack_keys<D>(k + at, count, stride, all[head].keys + block * Head::KEY_BLOCK);
                pack_values<D>(v + at, count, stride, all[head].values + block * Head::VALUE_BLOCK);
            }
        }
    });
    for (int64_t head = 0; head < heads; head++) {
        const float* of_blocks = longest.get() + head * key_blocks;
        all[head].longest_key = std::sqrt(*std::max_element(of_blocks, of_blocks + key_blocks));
    }
    // ... then all groups of queries of all heads are shared out.
    const int64_t groups = ceil_div(sizes.queries, GROUP * QUERIES), grain = std::max<int64_t>(1, groups / 8);
    tbb::parallel_for(Range(0, heads * groups, grain), [&](const Range& range) {
        [[maybe_unused]] const Tiles tiles{};
        const auto blocks = allocate<Block<D>>(GROUP);
        for (int64_t number = range.begin(); number < range.end(); number++) {
            const int64_t head = number / groups, group = number % groups * GROUP * QUERIES;
            const int64_t at = head / sizes.heads * sizes.queries * stride + head % sizes.heads * D;
            const auto for_blocks = [&](const auto& work) {
                for (int64_t b = 0, row = group; b < GROUP && row < sizes.queries; b++, row += QUERIES)
                    work(blocks[b], at + row * stride, std::min<int64_t>(QUERIES, sizes.queries - row));
            };
            for_blocks([&](auto& block, int64_t row, int rows) { block.begin(q + row, rows, stride, all[head]); });
            for (int64_t first = 0; first < sizes.keys; first += CHUNK)
                for_blocks([&](auto& block, int64_t, int) {
                    block.add(all[head], first, std::min<int64_t>(CHUNK, sizes.keys - first));
                });
            for_blocks([&](auto& block, int64_t row, int rows) { block.finish(out + row, rows, stride); });
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
// is no kernel for this width, or if the system gives no tile registers.
extern "C" int attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, int64_t batch, int64_t queries,
                         int64_t keys, int64_t heads, int64_t width, int threads) {
    if (!tiles_allowed()) return 1;
    tbb::task_arena arena(threads);
    const Sizes sizes{batch, queries, keys, heads};
    const auto compute = [&](auto width) { attend<width()>(q, k, v, out, sizes); };
    return arena.execute([&] { return for_width(width, compute) ? 0 : 1; });
}
