// Linear layers: a block of output features times a panel of tokens, with bias, activation and residual sum at the end.
//
// The weights are read where they lie, as the left operand [features, depth]; the tokens are packed, as the right one. So a
// product gives features x tokens, which is turned while it is finished.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/pack.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/tiles.h"
#endif

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr float kLog2OfE = 1.4426950408889634f;

// x / y, and 1 / (1 + e^-z) without overflow: e^-|z| is at most 1.
MADTP_INLINE vf sigmoid(vf z) {
  const vf e = exp2(broadcast(-kLog2OfE) * magnitude(z));
  const vf part = broadcast(1.0f) / (broadcast(1.0f) + e);
  return where_negative(z, e * part, part);
}

// z Phi(z). erfc(x) = e^(-x^2) P(1 / (1 + 0.39 x)) for x >= 0, to 1.4e-8 absolute; the small side of Phi is computed, so that
// far from zero all of z or nothing is left.
MADTP_INLINE vf gelu(vf z) {
  constexpr float kTerms[6] = {-0.225776531852663f, 0.879621652603599f,  -0.6242104313972976f,
                               0.6407341167821803f, 0.0948427418411042f, 0.23478851914717364f};
  const vf x = magnitude(z) * broadcast(0.70710678118654752f);
  const vf t = broadcast(1.0f) / fma(broadcast(0.39f), x, broadcast(1.0f));
  vf p = broadcast(kTerms[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, t, broadcast(kTerms[i]));
  const vf small = broadcast(0.5f) * p * t * exp2(broadcast(-kLog2OfE) * x * x);
  return z * where_negative(z, small, broadcast(1.0f) - small);
}

MADTP_INLINE vf activate(Activation activation, vf z) {
  switch (activation) {
    case Activation::gelu: return gelu(z);
    case Activation::gelu_tanh:  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
      return z * sigmoid(broadcast(1.5957691216057308f) * fma(broadcast(0.044715f) * z * z, z, z));
    case Activation::quick_gelu: return z * sigmoid(broadcast(1.702f) * z);
    case Activation::silu: return z * sigmoid(z);
    default: return z;
  }
}

// At most `count` of the block's tokens, from `token` on; of what they are read from, only the residual.
MADTP_INLINE LinearBlock tokens_of(const LinearBlock& block, int64_t token, int64_t count, int64_t bytes) {
  LinearBlock part = block;
  part.tokens = smaller(count, block.tokens - token);
  part.out = static_cast<char*>(block.out) + token * block.out_stride * bytes;
  if (block.residual != nullptr) {
    part.residual = static_cast<const char*>(block.residual) + token * block.residual_stride * bytes;
  }
  return part;
}

// Asks for what a product will be finished with and into: rows that lie too far apart for the processor to foresee them.
MADTP_INLINE void prefetch_ends(const LinearBlock& block, int64_t bytes) {
  for (int64_t token = 0; token < block.tokens; ++token) {
    const auto* out = static_cast<const char*>(block.out) + token * block.out_stride * bytes;
    for (int64_t i = 0; i < block.features * bytes; i += 64) __builtin_prefetch(out + i, 1, 2);
    if (block.residual == nullptr) continue;
    const auto* residual = static_cast<const char*>(block.residual) + token * block.residual_stride * bytes;
    for (int64_t i = 0; i < block.features * bytes; i += 64) __builtin_prefetch(residual + i, 0, 2);
  }
}

// Finishes products [features, tokens] of whole vectors: turned, with bias, activation and residual, into rows of `out`.
template <Activation kActivation, class T>
MADTP_INLINE void finish_linear(const LinearBlock& block, const float* products, int64_t stride) {
  alignas(64) uint32_t turned[kLanes * kLanes];
  for (int64_t token = 0; token < block.tokens; token += kLanes) {
    for (int64_t feature = 0; feature < block.features; feature += kLanes) {
      transpose_square(products + feature * stride + token, stride * 4, turned, kLanes);
      const int64_t given = smaller(kLanes, block.features - feature), rows = smaller(kLanes, block.tokens - token);
      const vf bias = block.bias == nullptr ? broadcast(0.0f) : load(block.bias + feature);
      const auto* residual = static_cast<const T*>(block.residual) + token * block.residual_stride + feature;
      auto* out = static_cast<T*>(block.out) + token * block.out_stride + feature;
      for (int64_t r = 0; r < rows; ++r, residual += block.residual_stride, out += block.out_stride) {
        vf z = activate(kActivation, load(reinterpret_cast<const float*>(turned) + r * kLanes) + bias);
        if (given == kLanes) {
          if (block.residual != nullptr) z = z + load(residual);
          store(out, z);
        } else {
          if (block.residual != nullptr) z = z + load_n(residual, given);
          store_n(out, z, given);
        }
      }
    }
  }
}

template <class T>
MADTP_INLINE void finish_linear(const LinearBlock& block, const float* products, int64_t stride) {
  switch (block.activation) {
    case Activation::gelu: return finish_linear<Activation::gelu, T>(block, products, stride);
    case Activation::gelu_tanh: return finish_linear<Activation::gelu_tanh, T>(block, products, stride);
    case Activation::quick_gelu: return finish_linear<Activation::quick_gelu, T>(block, products, stride);
    case Activation::silu: return finish_linear<Activation::silu, T>(block, products, stride);
    default: return finish_linear<Activation::none, T>(block, products, stride);
  }
}

constexpr int64_t kFeatures = 48;  // at most, of a block: whole tall tiles and whole vectors

// See CpuKernels::linear.
template <class Product, class T>
void linear(const LinearBlock& block) {
  constexpr int64_t kStride = kLinearVectors * kLanes;
  alignas(64) float products[kFeatures * kStride];
  const LeftRows left{block.weight, block.weight_stride, block.features};
  const auto* panel = static_cast<const typename Product::element*>(block.packed);
  const int64_t steps = (block.depth + Product::kDepth - 1) / Product::kDepth;
  for (int64_t token = 0; token < block.tokens; token += kStride, panel += kStride * steps * Product::kDepth) {
    const LinearBlock part = tokens_of(block, token, kStride, sizeof(T));
    prefetch_ends(part, sizeof(T));
    any_panel_product<Product>(left, panel, (part.tokens + kLanes - 1) / kLanes, steps,
                               [&](int64_t row, int v, vf sum) { store(products + row * kStride + v * kLanes, sum); });
    finish_linear<T>(part, products, kStride);
  }
}

#if defined(__AMX_BF16__)

// Sums of 32 or 16 features and of 32 or 16 tokens, in rows of 32 floats. `next` (or null): as many weights, needed soon.
template <int kRows, int kColumns>
MADTP_INLINE void linear_tiles(const LinearBlock& block, const bf16* tokens, const uint8_t* next, float* sums) {
  const LeftTiles left = row_major_tiles({block.weight, block.weight_stride, block.features});
  const RightTiles right = packed_tiles(tokens, block.depth);
  const int64_t steps = tiles_of(block.depth, kTileDepth);
  const SumTiles to{sums, kTile * 32, kTile, 128};
  if (next == nullptr) return tile_product<kRows, kColumns>(left, right, steps, to);
  tile_product<kRows, kColumns>(left, right, steps, to, [&](int64_t step) {
#pragma GCC unroll 32
    for (int64_t r = 0; r < kRows * kTile; ++r) __builtin_prefetch(next + r * left.row_bytes + step * 64, 0, 2);
  });
}

// See CpuKernels::linear.
void linear_by_tiles(const LinearBlock& block) {
  const Tiles configured;
  alignas(64) float sums[32 * 32];
  const auto* tokens = static_cast<const bf16*>(block.packed);
  const auto* next = static_cast<const uint8_t*>(block.next_weight);
  for (int64_t token = 0; token < block.tokens; token += 2 * kTile) {
    const LinearBlock part = tokens_of(block, token, 2 * kTile, sizeof(bf16));
    const bool two_rows = part.features > kTile, two_columns = part.tokens > kTile;
    if (two_rows) two_columns ? linear_tiles<2, 2>(part, tokens, next, sums) : linear_tiles<2, 1>(part, tokens, next, sums);
    else two_columns ? linear_tiles<1, 2>(part, tokens, nullptr, sums) : linear_tiles<1, 1>(part, tokens, nullptr, sums);
    finish_linear<bf16>(part, sums, 32);
    tokens += 2 * tiles_of(block.depth, kTileDepth) * kTileFactors;
    next = nullptr;
  }
}

#endif

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
