// AMX's tile instructions in plain C++, so that a CPU without AMX can test what amx_attention.cpp does with them: after
// Intel's Software Developer's Manual, LDTILECFG, STTILECFG, TILELOADD, TILESTORED, TILEZERO and TDPBF16PS, for tiles of
// 16 rows of 64 bytes.

#pragma once

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
    alignas(64) uint8_t bytes[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local uint8_t shapes[64];  // palette, start row, 14 zeros, 16 x bytes per row, 16 x rows

inline void need_configuration() {
    bool full = shapes[0] == 1;
    for (int tile = 0; tile < 8; tile++)
        full = full && shapes[16 + 2 * tile] == 64 && shapes[17 + 2 * tile] == 0 && shapes[48 + tile] == 16;
    if (!full) __builtin_trap();  // as the CPU would
}

inline void load(int tile, const void* from, int64_t stride) {
    need_configuration();
    for (int row = 0; row < 16; row++)
        std::memcpy(tiles[tile].bytes[row], static_cast<const uint8_t*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
    need_configuration();
    for (int row = 0; row < 16; row++)
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile].bytes[row], 64);
}

inline float single(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void multiply_add(int sum, int first, int second) {
    need_configuration();
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 16; column++) {
            float value;
            std::memcpy(&value, tiles[sum].bytes[row] + 4 * column, 4);
            for (int pair = 0; pair < 16; pair++) {
                uint16_t a[2], b[2];
                std::memcpy(a, tiles[first].bytes[row] + 4 * pair, 4);
                std::memcpy(b, tiles[second].bytes[pair] + 4 * column, 4);
                value += single(a[0]) * single(b[0]);
                value += single(a[1]) * single(b[1]);
            }
            std::memcpy(tiles[sum].bytes[row] + 4 * column, &value, 4);
        }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_zero
#define _tile_loadconfig(from) std::memcpy(emulated::shapes, from, 64)
#define _tile_storeconfig(to) std::memcpy(to, emulated::shapes, 64)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sum, first, second) emulated::multiply_add(sum, first, second)
#define _tile_zero(tile) std::memset(&emulated::tiles[tile], 0, sizeof(emulated::Tile))
