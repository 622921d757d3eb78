// Which tokens of a sample have alike keys.
//
//   cos(i, j) = <k_i, k_j> / (|k_i| |k_j|), 0 where a key is zero or not finite; among equal ones the first counts
//
// nearest_kept: for a dropped token the kept one with the largest cosine. novelty: 1 - the largest cosine to another token, or
// to those of higher rank. match_tokens: ToMe's pairs. All are one search: for each query of a list the best of a list of
// candidates, a tile of products at a time. Novelty with a rank searches the sorted sample, where a token's candidates are those
// before it. merge_scores turns such a novelty into what merging a token would cost, in double precision. A product's bits depend
// on the two rows only, so that a sample has the same result in any batch.
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kQueries = 96;      // of a work item
constexpr int64_t kBlock = 48;        // queries in a product, at most
constexpr int64_t kCandidates = 192;  // in a product: whole panels of every instruction set
constexpr int64_t kPackedRows = 64;   // candidates packed by a work item
constexpr int64_t kPackedBytes = int64_t{2} << 20;  // packed at a time, for each thread: what its cache keeps
constexpr int64_t kNormRows = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A sample's lists, as rows of the batch.
struct Search {
  std::vector<int64_t> queries, candidates;
};

// Which candidates a query sees, by their places in the lists.
enum class Seen { all, others, earlier };

class Alike {
 public:
  // `inverse_norms` [C] float, of unit stride: what `inverse_norms()` of the same keys was.
  explicit Alike(const Tensor& keys, const Offsets& offsets, const OptionalTensor& inverse_norms = {})
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
        scale_(inverse_norms_.const_data_ptr<float>()) {
    if (inverse_norms.has_value()) return;
    float* const scale = inverse_norms_.mutable_data_ptr<float>();
    for_each_item((offsets.total() + kNormRows - 1) / kNormRows, [&](int64_t item) {
      const int64_t last = std::min((item + 1) * kNormRows, offsets.total());
      for (int64_t row = item * kNormRows; row < last; ++row) {
        const float square = kernels_.sum_of_squares(type_, data_ + row * row_stride_, width_);
        scale[row] = square > 0.0f && square < kInfinity ? 1.0f / std::sqrt(square) : 0.0f;
      }
    });
  }

  const Tensor& inverse_norms() const { return inverse_norms_; }

  // For every query of searches[b]: nearest[row] = row of its best candidate, cosine[row] = their cosine; -1 and -inf if it
  // sees none. Candidates are packed once, as many samples together as the threads' caches keep, and then met by all queries.
  void run(const std::vector<Search>& searches, Seen seen, int32_t* nearest, float* cosine) const {
    const int64_t most = kPackedBytes * at::get_num_threads();
    for (size_t first = 0, last = 0; first < searches.size(); first = last) {
      std::vector<int64_t> place;  // of a search's candidates, in bytes
      int64_t bytes = 0;
      for (; last < searches.size() && (last == first || bytes < most); ++last) {
        place.push_back(bytes);
        if (!searches[last].queries.empty()) bytes += packed_bytes(static_cast<int64_t>(searches[last].candidates.size()));
      }
      const Buffer packed(bytes);
      std::vector<Item> packing, searching;
      for (size_t s = first; s < last; ++s) {
        const auto queries = static_cast<int64_t>(searches[s].queries.size());
        const auto candidates = static_cast<int64_t>(searches[s].candidates.size());
        auto* const memory = packed.at<std::byte>(place[s - first]);
        if (queries == 0) continue;
        for (int64_t c = 0; c < candidates; c += kPackedRows) {
          packing.push_back({&searches[s], memory, c, std::min(c + kPackedRows, candidates)});
        }
        for (int64_t q = 0; q < queries; q += kQueries) {
          searching.push_back({&searches[s], memory, q, std::min(q + kQueries, queries)});
        }
      }
      share_items(static_cast<int64_t>(packing.size()), [&](const auto& next) {
        const Buffer rows(kPackedRows * row_bytes_);
        for (size_t i = next(); i < packing.size(); i = next()) pack(packing[i], rows);
      });
      // Of a sorted sample the last queries see most: first, so that no thread waits for them at the end.
      if (seen == Seen::earlier) std::reverse(searching.begin(), searching.end());
      share_items(static_cast<int64_t>(searching.size()), [&](const auto& next) {
        const Scratch scratch(*this);
        for (size_t i = next(); i < searching.size(); i = next()) search(scratch, searching[i], seen, nearest, cosine);
      });
    }
  }

 private:
  // Some candidates to pack, or queries to search for, by their places in the lists of a search.
  struct Item {
    const Search* lists;
    std::byte* packed;  // the candidates of this search, followed by their scales
    int64_t first, last;
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

