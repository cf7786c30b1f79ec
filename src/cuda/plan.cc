// AttendPlan: checks, the query tile, the splits, the workspace (plan.h).
#include "cuda/plan.h"

#include <fmt/format.h>

#include "cuda/attend_prefill_shape.h"
#include "thriftattn/error.h"

namespace thriftattn::cuda {
namespace {

// Counts only: the same walk gives the offsets and the size.
class Layout {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = at_;
    at_ += (bytes + 255) / 256 * 256;
    return at;
  }
  int64_t bytes() const { return at_; }

 private:
  int64_t at_ = 0;
};

void check_limits(const LayerPolicy& policy, const AttendLimits& limits) {
  if (limits.batch < 1 || limits.batch > 65535 || limits.max_pages < 1 || limits.step_tokens < 1) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("CUDA plan: batch = {}, max_pages = {}, step_tokens = {}; each must be at "
                            "least 1, batch at most 65535",
                            limits.batch, limits.max_pages, limits.step_tokens));
  }
  if (limits.max_pages > kMaxPages) {
    throw Error(ErrorCode::unsupported,
                fmt::format("CUDA plan: max_pages = {}; required: lengths of {} tokens; supported: {} "
                            "pages; missing: longer splits",
                            limits.max_pages, limits.max_pages * kPageTokens, kMaxPages));
  }
  const bool layered = is_layered(policy.k_format) || is_layered(policy.v_format);
  if (layered && limits.open_pages < pages_touched(limits)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("CUDA plan: open_pages = {}, but a step of {} tokens touches up to {} pages",
                            limits.open_pages, limits.step_tokens, pages_touched(limits)));
  }
}

Workspace lay_out(const AttendPlan::State& s) {
  const int64_t heads = s.limits.batch * s.shape.kv_heads;
  const int64_t dim = s.shape.head_dim_k;
  Workspace w;
  w.rows = int64_t{8} * s.n_tiles * s.row_tiles;
  w.open_records = pages_touched(s.limits);
  const int64_t unit = int64_t{16} * prepare_warps(w.rows);
  w.page_chunks = std::min<int64_t>(kPageChunks, (s.limits.max_pages + w.open_records + unit - 1) / unit);
  w.chunks = w.page_chunks + 1;
  Layout layout;
  w.q_nvfp4 = layout.take(heads * w.rows * dim * 2);
  w.q_fp8 = layout.take(heads * w.rows * dim * 2);
  w.q_bf16 = layout.take(heads * w.rows * dim * 4);
  w.row_factor = layout.take(heads * w.rows * 4);
  w.floors = layout.take(heads * w.chunks * w.rows * 4);
  w.records = layout.take(heads * s.row_tiles * (s.limits.max_pages + w.open_records) * (4 + 8 * s.n_tiles) * 4);
  w.noted = layout.take(heads * s.row_tiles * (s.limits.max_pages + w.open_records) * 4);
  w.next_unit = layout.take(8);
  w.unit_starts = layout.take(0);
  layout.take(units_offset(w, s.limits.batch) - w.unit_starts + heads * s.row_tiles * s.splits * 16);
  w.partial_o = layout.take(heads * s.splits * w.rows * dim * 4);
  w.partial_ml = layout.take(heads * s.splits * w.rows * 8);
  if (s.prefill_stages > 0) {
    w.facts = layout.take(heads * s.limits.max_pages * static_cast<int64_t>(sizeof(PageFacts)));
    const int64_t pages = s.limits.max_pages * prefill_tile_bytes(static_cast<int>(dim));
    w.tiles = layout.take(std::max(s.prefill_pass_heads[0] * 2 * pages, s.prefill_pass_heads[1] * 3 * pages));
  }
  if (s.geometry.budget != 0) {
    w.chosen_residuals = layout.take(heads * s.limits.max_pages * 4);
    if (s.positions > 1) w.choices = layout.take(heads * s.limits.max_pages * kMaxPositions);
    w.keys = layout.take(heads * s.positions * std::max<int64_t>(0, s.limits.max_pages - kHeldKeys) * 4);
  }
  w.bytes = layout.bytes();
  return w;
}

std::string explain_budget(const Geometry& g) {
  if (g.budget == 0) return "";
  const std::string budget = g.budget_pages > 0 ? fmt::format("{} pages", g.budget_pages)
                                                : fmt::format("{:.6g} % of the pages", 100 * g.budget_fraction);
  return fmt::format(", attend_select promotes {} by block mean", budget);
}

}  // namespace

