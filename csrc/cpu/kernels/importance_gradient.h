// Gradients of attention's importance for one sample. For some keys at a time and all queries, keys along the rows:
//
//   P_hji = exp(scale <q_hi, k_hj> + bias_j - lse_hi)
//   dS_hji = P_hji dreceived_j / n for the n heads that attain max_h P_hji, 0 for the others        for i >= 1
//   dS_hj0 = P_hj0 share_hj dcls_j        share_hj = |out_hj| / (sum_h |out_hj| + 1e-8)
//
// and from dS, as in attention_gradient.h, dq, dk and dbias; dlse_hi = -sum_j dS_hji. The shares give dout. Token 0 receives nothing.
#pragma once

#include "cpu/kernels/alike.h"
#include "cpu/kernels/attention_gradient.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Where the parts of a block's working memory start, in bytes, and the floats between heads.
struct ImportanceGradientScratch {
  int64_t turned, queries, d_q, lse, d_lse, p, keys, keys_packed, per_head, total;
  int64_t turned_floats, queries_floats, d_q_floats, lse_floats, p_floats;

  MADTP_INLINE ImportanceGradientScratch of(int64_t heads, int64_t length, int64_t head_dim) {
    ImportanceGradientScratch at{};
    const auto reserve = [&](int64_t floats) {
      const int64_t start = at.total;
      at.total += round_up(floats * 4, 64);
      return start;
    };
    const int64_t width = round_up(head_dim, kLanes);
    at.lse_floats = round_up(length, kLanes);
    at.turned_floats = at.lse_floats * head_dim;
    at.queries_floats = length * width;
    at.d_q_floats = (length + kTurnedRows) * width;
    at.p_floats = kGradientKeys * (logits_stride(length) + kTurnedRows);
    at.turned = reserve(heads * at.turned_floats);
    at.queries = reserve(heads * at.queries_floats);
    at.d_q = reserve(heads * at.d_q_floats);
    at.lse = reserve(heads * at.lse_floats);
    at.d_lse = reserve(heads * at.lse_floats);
    at.p = reserve(heads * at.p_floats);
    at.keys = reserve(kGradientKeys * head_dim);
    at.keys_packed = reserve(kGradientKeys * width);
    at.per_head = reserve(2 * heads);
    return at;
  }
};

template <class Source>
class ImportanceGradient {
 public:
  explicit ImportanceGradient(const ImportanceGradientBlock& block)
      : block_(block),
        length_(block.q.rows),
        head_dim_(block.q.depth),
        width_(round_up(head_dim_, kLanes)),
        stride_(logits_stride(length_) + kTurnedRows),
        at_(ImportanceGradientScratch::of(block.heads, length_, head_dim_)) {}

  void run() const {
    for (int64_t head = 0; head < block_.heads; ++head) load_queries(head);
    float scales[kGradientKeys];
    for (float& scale : scales) scale = block_.scale;
    for (int64_t first = 0; first < length_; first += kGradientKeys) {
      const int64_t count = smaller(kGradientKeys, length_ - first);
      for (int64_t head = 0; head < block_.heads; ++head) probabilities(head, first, count);
      for (int64_t r = 0; r < count; ++r) key(first + r, r);
      for (int64_t head = 0; head < block_.heads; ++head) {
        const float* const d_s = p(head);
        scaled_product<ProductF32>({d_s, stride_, count}, part(at_.queries, head, at_.queries_floats), head_dim_, length_, length_,
                                   scales, result(block_.d_k, head, first), block_.d_stride);
        pack_f32<Source>(rows_from<Source>(of_head(block_.k, block_.k_head_bytes, head), first, count), 0, count,
                         part(at_.keys_packed));
        add_turned_product(d_s, stride_, length_, part(at_.keys_packed), head_dim_, count, part(at_.d_q, head, at_.d_q_floats),
                           width_);
      }
    }
    for (int64_t head = 0; head < block_.heads; ++head) {
      const float* const d_q = part(at_.d_q, head, at_.d_q_floats);
      for (int64_t i = 0; i < length_; ++i) {
        store_scaled(d_q + i * width_, block_.scale, result(block_.d_q, head, i), head_dim_);
      }
      std::memcpy(block_.d_lse + head * block_.lse_stride, part(at_.d_lse, head, at_.lse_floats), static_cast<size_t>(length_) * 4);
    }
  }

 private:
  float* part(int64_t start, int64_t head = 0, int64_t floats = 0) const {
    return reinterpret_cast<float*>(block_.scratch + start) + head * floats;
  }
  float* p(int64_t head) const { return part(at_.p, head, at_.p_floats); }
  Source* result(void* of, int64_t head, int64_t row) const {
    return static_cast<Source*>(of) + row * block_.d_stride + head * head_dim_;
  }
  static RowsToLoad of_head(RowsToLoad rows, int64_t head_bytes, int64_t head) {
    rows.source = static_cast<const char*>(rows.source) + head * head_bytes;
    return rows;
  }

