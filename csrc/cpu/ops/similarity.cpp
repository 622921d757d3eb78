// Which tokens of a sample have alike keys.
//
//   cos(i, j) = <k_i, k_j> / (|k_i| |k_j|), 0 where a key is zero or not finite; among equal ones the first counts
//
// nearest_kept: for a dropped token the kept one with the largest cosine. novelty: 1 - the largest cosine to another token, or
// to those of higher rank. match_tokens: ToMe's pairs. All are one search: for each query of a list the best of a list of
// candidates, a tile of products at a time. Novelty with a rank searches the sorted sample, where a token's candidates are those
// before it. merge_scores turns such a novelty into what merging a token would cost, in double precision. find_redundant takes a
// sample through all steps while its keys are in the cache. A product's bits depend on the two rows only, so that a sample has the
// same result in any batch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/ops/merging.h"
#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/similarity.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kQueries = 96;      // of a work item
constexpr int64_t kBlock = 48;        // queries in a product, at most
constexpr int64_t kCandidates = 192;  // in a product: whole panels of every instruction set
constexpr int64_t kPackedRows = 64;   // candidates packed by a work item
constexpr int64_t kNormRows = 64;
constexpr int64_t kOwnBytes = int64_t{4} << 20;  // that a thread packs for itself at most
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Which candidates a query sees, by their places in the lists.
enum class Seen { all, others, earlier };

class Alike {
 public:
  // `inverse_norms` [C] float, of unit stride: what `inverse_norms()` of the same keys was; measured by `measure` if there is none.
  explicit Alike(const Tensor& keys, const OptionalTensor& inverse_norms = {})
      : kernels_(cpu_kernels()),
        data_(static_cast<const std::byte*>(keys.const_data_ptr())),
        type_(type_of("keys", keys)),
        factor_(factor_of(kernels_, type_)),
        width_(keys.size(1)),
        depth_(round_up(keys.size(1), layout_of(kernels_, factor_).depth)),
        block_(kBlock / (2 * layout_of(kernels_, factor_).rows) * 2 * layout_of(kernels_, factor_).rows),
        row_bytes_(keys.size(1) * keys.element_size()),
        row_stride_(keys.stride(0) * keys.element_size()),
        inverse_norms_(inverse_norms.has_value() ? *inverse_norms : at::empty({keys.size(0)}, keys.options().dtype(at::kFloat))),
        scale_(inverse_norms_.const_data_ptr<float>()) {}

  const Tensor& inverse_norms() const { return inverse_norms_; }

  // Calls run(b) for every sample, whose work is taken to grow as the square of its length. The longest are done one after the other,
  // by all threads between which a search is shared, as long as that is sooner done or they would pack much; each of the others by
  // one thread.
  template <class Run>
  void for_each_sample(const Offsets& offsets, const Run& run) const {
    const std::vector<int64_t> order = offsets.longest_first();
    const int64_t threads = at::get_num_threads();
    int64_t rest = 0, shared = 0;
    for (const int64_t b : order) rest += offsets.length(b) * offsets.length(b);
    for (; shared < offsets.samples; ++shared) {
      const int64_t n = offsets.length(order[shared]), alone = n * n, takers = std::min(threads, (n + kQueries - 1) / kQueries);
      if (n == 0) break;
      const int64_t rounds = (rest + alone * threads - 1) / (alone * threads);
      if (rest >= alone * rounds * takers && packed_bytes(n) <= kOwnBytes) break;
      run(order[shared]);
      rest -= alone;
    }
    for_each_item(offsets.samples - shared, [&](int64_t i) { run(order[shared + i]); });
  }

  // The inverse norms of rows [first, last).
  void measure(int64_t first, int64_t last) const {
    float* const scale = inverse_norms_.mutable_data_ptr<float>();
    for_each_item((last - first + kNormRows - 1) / kNormRows, [&](int64_t item) {
      const int64_t from = first + item * kNormRows, to = std::min(from + kNormRows, last);
      for (int64_t row = from; row < to; ++row) {
        const float square = kernels_.sum_of_squares(type_, data_ + row * row_stride_, width_);
        scale[row] = square > 0.0f && square < kInfinity ? 1.0f / std::sqrt(square) : 0.0f;
      }
    });
  }