  void pack(const Item& item, const Buffer& rows) const {
    const auto& list = item.lists->candidates;
    const auto candidates = static_cast<int64_t>(list.size());
    kernels_.pack_transposed(factor_, gather(rows, &list[item.first], item.last - item.first), item.first, candidates, item.packed);
    auto* const scales = reinterpret_cast<float*>(item.packed + scales_offset(candidates));
    for (int64_t c = item.first; c < item.last; ++c) scales[c] = scale_[list[c]];
  }

  void search(const Scratch& scratch, const Item& item, Seen seen, int32_t* nearest, float* cosine) const {
    float best[kQueries];
    int64_t place[kQueries];
    std::fill_n(best, kQueries, -kInfinity);
    std::fill_n(place, kQueries, -1);
    const Search& lists = *item.lists;
    const auto candidates = static_cast<int64_t>(lists.candidates.size());
    const auto* const scales = reinterpret_cast<const float*>(item.packed + scales_offset(candidates));
    kernels_.load_rows(factor_, gather(scratch.rows, &lists.queries[item.first], item.last - item.first), scratch.left.at(), depth_);
    for (int64_t column = 0; column < candidates; column += kCandidates) {
      for (int64_t q = item.first; q < item.last; q += block_) {
        const int64_t rows = std::min(block_, item.last - q);
        const int64_t end = seen == Seen::earlier ? std::min(candidates, q + rows - 1) : candidates;
        if (end <= column) continue;
        // Whole panels, as they were packed.
        const int64_t columns = std::min({kCandidates, round_up(end - column, kernels_.panel), candidates - column});
        const auto* const left = scratch.left.at<std::byte>((q - item.first) * depth_ * factor_bytes(factor_));
        float* const products = scratch.products.at<float>();
        kernels_.product(factor_, {left, depth_, rows}, item.packed + column * depth_ * factor_bytes(factor_), columns, width_,
                         scratch.zeros.at<float>(), products, kCandidates);
        for (int64_t r = 0; r < rows; ++r) {
          float* const top = best + q - item.first + r;
          int64_t* const at = place + q - item.first + r;
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
    for (int64_t q = item.first; q < item.last; ++q) {
      const int64_t row = lists.queries[q], at = place[q - item.first];
      nearest[row] = at < 0 ? -1 : static_cast<int32_t>(lists.candidates[at]);
      cosine[row] = at < 0 ? -kInfinity : std::clamp(best[q - item.first] * scale_[row], -1.0f, 1.0f);
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

// 1 - the largest cosine of a token with those of higher rank (with others of its sample if `rank` is null), 2 without any; and
// the row that attains it. Returns 1 / |k|.
Tensor find_novelty(const Tensor& keys, const Offsets& offsets, const float* rank, float* novelty, int32_t* nearest) {
  std::vector<Search> searches(offsets.samples);
  for_each_item(offsets.samples, [&](int64_t b) {
    auto& order = searches[b].queries;
    order.resize(offsets.length(b));
    std::iota(order.begin(), order.end(), offsets.start(b));
    if (rank != nullptr) {
      std::vector<std::pair<float, int64_t>> ranked;  // beside their rows, so that a comparison reads one place
      ranked.reserve(order.size());
      for (const int64_t row : order) ranked.emplace_back(rank[row], row);
      std::stable_sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& c) { return a.first > c.first; });
      std::transform(ranked.begin(), ranked.end(), order.begin(), [](const auto& token) { return token.second; });
    }
    searches[b].candidates = order;
  });
  const Alike alike(keys, offsets);
  alike.run(searches, rank == nullptr ? Seen::others : Seen::earlier, nearest, novelty);
  for (int64_t row = 0; row < offsets.total(); ++row) novelty[row] = novelty[row] == -kInfinity ? 2.0f : 1.0f - novelty[row];
  return alike.inverse_norms();
}

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
  std::vector<Search> searches(offsets.samples);
  for_each_item(offsets.samples, [&](int64_t b) {
    for (int64_t row = offsets.start(b); row < offsets.start(b) + offsets.length(b); ++row) {
      rows[row] = static_cast<int32_t>(row);
      if (stays[row]) {
        searches[b].candidates.push_back(row);
      } else if (looks == nullptr || looks[row]) {
        searches[b].queries.push_back(row);
      }
    }
  });
  std::vector<float> cosine(offsets.total());
  Alike(keys, offsets, norms_dense).run(searches, Seen::all, rows, cosine.data());
  return into;
}

std::tuple<Tensor, Tensor> novelty(const Tensor& keys, const OptionalTensor& rank, const Tensor& cu_seqlens, int64_t) {
  check_rows("keys", keys, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, keys.size(0));
  check_operand("rank", rank, {keys.size(0)}, at::kFloat);
  const Tensor rank_dense = rank.has_value() ? rank->contiguous() : Tensor();
  Tensor result = at::empty({keys.size(0)}, keys.options().dtype(at::kFloat));
  Tensor nearest = at::empty({keys.size(0)}, cu_seqlens.options());
  find_novelty(keys, offsets, rank.has_value() ? rank_dense.const_data_ptr<float>() : nullptr,
               result.mutable_data_ptr<float>(), nearest.mutable_data_ptr<int32_t>());
  return {result, nearest};
}

std::tuple<Tensor, Tensor, Tensor> merge_scores(const Tensor& keys, const Tensor& order, const OptionalTensor& weight,
                                                const OptionalTensor& sizes, const Tensor& free, const Tensor& cu_seqlens,
                                                int64_t, double weight_exponent, double novelty_exponent,
                                                double size_exponent) {
  check_rows("keys", keys, 2);
  const int64_t capacity = keys.size(0);
  const Offsets offsets("cu_seqlens", cu_seqlens, capacity);
  check_operand("order", order, {capacity}, at::kFloat);
  check_operand("weight", weight, {capacity}, at::kFloat);
  check_operand("sizes", sizes, {capacity}, at::kFloat);
  check_operand("free", free, {capacity}, at::kBool);
  const Tensor order_dense = order.contiguous(), free_dense = free.contiguous();
  const Tensor weight_dense = weight.has_value() ? weight->contiguous() : order_dense;
  const Tensor sizes_dense = sizes.has_value() ? sizes->contiguous() : Tensor();
  const bool* const may = free_dense.const_data_ptr<bool>();
  const float* const orders = order_dense.const_data_ptr<float>();
  const float* const weights = weight_dense.const_data_ptr<float>();
  const float* const size = sizes.has_value() ? sizes_dense.const_data_ptr<float>() : nullptr;
  Tensor scores = at::empty({capacity}, order.options()), result = at::empty({capacity}, order.options());
  Tensor nearest = at::empty({capacity}, cu_seqlens.options());
  float* const score = scores.mutable_data_ptr<float>();
  float* const novelties = result.mutable_data_ptr<float>();
  std::vector<float> rank(offsets.total());
  for (int64_t row = 0; row < offsets.total(); ++row) rank[row] = may[row] ? orders[row] : -1.0f;
  const Tensor inverse_norms = find_novelty(keys, offsets, rank.data(), novelties, nearest.mutable_data_ptr<int32_t>());
  // A power takes as long as the cosines of a small sample; most sizes are 1, and the usual exponent is a quarter.
  const auto power = [](double base, double exponent) {
    if (exponent == 1.0 || base == 1.0) return base;
    if (exponent == 0.25 && base > 0.0) return std::sqrt(std::sqrt(base));
    return std::pow(base, exponent);
  };
  for_each_item(offsets.samples, [&](int64_t b) {
    const int64_t start = offsets.start(b), end = start + offsets.length(b);
    double total = 0.0;
    int64_t number = 0;
    for (int64_t row = start; row < end; ++row) {
      if (!may[row]) continue;
      total += weights[row];
      ++number;
    }
    const double mean = total / static_cast<double>(number);
    for (int64_t row = start; row < end; ++row) {
      score[row] = 0.0f;
      if (!may[row]) continue;
      double worth = power(weights[row] / mean, weight_exponent) * power(novelties[row], novelty_exponent);
      if (size != nullptr && size_exponent != 0.0) worth *= power(size[row], size_exponent);
      if (!std::isnan(worth)) score[row] = static_cast<float>(std::min<double>(worth, std::numeric_limits<float>::max()));
    }
  });
  return {scores, result, inverse_norms};
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
  std::vector<Search> searches(offsets.samples);
  for_each_item(offsets.samples, [&](int64_t b) {
    for (int64_t j = first_free; j < offsets.length(b); ++j) {
      (j % 2 == 0 ? searches[b].queries : searches[b].candidates).push_back(offsets.start(b) + j);
    }
    std::fill_n(cosine + offsets.start(b), offsets.length(b), -kInfinity);
  });
  Alike(keys, offsets).run(searches, Seen::all, rows, cosine);
  for_each_item(offsets.samples, [&](int64_t b) {
    auto& sources = searches[b].queries;
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
    for (const int64_t row : searches[b].candidates) stay(row);
    for (int64_t j = 0; j < std::min(first_free, offsets.length(b)); ++j) stay(offsets.start(b) + j);
  });
  return {into, similarity};
}

}  // namespace madtp::cpu