AttendPlan::AttendPlan(const LayerShape& shape, const LayerPolicy& policy,
                       const AttendLimits& limits) {
  auto s = std::make_shared<State>();
  s->shape = shape;
  s->policy = policy;
  s->limits = limits;
  s->geometry = make_geometry(shape, policy);
  check_limits(policy, limits);
  const DeviceInfo device = device_info();
  s->device = device.index;
  s->major = device.major;
  s->minor = device.minor;
  if (device.major < 8) {
    throw Error(ErrorCode::unsupported,
                fmt::format("CUDA: device {} ({}) has compute capability {}.{}; required: 8.0; "
                            "supported: 8.0, 8.9, 9.0, 12.0; missing: kernels for older devices",
                            device.index, device.name, device.major, device.minor));
  }
  s->positions = std::min(limits.step_tokens, kMaxPositions);
  const int64_t rows = s->positions * s->geometry.group;
  s->multiprocessors = device.multiprocessors;
  s->planes = s->geometry.nvfp4_planes();
  s->split_rule = s->planes ? kPlanesSplits : kDecodeSplits;
  const bool by_position = s->geometry.budget != 0 && s->positions > 1;  // ItemWalk::kByPosition
  s->n_tiles = rows <= 8 && !by_position ? 1 : rows <= 16 || !s->planes || s->geometry.k.dim > 128 ? 2 : 4;
  // A position decides for all of its heads, so tiles of a rule do not cut one where they can help it.
  const bool decides = s->geometry.any_layered() && (s->geometry.promote < 1.0f || s->geometry.skip > 0.0f);
  const int64_t tile = 8 * s->n_tiles, group = s->geometry.group;
  s->rule_positions = s->positions;
  if (decides && rows > tile && group <= tile && tile % group != 0) s->rule_positions = tile / group;
  s->row_tiles = static_cast<int>((rows + tile - 1) / tile);
  if (!s->planes && !limits.batch_invariant) {
    // A few (sequence, KV head)s alone must occupy the device too.
    const int64_t across = limits.batch * shape.kv_heads * s->row_tiles;
    s->split_rule.few_splits = static_cast<int32_t>(
        std::clamp<int64_t>(kDecodeBlocks * s->multiprocessors / across, 1, s->split_rule.max_splits));
  }
  // A page may be read sealed by some rows and open by others.
  s->splits = most_splits(limits.max_pages + 1, s->split_rule);
  if (s->planes && !limits.batch_invariant) s->splits = most_unit_splits(limits.max_pages + 1);
  if (limits.step_tokens > kMaxPositions) {
    s->prefill_stages = prefill_stages(s->geometry.k.dim, s->geometry.k.layered(), s->major, s->minor);
    const bool two_tiles = s->geometry.k.layered() || s->geometry.k.kind == SideKind::fp8;
    for (int k_tiles = 1; k_tiles <= (two_tiles ? 2 : 1) && s->major == 9; ++k_tiles) {
      s->prefill_pass_heads[k_tiles - 1] = prefill_pass_heads(
          {.heads = limits.batch * shape.kv_heads,
           .row_tiles = (limits.step_tokens * s->geometry.group + kPrefillRows - 1) / kPrefillRows,
           .head_bytes = limits.max_pages * prefill_tile_bytes(s->geometry.k.dim) * (k_tiles + 1),
           .most_bytes = limits.tile_bytes,
           .multiprocessors = s->multiprocessors});
    }
  }
  if (s->planes) s->slots = s->multiprocessors * planes_blocks(s->geometry.k.dim, s->n_tiles);
  s->resident = s->multiprocessors * decode_blocks(s->geometry.k.dim, s->n_tiles);
  s->workspace = lay_out(*s);
  state_ = std::move(s);
}

int64_t AttendPlan::workspace_bytes() const { return state_->workspace.bytes; }
const LayerShape& AttendPlan::shape() const { return state_->shape; }
const LayerPolicy& AttendPlan::policy() const { return state_->policy; }
const AttendLimits& AttendPlan::limits() const { return state_->limits; }

std::string AttendPlan::explain() const {
  const State& s = *state_;
  const char* other = s.geometry.any_grouped() ? "attend_groups" : "attend_decode";
  const char* kernel = s.planes ? "attend_planes" : other;
  const std::string decode = fmt::format(
      "{}: sm_{}{}, tile of {} query rows x head_dim {}, {} tiles a KV head, up to {} splits "
      "of at least {} pages, K {}, V {}{}, workspace {:.1f} MB",
      kernel, s.major, s.minor, 8 * s.n_tiles, s.shape.head_dim_k, s.row_tiles, s.splits,
      s.limits.batch_invariant ? s.split_rule.min_items : kLeastPlaces,
      to_string(s.policy.k_format), to_string(s.policy.v_format), explain_budget(s.geometry),
      static_cast<double>(s.workspace.bytes) * 1e-6);
  if (s.limits.step_tokens <= kMaxPositions) return decode;
  const char* when = s.geometry.any_layered() ? "decode mode" : "not used";
  if (s.prefill_stages == 0) {
    return decode + fmt::format(", passes of {} positions (attend_prefill needs more shared memory or "
                                "registers than sm_{}{} has at this head_dim)",
                                s.positions, s.major, s.minor);
  }
  const int wide = prefill_stages(s.geometry.k.dim, true, s.major, s.minor);
  std::string of_f32;
  if (wide == 0) of_f32 = " (FP32 queries: passes)";
  if (wide > 0 && wide != s.prefill_stages) of_f32 = fmt::format(" ({} for FP32 queries)", wide);
  std::string pages = "pages expanded by each tile";
  if (const int32_t heads = s.prefill_pass_heads[0]; heads > 0) {
    pages = fmt::format("pages expanded before it, {} KV heads a pass", heads);
  }
  return fmt::format("attend_prefill: {}, tile of {} query rows x {} tokens, {} stages{}, {}; {}: {}, passes of {} positions",
                     s.major == 9 ? "wgmma" : "mma.sync", kPrefillRows, kPageTokens, s.prefill_stages,
                     of_f32, pages, when, decode, s.rule_positions);
}

}  // namespace thriftattn::cuda