  // For every query: nearest[row] = row of its best candidate, cosine[row] = their cosine; -1 and -inf if it sees none. Candidates
  // are packed once, and then met by all queries.
  void search(const std::vector<int64_t>& queries, const std::vector<int64_t>& candidates, Seen seen, int32_t* nearest,
              float* cosine) const {
    if (queries.empty()) return;
    const auto searching = static_cast<int64_t>(queries.size()), packing = static_cast<int64_t>(candidates.size());
    const Buffer packed(packed_bytes(packing));
    const Lists lists{queries, candidates, packed.at<std::byte>()};
    share_items((packing + kPackedRows - 1) / kPackedRows, [&](const auto& next) {
      const Buffer rows(kPackedRows * row_bytes_);
      for (int64_t c = next() * kPackedRows; c < packing; c = next() * kPackedRows) {
        pack_candidates(lists, c, std::min(c + kPackedRows, packing), rows);
      }
    });
    const int64_t items = (searching + kQueries - 1) / kQueries;
    share_items(items, [&](const auto& next) {
      const Scratch scratch(*this);
      for (int64_t i = next(); i < items; i = next()) {
        // Of a sorted sample the last queries see most: first, so that no thread waits for them at the end.
        const int64_t q = (seen == Seen::earlier ? items - 1 - i : i) * kQueries;
        search_queries(lists, q, std::min(q + kQueries, searching), scratch, seen, nearest, cosine);
      }
    });
  }

 private:
  // Rows of the batch, and memory for the candidates among them, followed by their scales.
  struct Lists {
    const std::vector<int64_t>&queries, &candidates;
    std::byte* packed;
  };

  // A thread's memory.
  struct Scratch {
    explicit Scratch(const Alike& of)
        : rows(kQueries * of.row_bytes_),
          left(kQueries * of.depth_ * factor_bytes(of.factor_)),
          products(kBlock * kCandidates * 4),
          zeros(kCandidates * 4) {
      std::fill_n(zeros.at<float>(), kCandidates, 0.0f);
    }
    Buffer rows, left, products, zeros;
  };

  int64_t scales_offset(int64_t candidates) const {
    return round_up(packed_size(layout_of(kernels_, factor_), candidates, width_) * factor_bytes(factor_), 64);
  }
  int64_t packed_bytes(int64_t candidates) const { return scales_offset(candidates) + round_up(candidates * 4, 64); }

  // Copies rows of a list side by side; a key without a direction becomes zero.
  RowsToLoad gather(const Buffer& rows, const int64_t* list, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      auto* const to = rows.at<std::byte>(i * row_bytes_);
      if (scale_[list[i]] == 0.0f) {
        std::memset(to, 0, static_cast<size_t>(row_bytes_));
      } else {
        std::memcpy(to, data_ + list[i] * row_stride_, static_cast<size_t>(row_bytes_));
      }
    }
    return {rows.at(), type_, width_, count, width_};
  }

  // Those of places [first, last).
  void pack_candidates(const Lists& lists, int64_t first, int64_t last, const Buffer& rows) const {
    const auto& list = lists.candidates;
    const auto candidates = static_cast<int64_t>(list.size());
    kernels_.pack_transposed(factor_, gather(rows, &list[first], last - first), first, candidates, lists.packed);
    auto* const scales = reinterpret_cast<float*>(lists.packed + scales_offset(candidates));
    for (int64_t c = first; c < last; ++c) scales[c] = scale_[list[c]];
  }

  // For those of places [first, last).
  void search_queries(const Lists& lists, int64_t first, int64_t last, const Scratch& scratch, Seen seen, int32_t* nearest,
                      float* cosine) const {
    float best[kQueries];
    int64_t place[kQueries];
    std::fill_n(best, kQueries, -kInfinity);
    std::fill_n(place, kQueries, -1);
    const auto candidates = static_cast<int64_t>(lists.candidates.size());
    const auto* const scales = reinterpret_cast<const float*>(lists.packed + scales_offset(candidates));
    kernels_.load_rows(factor_, gather(scratch.rows, &lists.queries[first], last - first), scratch.left.at(), depth_);
    for (int64_t column = 0; column < candidates; column += kCandidates) {
      for (int64_t q = first; q < last; q += block_) {
        const int64_t rows = std::min(block_, last - q);
        const int64_t end = seen == Seen::earlier ? std::min(candidates, q + rows - 1) : candidates;
        if (end <= column) continue;
        // Whole panels, as they were packed.
        const int64_t columns = std::min({kCandidates, round_up(end - column, kernels_.panel), candidates - column});
        const auto* const left = scratch.left.at<std::byte>((q - first) * depth_ * factor_bytes(factor_));
        float* const products = scratch.products.at<float>();
        kernels_.product(factor_, {left, depth_, rows}, lists.packed + column * depth_ * factor_bytes(factor_), columns, width_,
                         scratch.zeros.at<float>(), products, kCandidates);
        for (int64_t r = 0; r < rows; ++r) {
          float* const top = best + q - first + r;
          int64_t* const at = place + q - first + r;
          const auto look = [&](int64_t from, int64_t to) {
            const float* const row = products + r * kCandidates;
            const int64_t found = from < to ? kernels_.best_scaled(row + from, scales + column + from, to - from, top) : -1;
            if (found >= 0) *at = column + from + found;
          };
          const int64_t own = q + r - column;  // where the query itself would be among these candidates
          if (seen == Seen::all) {
            look(0, columns);
          } else {
            look(0, std::clamp<int64_t>(own, 0, columns));
            if (seen == Seen::others) look(std::clamp<int64_t>(own + 1, 0, columns), columns);
          }
        }
      }
    }
    for (int64_t q = first; q < last; ++q) {
      const int64_t row = lists.queries[q], at = place[q - first];
      nearest[row] = at < 0 ? -1 : static_cast<int32_t>(lists.candidates[at]);
      cosine[row] = at < 0 ? -kInfinity : std::clamp(best[q - first] * scale_[row], -1.0f, 1.0f);
    }
  }

  const CpuKernels& kernels_;
  const std::byte* data_;
  Type type_;
  Factor factor_;
  int64_t width_, depth_;
  int64_t block_;  // queries in a product: whole pairs of the kernel's tiles
  int64_t row_bytes_, row_stride_;
  Tensor inverse_norms_;  // 1 / |k|, 0 for a key without a direction; undefined beyond the last token
  const float* scale_;
};

