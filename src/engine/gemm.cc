// The calls to oneDNN of gemm.h, and the self-test that decides whether its BF16 is used.
#include "engine/gemm.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "base/float_convert.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

// One OpenMP thread for the calls of this scope. The functions are looked up at run time: a
// oneDNN without OpenMP brings none, and needs none.
class OneThread {
 public:
  OneThread() {
    if (set() == nullptr || get() == nullptr) return;
    before_ = get()();
    set()(1);
  }
  ~OneThread() {
    if (before_ > 0) set()(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  using Set = void (*)(int);
  using Get = int (*)();
  static Set set() {
    static const Set function = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
    return function;
  }
  static Get get() {
    static const Get function = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    return function;
  }
  int before_ = 0;
};

void check(dnnl_status_t status, int64_t m, int64_t n, int64_t k) {
  if (status == dnnl_success) return;
  throw Error(status == dnnl_out_of_memory ? ErrorCode::out_of_memory : ErrorCode::unsupported,
              fmt::format("oneDNN failed with status {} on a {} x {} x {} product; check the "
                          "installed libdnnl (2.6 or later)",
                          static_cast<int>(status), m, n, k));
}

enum class Bf16Support { native, cpu_without, self_test_failed };

// Small integers, whose products and sums are exact in any order, with a row stride that is not
// the width: a oneDNN that gets them wrong, or refuses, is not used.
bool bf16_self_test() {
  const int64_t m = 33, n = 40, k = 96, ldy = 50;
  std::vector<uint16_t> x(m * k), w(n * k);
  for (int64_t i = 0; i < m * k; ++i) x[i] = f32_to_bf16(static_cast<float>(i * 7 % 15 - 7));
  for (int64_t i = 0; i < n * k; ++i) w[i] = f32_to_bf16(static_cast<float>(i * 5 % 13 - 6));
  std::vector<float> y(m * ldy, -1.0f);
  try {
    gemm(GemmArgs<uint16_t>{.x = x.data(),
                            .ldx = k,
                            .w = w.data(),
                            .ldw = k,
                            .y = y.data(),
                            .ldy = ldy,
                            .m = m,
                            .n = n,
                            .k = k});
  } catch (const Error&) {
    return false;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < ldy; ++j) {
      float want = j < n ? 0.0f : -1.0f;
      for (int64_t d = 0; j < n && d < k; ++d) {
        want += bf16_to_f32(x[i * k + d]) * bf16_to_f32(w[j * k + d]);
      }
      if (y[i * ldy + j] != want) return false;
    }
  }
  return true;
}

Bf16Support bf16_support() {
  static const Bf16Support support = [] {
    const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
    const auto bf16 = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
    if ((isa & bf16) != bf16) return Bf16Support::cpu_without;
    return bf16_self_test() ? Bf16Support::native : Bf16Support::self_test_failed;
  }();
  return support;
}

}  // namespace

void gemm(const GemmArgs<float>& a, bool accumulate) {
  const OneThread one_thread;
  check(dnnl_sgemm('N', 'T', a.m, a.n, a.k, 1.0f, a.x, a.ldx, a.w, a.ldw, accumulate ? 1.0f : 0.0f,
                   a.y, a.ldy),
        a.m, a.n, a.k);
}

void gemm(const GemmArgs<uint16_t>& a) {
  using dnnl::memory;
  const OneThread one_thread;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc xd({a.m, a.k}, memory::data_type::bf16, memory::dims{a.ldx, 1});
  const memory::desc wd({a.k, a.n}, memory::data_type::bf16, memory::dims{1, a.ldw});
  const memory::desc yd({a.m, a.n}, memory::data_type::f32, memory::dims{a.ldy, 1});
  try {
    // oneDNN caches primitives by shape, so only the first tile of a shape pays.
    const dnnl::matmul product({dnnl::matmul::desc(xd, wd, yd), engine});
    product.execute(stream, {{DNNL_ARG_SRC, memory(xd, engine, const_cast<uint16_t*>(a.x))},
                             {DNNL_ARG_WEIGHTS, memory(wd, engine, const_cast<uint16_t*>(a.w))},
                             {DNNL_ARG_DST, memory(yd, engine, a.y)}});
    stream.wait();
  } catch (const dnnl::error& error) {
    check(error.status, a.m, a.n, a.k);
  }
}

bool bf16_is_native() { return bf16_support() == Bf16Support::native; }

std::string why_bf16_is_not_native() {
  switch (bf16_support()) {
    case Bf16Support::native:
      break;
    case Bf16Support::cpu_without:
      return "native BF16 needs AVX-512 BF16 or AMX; this CPU has neither";
    case Bf16Support::self_test_failed:
      return "oneDNN's BF16 product failed its self-test on this CPU";
  }
  return "";
}

}  // namespace thriftattn