  void load_queries(int64_t head) const {
    const RowsToLoad q = of_head(block_.q, block_.q_head_bytes, head);
    pack_transposed<Source, ProductF32>(q, 0, length_, part(at_.turned, head, at_.turned_floats));
    pack_f32<Source>(q, 0, length_, part(at_.queries, head, at_.queries_floats));
    std::memset(part(at_.d_q, head, at_.d_q_floats), 0, static_cast<size_t>(at_.d_q_floats) * 4);
    std::memset(part(at_.d_lse, head, at_.lse_floats), 0, static_cast<size_t>(at_.lse_floats) * 4);
    const float* const given = block_.lse + head * block_.lse_stride;
    float* const lse = part(at_.lse, head, at_.lse_floats);
    for (int64_t i = 0; i < at_.lse_floats; ++i) {
      lse[i] = i >= length_ || given[i] == -__builtin_inff() ? __builtin_inff() : given[i];
    }
  }

  void probabilities(int64_t head, int64_t first, int64_t count) const {
    load_rows<Source, ProductF32>(rows_from<Source>(of_head(block_.k, block_.k_head_bytes, head), first, count), part(at_.keys),
                                  head_dim_);
    plain_product<ProductF32>({part(at_.keys), head_dim_, count}, part(at_.turned, head, at_.turned_floats), length_, head_dim_,
                              p(head), stride_);
    const vf scale = broadcast(block_.scale);
    const float* const lse = part(at_.lse, head, at_.lse_floats);
    for (int64_t r = 0; r < count; ++r) {
      float* const row = p(head) + r * stride_;
      const vf bias = broadcast(block_.bias == nullptr ? 0.0f : block_.bias[first + r]);
      const int64_t blind = block_.causal ? first + r : 0;
      for (int64_t i = 0; i < length_; i += kLanes) {
        store(row + i, seen_only(exponential(fma(load(row + i), scale, bias) - load(lse + i)), i, blind));
      }
    }
  }

  // dS of key j in place of the probabilities in row r of all heads, what it adds to dlse, its dbias and dout.
  void key(int64_t j, int64_t r) const {
    const int64_t heads = block_.heads;
    float* const norms = part(at_.per_head);
    float* const first = part(at_.per_head) + heads;  // probabilities of query 0
    const float cls = j == 0 ? 0.0f : block_.d_cls[j];
    const vf received = broadcast(j == 0 ? 0.0f : block_.d_received[j]);
    float total = 0.0f;
    for (int64_t head = 0; head < heads; ++head) {
      norms[head] = __builtin_sqrtf(sum_of_squares(out_row(head, j), head_dim_));
      first[head] = p(head)[r * stride_];
      total += norms[head];
    }
    total += 1e-8f;

    vf sum = broadcast(0.0f);
    for (int64_t i = 0; i < length_; i += kLanes) {
      const int64_t at = r * stride_ + i;
      vf top = load(p(0) + at), attained = broadcast(0.0f);
      for (int64_t head = 1; head < heads; ++head) top = maximum_or_nan(load(p(head) + at), top);
      for (int64_t head = 0; head < heads; ++head) attained = attained + where_equal(load(p(head) + at), top, broadcast(1.0f));
      for (int64_t head = 0; head < heads; ++head) {
        const vf probability = load(p(head) + at);
        vf gradient = where_equal(probability, top, probability) / attained * received;
        if (i == 0) gradient = with_first_lane(gradient, first[head] * norms[head] / total * cls);
        store(p(head) + at, gradient);
        float* const d_lse = part(at_.d_lse, head, at_.lse_floats) + i;
        store(d_lse, load(d_lse) - gradient);
        sum = sum + (i + kLanes <= length_ ? gradient : load_n(p(head) + at, length_ - i));
      }
    }
    if (block_.d_bias != nullptr) block_.d_bias[j] = sum_lanes(sum);

    // dshare = P_hj0 dcls_j;  dnorm = (dshare - sum_h share dshare) / total;  dout = dnorm out / |out|.
    float mean = 0.0f;
    for (int64_t head = 0; head < heads; ++head) mean += first[head] * cls * norms[head] / total;
    for (int64_t head = 0; head < heads; ++head) {
      const float d_norm = (first[head] * cls - mean) / total;
      const vf factor = broadcast(norms[head] > 0.0f ? d_norm / norms[head] : d_norm * 0.0f);
      const Source* const from = out_row(head, j);
      Source* const to = result(block_.d_out, head, j);
      for (int64_t c = 0; c < head_dim_; c += kLanes) {
        const int64_t n = smaller(kLanes, head_dim_ - c);
        store_n(to + c, load_n(from + c, n) * factor, n);
      }
    }
  }

  const Source* out_row(int64_t head, int64_t j) const {
    return static_cast<const Source*>(of_head(block_.out, block_.out_head_bytes, head).source) + j * block_.out.stride;
  }

  static vf with_first_lane(vf a, float x) {
    float lanes[kLanes];
    store(lanes, a);
    lanes[0] = x;
    return load(lanes);
  }

  const ImportanceGradientBlock& block_;
  const int64_t length_, head_dim_, width_, stride_;
  const ImportanceGradientScratch at_;
};

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