// A number that is larger the smaller `value` is.
uint32_t falling(float value) {
  const float without_sign_of_zero = value + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &without_sign_of_zero, 4);
  return bits >> 31 != 0 ? bits : ~bits & 0x7fffffffu;
}

// 1 - the largest cosine of a token of a sample with those of higher rank (with others if `rank` is null), 2 without any; and the row
// that attains it. Its keys are measured.
void find_novelty(const Alike& alike, int64_t first, int64_t last, const float* rank, float* novelty, int32_t* nearest) {
  std::vector<int64_t> order(last - first);
  std::iota(order.begin(), order.end(), first);
  if (rank != nullptr) {
    std::vector<uint64_t> places;  // the rank, turned to rise where it falls, and the place, in one number to compare
    places.reserve(order.size());
    for (const int64_t row : order) places.push_back(uint64_t{falling(rank[row])} << 32 | static_cast<uint64_t>(row - first));
    std::sort(places.begin(), places.end());
    for (size_t i = 0; i < places.size(); ++i) order[i] = first + static_cast<int64_t>(places[i] & 0xffffffffu);
  }
  alike.measure(first, last);
  alike.search(order, order, rank == nullptr ? Seen::others : Seen::earlier, nearest, novelty);
  for (int64_t row = first; row < last; ++row) novelty[row] = novelty[row] == -kInfinity ? 2.0f : 1.0f - novelty[row];
}

// The rows [first, last) of a sample, each into itself, or if it looks (null: if it does not stay) into the nearest that stays.
void find_kept(const Alike& alike, int64_t first, int64_t last, const bool* stays, const bool* looks, int32_t* into, float* cosine) {
  std::vector<int64_t> queries, candidates;
  for (int64_t row = first; row < last; ++row) {
    into[row] = static_cast<int32_t>(row);
    if (stays[row]) {
      candidates.push_back(row);
    } else if (looks == nullptr || looks[row]) {
      queries.push_back(row);
    }
  }
  alike.search(queries, candidates, Seen::all, into, cosine);
}

Tensor values_of(const char* name, const Tensor& values, int64_t capacity, at::ScalarType dtype = at::kFloat) {
  check_operand(name, values, {capacity}, dtype);
  return values.contiguous();
}

// A power takes as long as the cosines of a small sample; most sizes are 1, and the usual exponent is a quarter.
double power(double base, double exponent) {
  if (exponent == 1.0 || base == 1.0) return base;
  if (exponent == 0.25 && base > 0.0) return std::sqrt(std::sqrt(base));
  return std::pow(base, exponent);
}

// Operands and results of merge_scores.
struct MergeScores {
  MergeScores(const Tensor& keys, const Tensor& order, const OptionalTensor& weight, const OptionalTensor& sizes, const Tensor& free,
              const Tensor& cu_seqlens, const MergeExponents& exponents)
      : offsets("cu_seqlens", cu_seqlens, keys.size(0)),
        order(values_of("order", order, keys.size(0))),
        weight(weight.has_value() ? values_of("weight", *weight, keys.size(0)) : this->order),
        sizes(sizes.has_value() ? values_of("sizes", *sizes, keys.size(0)) : Tensor()),
        free(values_of("free", free, keys.size(0), at::kBool)),
        exponents(exponents),
        alike(keys),
        rank(at::empty_like(this->order)),
        nearest(at::empty({keys.size(0)}, cu_seqlens.options())),
        scores(at::empty_like(this->order)),
        novelty(at::empty_like(this->order)) {}

