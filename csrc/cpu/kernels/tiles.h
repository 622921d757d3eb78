// Matrix products by AMX tiles: 16 rows of 64 bytes. tdpbf16ps adds to 16 x 16 sums the product of 16 rows of 32 bfloat16 with
// 16 pairs of depths of 16 columns.
#pragma once

#include "cpu/kernels/pack.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr int64_t kTile = 16;          // rows of a tile, and columns of sums
constexpr int64_t kTileDepth = 32;     // bfloat16 in a row of a tile
constexpr int64_t kTileSums = 256;     // floats of a tile of sums
constexpr int64_t kTileFactors = 512;  // bfloat16 of a tile of factors

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are configured while this exists, and released afterwards: nobody else's use of them in this thread meets ours.
class Tiles {
 public:
  Tiles() {
    static constexpr TileConfiguration configuration;
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tiles of rows in a left operand. Distances in elements, but for those between rows, which are in bytes.
struct LeftTiles {
  const bf16* data;
  int64_t row_tile, depth_tile, row_bytes;
};

// Tiles of columns in a packed right operand: a column's tiles are adjacent.
struct RightTiles {
  const bf16* data;
  int64_t column_tile;
};

struct SumTiles {
  float* data;
  int64_t row_tile, column_tile, row_bytes;
};

// What is done beside a product: nothing.
struct Nothing {
  void operator()(int64_t) const {}
};

// sums = left right for kRows x kColumns tiles (1 or 2) over `steps` tiles of depth, added to what stands there if kAdd; `beside(step)`
// is done along with each.
template <int kRows, int kColumns, bool kAdd = false, class Beside = Nothing>
MADTP_INLINE void tile_product(const LeftTiles& left, const RightTiles& right, int64_t steps, const SumTiles& sums,
                               const Beside& beside = {}) {
  // The intrinsics for loading do not tell the compiler that they read memory.
  __asm__ volatile("" ::: "memory");
  if constexpr (kAdd) {
    _tile_loadd(0, sums.data, sums.row_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, sums.data + sums.column_tile, sums.row_bytes);
    if constexpr (kRows > 1) _tile_loadd(2, sums.data + sums.row_tile, sums.row_bytes);
    if constexpr (kRows > 1 && kColumns > 1) _tile_loadd(3, sums.data + sums.row_tile + sums.column_tile, sums.row_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns > 1) _tile_zero(1);
    if constexpr (kRows > 1) _tile_zero(2);
    if constexpr (kRows > 1 && kColumns > 1) _tile_zero(3);
  }
  const bf16* rows = left.data;
  const bf16* columns = right.data;
  for (int64_t step = 0; step < steps; ++step, rows += left.depth_tile, columns += kTileFactors) {
    _tile_loadd(4, rows, left.row_bytes);
    _tile_loadd(6, columns, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, columns + right.column_tile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      _tile_loadd(5, rows + left.row_tile, left.row_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    beside(step);
  }
  _tile_stored(0, sums.data, sums.row_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, sums.data + sums.column_tile, sums.row_bytes);
  if constexpr (kRows > 1) _tile_stored(2, sums.data + sums.row_tile, sums.row_bytes);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, sums.data + sums.row_tile + sums.column_tile, sums.row_bytes);
}

// The same for kRows tiles of rows and any number of tiles of columns.
template <int kRows, bool kAdd>
MADTP_INLINE void strip_product(const LeftTiles& left, RightTiles right, int64_t columns, int64_t steps, SumTiles sums) {
  int64_t column = 0;
  for (; column + 2 <= columns; column += 2) {
    tile_product<kRows, 2, kAdd>(left, right, steps, sums);
    right.data += 2 * right.column_tile;
    sums.data += 2 * sums.column_tile;
  }
  if (column < columns) tile_product<kRows, 1, kAdd>(left, right, steps, sums);
}

// The same for any number; `rows`, `columns` and `steps` in tiles.
template <bool kAdd = false>
MADTP_INLINE void tiles_product(LeftTiles left, const RightTiles& right, int64_t rows, int64_t columns, int64_t steps,
                                SumTiles sums) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    strip_product<2, kAdd>(left, right, columns, steps, sums);
    left.data += 2 * left.row_tile;
    sums.data += 2 * sums.row_tile;
  }
  if (row < rows) strip_product<1, kAdd>(left, right, columns, steps, sums);
}

MADTP_INLINE int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

MADTP_INLINE LeftTiles row_major_tiles(const LeftRows& left) {
  return {static_cast<const bf16*>(left.data), kTile * left.stride, kTileDepth,
          left.stride * static_cast<int64_t>(sizeof(bf16))};
}

MADTP_INLINE RightTiles packed_tiles(const void* right, int64_t depth) {
  return {static_cast<const bf16*>(right), tiles_of(depth, kTileDepth) * kTileFactors};
}

// See CpuKernels::product.
void product_by_tiles(const LeftRows& left, const void* right, int64_t columns, int64_t depth, const float* bias, float* c,
                      int64_t c_stride) {
  const Tiles tiles;
  const int64_t row_tiles = tiles_of(left.rows, kTile), column_tiles = tiles_of(columns, kTile);
  tiles_product(row_major_tiles(left), packed_tiles(right, depth), row_tiles, column_tiles, tiles_of(depth, kTileDepth),
                {c, kTile * c_stride, kTile, c_stride * static_cast<int64_t>(sizeof(float))});
  for (int64_t r = 0; r < left.rows; ++r) {
    float* row = c + r * c_stride;
    for (int64_t j = 0; j < columns; j += kLanes) store(row + j, load(row + j) + load(bias + j));
  }
}

// See CpuKernels::product_maximum.
void product_maximum_by_tiles(const LeftRows& left, const void* panel, int64_t columns, int64_t depth, float scale,
                              const float* bias, const float* row_offset, float* best, int64_t best_stride) {
  constexpr int64_t kRows = 2 * kTile, kStride = MADTP_ISA::kPanelVectors * kLanes;
  alignas(64) float sums[kRows * kStride];
  const Tiles tiles;
  const vf factor = broadcast(scale);
  LeftTiles rows = row_major_tiles(left);
  for (int64_t row = 0; row < left.rows; row += kRows, rows.data += 2 * rows.row_tile) {
    const int64_t count = smaller(kRows, left.rows - row);
    tiles_product(rows, packed_tiles(panel, depth), tiles_of(count, kTile), tiles_of(columns, kTile),
                  tiles_of(depth, kTileDepth), {sums, kTile * kStride, kTile, kStride * static_cast<int64_t>(sizeof(float))});
    for (int64_t r = 0; r < count; ++r) {
      const vf offset = broadcast(row_offset[row + r]);
      float* to = best + (row + r) * best_stride;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const vf value = fma(load(sums + r * kStride + j), factor, load(bias + j)) - offset;
        store(to + j, maximum_or_nan(value, load(to + j)));
      }
    }
  }
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
