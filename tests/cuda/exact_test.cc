// FP32 pages on the device (exact_f32.h): rows as the CPU stores them, attention against FP64. Steps
// end inside of pages and of tiles of 16 positions, K and V have widths of their own.
#ifdef THRIFTATTN_WITH_CUDA
#include <gtest/gtest.h>

#include "cuda/device_case.h"
#include "cuda/exact_f32.h"

namespace thriftattn::testing {
namespace {

// Scores and sums in FP32, exponentials of scores up to 20 or so.
constexpr double kExact = 4e-6;

class ExactCase {
 public:
  explicit ExactCase(const CaseOptions& o)
      : o_(o), host_(o), layer_(cuda::exact_layer(store())), k_row_(o.shape.kv_heads * o.shape.head_dim_k),
        v_row_(o.shape.kv_heads * o.shape.head_dim_v) {
    const int64_t pages = (host_.total() + kPageTokens - 1) / kPageTokens;
    for (int64_t p = 0; p < pages; ++p) ids_.push_back(static_cast<int32_t>(pages + 2 - p));
    d_ids_ = to_device(ids_);
    status_ = to_device(std::vector<cuda::AppendStatus>(1));
    pages_ = cuda::DeviceMemory((pages + 7) * layer_.slot_bytes);
    cuda::fill(pages_.data(), kPoison, pages_.bytes(), nullptr);
    const TensorView<const float> k = host_.k_view(0, host_.total()), v = host_.v_view(0, host_.total());
    k_.assign(k.data, k.data + host_.total() * k_row_);
    v_.assign(v.data, v.data + host_.total() * v_row_);
  }

  LayerStore& store() { return host_.cache().impl().layers[0]; }
  std::vector<float>& k() { return k_; }
  std::vector<float>& v() { return v_; }
  AttentionCase& host() { return host_; }

  void append(int64_t first, int64_t n) {
    const std::vector<float> k(k_.begin() + first * k_row_, k_.begin() + (first + n) * k_row_);
    const std::vector<float> v(v_.begin() + first * v_row_, v_.begin() + (first + n) * v_row_);
    const cuda::DeviceMemory d_k = to_device(k), d_v = to_device(v);
    cuda::AppendCall call;
    set_tables(call.tables, first + n, n);
    call.memory.pages = pages_.as<uint8_t>();
    call.k = d_k.data();
    call.v = d_v.data();
    call.k_token_stride = k_row_;
    call.v_token_stride = v_row_;
    call.status = status_.as<cuda::AppendStatus>();
    cuda::exact_append(layer_, call, n, nullptr);
    cuda::synchronize(nullptr);
  }
  cuda::AppendStatus status() { return to_host<cuda::AppendStatus>(status_, 1)[0]; }

  // Rows that exist, against the CPU's slots.
  void expect_same_rows(const std::string& what) {
    const Sequence& seq = host_.cache().impl().sequence(host_.sequence());
    const LayerView view(store(), seq.layers[0], seq.length);
    const PageLayout& layout = store().layout;
    const auto got = to_host<uint8_t>(pages_, static_cast<size_t>(pages_.bytes()));
    for (size_t p = 0; p < ids_.size(); ++p) {
      const auto page = static_cast<int64_t>(p);
      const int64_t held = std::min(kPageTokens, host_.total() - page * kPageTokens);
      for (int64_t h = 0; h < o_.shape.kv_heads; ++h) {
        for (const SideLayout* side : {&layout.k, &layout.v}) {
          const uint8_t* want = layout.start(*side, view.head(page, h)) + side->rows;
          const auto at = want - view.head(page, 0).k + ids_[p] * layer_.slot_bytes;
          ASSERT_EQ(std::memcmp(&got[static_cast<size_t>(at)], want, static_cast<size_t>(held * side->row_bytes)), 0)
              << what << ": page " << p << ", head " << h;
        }
      }
    }
  }