  // The scores of sample b.
  void score(int64_t b) const {
    const int64_t start = offsets.start(b), end = start + offsets.length(b);
    const bool* const may = free.const_data_ptr<bool>();
    const float *const orders = order.const_data_ptr<float>(), *const weights = weight.const_data_ptr<float>();
    const float* const size = sizes.defined() && exponents.size != 0.0 ? sizes.const_data_ptr<float>() : nullptr;
    float *const ranks = rank.mutable_data_ptr<float>(), *const novelties = novelty.mutable_data_ptr<float>();
    float* const worths = scores.mutable_data_ptr<float>();
    double total = 0.0;
    int64_t number = 0;
    for (int64_t row = start; row < end; ++row) {
      ranks[row] = may[row] ? orders[row] : -1.0f;
      if (!may[row]) continue;
      total += weights[row];
      ++number;
    }
    const double mean = total / static_cast<double>(number);
    find_novelty(alike, start, end, ranks, novelties, nearest.mutable_data_ptr<int32_t>());
    for (int64_t row = start; row < end; ++row) {
      worths[row] = 0.0f;
      if (!may[row]) continue;
      double worth = power(weights[row] / mean, exponents.weight) * power(novelties[row], exponents.novelty);
      if (size != nullptr) worth *= power(size[row], exponents.size);
      if (!std::isnan(worth)) worths[row] = static_cast<float>(std::min<double>(worth, std::numeric_limits<float>::max()));
    }
  }

  Offsets offsets;
  Tensor order, weight, sizes, free;
  MergeExponents exponents;
  Alike alike;
  Tensor rank, nearest;  // memory of the search
  Tensor scores, novelty;
};

}  // namespace

Tensor nearest_kept(const Tensor& keys, const Tensor& kept, const Tensor& cu_seqlens, int64_t, const OptionalTensor& goes,
                    const OptionalTensor& inverse_norms) {
  check_rows("keys", keys, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, keys.size(0));
  check_operand("kept", kept, {keys.size(0)}, at::kBool);
  check_operand("goes", goes, {keys.size(0)}, at::kBool);
  check_operand("inverse_norms", inverse_norms, {keys.size(0)}, at::kFloat);
  const Tensor goes_dense = goes.has_value() ? goes->contiguous() : Tensor();
  const bool* const looks = goes.has_value() ? goes_dense.const_data_ptr<bool>() : nullptr;
  OptionalTensor norms_dense;
  if (inverse_norms.has_value()) norms_dense = inverse_norms->contiguous();
  const Tensor kept_dense = kept.contiguous();
  const bool* const stays = kept_dense.const_data_ptr<bool>();
  Tensor into = at::empty({keys.size(0)}, cu_seqlens.options());
  int32_t* const rows = into.mutable_data_ptr<int32_t>();
  std::vector<float> cosine(offsets.total());
  const Alike alike(keys, norms_dense);
  alike.for_each_sample(offsets, [&](int64_t b) {
    const int64_t first = offsets.start(b), last = first + offsets.length(b);
    if (!inverse_norms.has_value()) alike.measure(first, last);
    find_kept(alike, first, last, stays, looks, rows, cosine.data());
  });
  return into;
}

std::tuple<Tensor, Tensor> novelty(const Tensor& keys, const OptionalTensor& rank, const Tensor& cu_seqlens, int64_t) {
  check_rows("keys", keys, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, keys.size(0));
  check_operand("rank", rank, {keys.size(0)}, at::kFloat);
  const Tensor rank_dense = rank.has_value() ? rank->contiguous() : Tensor();
  Tensor result = at::empty({keys.size(0)}, keys.options().dtype(at::kFloat));
  Tensor nearest = at::empty({keys.size(0)}, cu_seqlens.options());
  const float* const ranks = rank.has_value() ? rank_dense.const_data_ptr<float>() : nullptr;
  float* const novelties = result.mutable_data_ptr<float>();
  int32_t* const rows = nearest.mutable_data_ptr<int32_t>();
  const Alike alike(keys);
  alike.for_each_sample(offsets, [&](int64_t b) {
    find_novelty(alike, offsets.start(b), offsets.start(b) + offsets.length(b), ranks, novelties, rows);
  });
  return {result, nearest};
}

std::tuple<Tensor, Tensor, Tensor> merge_scores(const Tensor& keys, const Tensor& order, const OptionalTensor& weight,
                                                const OptionalTensor& sizes, const Tensor& free, const Tensor& cu_seqlens,
                                                int64_t, double weight_exponent, double novelty_exponent, double size_exponent) {
  check_rows("keys", keys, 2);
  const MergeScores costs(keys, order, weight, sizes, free, cu_seqlens, {weight_exponent, novelty_exponent, size_exponent});
  costs.alike.for_each_sample(costs.offsets, [&](int64_t b) { costs.score(b); });
  return {costs.scores, costs.novelty, costs.alike.inverse_norms()};
}

std::tuple<Tensor, Tensor> find_redundant(const Tensor& keys, const Tensor& order, const OptionalTensor& weight,
                                          const OptionalTensor& sizes, const Tensor& free, const Tensor& cu_seqlens,
                                          const MergeExponents& exponents, const Choice& choice) {
  check_rows("keys", keys, 2);
  const MergeScores costs(keys, order, weight, sizes, free, cu_seqlens, exponents);
  const Tensor goes = at::empty({keys.size(0)}, free.options()), stays = at::empty_like(goes);
  Tensor into = at::empty({keys.size(0)}, cu_seqlens.options());
  bool *const leaves = goes.mutable_data_ptr<bool>(), *const kept = stays.mutable_data_ptr<bool>();
  int32_t* const rows = into.mutable_data_ptr<int32_t>();
  const bool* const may = costs.free.const_data_ptr<bool>();
  const float* const score = costs.scores.const_data_ptr<float>();
  std::vector<float> cosine(costs.offsets.total());
  costs.alike.for_each_sample(costs.offsets, [&](int64_t b) {
    const int64_t first = costs.offsets.start(b), last = first + costs.offsets.length(b);
    costs.score(b);
    choice.choose(b, first, last, score, may, leaves);
    for (int64_t row = first; row < last; ++row) kept[row] = may[row] && !leaves[row];
    find_kept(costs.alike, first, last, kept, leaves, rows, cosine.data());
  });
  return {costs.scores, into};
}

std::tuple<Tensor, Tensor> match_tokens(const Tensor& keys, const Tensor& cu_seqlens, int64_t, const OptionalTensor& count,
                                        std::optional<double> threshold, int64_t first_free) {
  check_rows("keys", keys, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, keys.size(0));
  check_operand("count", count, {offsets.samples}, at::kInt);
  TORCH_CHECK_VALUE(first_free >= 0, "first_free: expected a number >= 0, got ", first_free);
  const Tensor count_dense = count.has_value() ? count->contiguous() : Tensor();
  const int32_t* const counts = count.has_value() ? count_dense.const_data_ptr<int32_t>() : nullptr;
  Tensor into = at::empty({keys.size(0)}, cu_seqlens.options());
  Tensor similarity = at::empty({keys.size(0)}, keys.options().dtype(at::kFloat));
  int32_t* const rows = into.mutable_data_ptr<int32_t>();
  float* const cosine = similarity.mutable_data_ptr<float>();
  const Alike alike(keys);
  alike.for_each_sample(offsets, [&](int64_t b) {
    const int64_t start = offsets.start(b), end = start + offsets.length(b);
    std::vector<int64_t> sources, targets;
    for (int64_t j = first_free; j < offsets.length(b); ++j) (j % 2 == 0 ? sources : targets).push_back(start + j);
    std::fill(cosine + start, cosine + end, -kInfinity);
    alike.measure(start, end);
    alike.search(sources, targets, Seen::all, rows, cosine);
    int64_t most = std::max<int64_t>(0, offsets.length(b) - first_free) / 2;
    if (counts != nullptr) most = std::clamp<int64_t>(counts[b], 0, most);
    const auto before = [cosine](int64_t a, int64_t c) { return cosine[a] != cosine[c] ? cosine[a] > cosine[c] : a < c; };
    std::nth_element(sources.begin(), sources.begin() + most, sources.end(), before);
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t row = sources[i];
      const bool matched = static_cast<int64_t>(i) < most && (!threshold.has_value() || cosine[row] > *threshold);
      if (!matched) rows[row] = static_cast<int32_t>(row);
    }
    const auto stay = [&](int64_t row) { rows[row] = static_cast<int32_t>(row); };
    for (const int64_t row : targets) stay(row);
    for (int64_t row = start; row < start + std::min(first_free, end - start); ++row) stay(row);
  });
  return {into, similarity};
}

}  // namespace madtp::cpu