  void expect_truth(const std::string& what) {
    std::vector<float> unused, want_lse;
    const AttendRequest r = host_.request(unused);
    const std::vector<float> want = host_.attend_reference(&want_lse);
    const int64_t q_row = o_.shape.q_heads * o_.shape.head_dim_k;
    const cuda::DeviceMemory d_q = to_device(std::vector<float>(r.q.data, r.q.data + o_.queries * q_row));
    cuda::DeviceMemory out(static_cast<int64_t>(want.size() * 4)), lse(static_cast<int64_t>(want_lse.size() * 4)), sinks;
    if (r.sink_logits != nullptr) sinks = to_device(std::vector<float>(r.sink_logits, r.sink_logits + o_.shape.q_heads));
    cuda::fill(out.data(), kPoison, out.bytes(), nullptr);
    cuda::fill(lse.data(), kPoison, lse.bytes(), nullptr);
    cuda::AttendCall call;
    set_tables(call.tables, host_.total(), o_.queries);
    call.memory.pages = pages_.as<uint8_t>();
    call.config = r.config;
    call.q = d_q.data();
    call.q_element = call.out_element = cuda::Element::f32;
    call.q_token_stride = q_row;
    call.out = out.data();
    call.lse = lse.as<float>();
    call.sink_logits = sinks.as<float>();
    cuda::exact_attend(layer_, call, o_.queries, nullptr);
    const auto got = to_host<float>(out, want.size()), got_lse = to_host<float>(lse, want_lse.size());
    EXPECT_LT(row_error(got, want, o_.shape.head_dim_v), kExact) << what;
    EXPECT_LT(row_error(got_lse, want_lse, o_.shape.q_heads), kExact) << what << ": LSE";
  }

 private:
  void set_tables(cuda::BatchTables& t, int64_t length, int64_t step) {
    d_length_ = to_device(std::vector<int32_t>{static_cast<int32_t>(length)});
    d_offsets_ = to_device(std::vector<int32_t>{0, static_cast<int32_t>(step)});
    t.lengths = d_length_.as<int32_t>();
    t.step_offsets = d_offsets_.as<int32_t>();
    t.block_table = d_ids_.as<int32_t>();
  }

  CaseOptions o_;
  AttentionCase host_;
  cuda::ExactLayer layer_;
  int64_t k_row_, v_row_;
  std::vector<float> k_, v_;
  std::vector<int32_t> ids_;
  cuda::DeviceMemory pages_, d_ids_, d_length_, d_offsets_, status_;
};

CaseOptions options(int64_t length, int64_t queries) {
  CaseOptions o;
  o.shape = {.kv_heads = 2, .q_heads = 4, .head_dim_k = 64, .head_dim_v = 96};
  o.policy = plain_policy(Format::f32);
  o.length = length;
  o.queries = queries;
  return o;
}

TEST(CudaExact, RowsAndAttentionOverLengths) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [length, queries] :
       {std::pair<int64_t, int64_t>{0, 1}, {63, 1}, {64, 1}, {300, 1}, {0, 70}, {100, 17}, {190, 16}}) {
    // The maximum rises from page to page, and stays.
    for (const float gain : {0.5f, 4.0f}) {
      CaseOptions o = options(length, queries);
      o.q_gain = gain;
      ExactCase c(o);
      const int64_t half = c.host().total() / 2;
      if (half > 0) c.append(0, half);
      c.append(half, c.host().total() - half);
      const std::string what = "length " + std::to_string(length) + ", " + std::to_string(queries) +
                               " queries, gain " + std::to_string(gain);
      EXPECT_EQ(c.status().failed, 0) << what;
      c.expect_same_rows(what);
      c.expect_truth(what);
    }
  }
}

TEST(CudaExact, WindowSoftcapSinksNotCausal) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t window : {0, 1, 64, 100}) {
    for (const int64_t queries : {1, 20}) {
      for (const bool causal : {true, false}) {
        if (!causal && window != 0) continue;  // nobody may ask for it
        CaseOptions o = options(230, queries);
        o.shape.window = window;
        o.sink_logits = window != 64;
        o.softcap = window == 100 ? 20.0f : 0.0f;
        o.causal = causal;
        ExactCase c(o);
        c.append(0, c.host().total());
        c.expect_truth("window " + std::to_string(window) + ", " + std::to_string(queries) +
                       " queries" + (causal ? "" : ", not causal"));
      }
    }
  }
}

TEST(CudaExact, ValuesThatAreNotFiniteAreTold) {
  SKIP_WITHOUT_DEVICE();
  for (const bool v : {false, true}) {
    for (const float value : {NAN, INFINITY, -INFINITY}) {
      ExactCase c(options(9, 1));
      std::vector<float>& x = v ? c.v() : c.k();
      const auto row = x.size() / 10;
      x[7 * row + row - 1] = value;
      c.append(0, 5);
      EXPECT_EQ(c.status().failed, 0) << value;
      c.append(5, 5);
      EXPECT_EQ(c.status().failed, 1) << value;
      EXPECT_EQ(c.status().side, v ? 1 : 0) << value;
      EXPECT_EQ(c.status().kv_head, 1) << value;
      EXPECT_EQ(c.status().token, 7) << value;
    }
  }
}

}  // namespace
}  // namespace thriftattn::testing
#endif
