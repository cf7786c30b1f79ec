// Loading cuBLASLt and calling it (cublas_lt.h).
#ifdef THRIFTATTN_WITH_CUDA
#include "engine/cublas_lt.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "thriftattn/error.h"

namespace thriftattn::device {
namespace {

constexpr int64_t kWorkspace = int64_t{32} << 20;  // what NVIDIA recommends for Hopper

struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;
};

std::vector<std::string> candidates() {
  const std::string file = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
  std::vector<std::string> paths = {file};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* root = std::getenv(variable)) {
      paths.push_back(fmt::format("{}/lib64/{}", root, file));
    }
  }
  paths.push_back("/usr/local/cuda/lib64/" + file);
  return paths;
}

Library load() {
  void* library = nullptr;
  for (const std::string& path : candidates()) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
  }
  if (library == nullptr) {
    throw Error(ErrorCode::not_found,
                fmt::format("{} was not found, and --device cuda multiplies with it; install the CUDA "
                            "{} libraries, or add their folder to LD_LIBRARY_PATH",
                            candidates().front(), CUBLAS_VER_MAJOR));
  }
  Library l{};
  const auto find = [&](const char* name, auto& function) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) {
      throw Error(ErrorCode::unsupported,
                  fmt::format("{} has no {}; install the CUDA {} libraries", candidates().front(),
                              name, CUBLAS_VER_MAJOR));
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  find("cublasLtCreate", l.create);
  find("cublasLtDestroy", l.destroy);
  find("cublasLtGetVersion", l.version);
  find("cublasLtMatmulDescCreate", l.desc_create);
  find("cublasLtMatmulDescSetAttribute", l.desc_set);
  find("cublasLtMatmulDescDestroy", l.desc_destroy);
  find("cublasLtMatrixLayoutCreate", l.layout_create);
  find("cublasLtMatrixLayoutDestroy", l.layout_destroy);
  find("cublasLtMatmulPreferenceCreate", l.preference_create);
  find("cublasLtMatmulPreferenceSetAttribute", l.preference_set);
  find("cublasLtMatmulPreferenceDestroy", l.preference_destroy);
  find("cublasLtMatmulAlgoGetHeuristic", l.heuristic);
  find("cublasLtMatmul", l.matmul);
  return l;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(status == CUBLAS_STATUS_ALLOC_FAILED ? ErrorCode::out_of_memory
                                                   : ErrorCode::unsupported,
              fmt::format("cuBLASLt: {} failed with status {}; check the driver and the CUDA {} "
                          "libraries",
                          what, static_cast<int>(status), CUBLAS_VER_MAJOR));
}

}  // namespace

// Column-major, as the library thinks: Y^T [n][m] = W^T^T X^T, W as k x n transposed, X as k x m.
struct MatrixMultiplier::Choice {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};

  Choice() = default;
  Choice(const Choice&) = delete;
  Choice& operator=(const Choice&) = delete;
  ~Choice() {
    for (const cublasLtMatrixLayout_t layout : {w, x, y}) {
      if (layout != nullptr) library().layout_destroy(layout);
    }
    if (desc != nullptr) library().desc_destroy(desc);
  }
};

MatrixMultiplier::MatrixMultiplier() : workspace_(kWorkspace) {
  cublasLtHandle_t handle = nullptr;
  check(library().create(&handle), "cublasLtCreate");
  handle_ = handle;
}

MatrixMultiplier::~MatrixMultiplier() {
  choices_.clear();
  if (handle_ != nullptr) library().destroy(static_cast<cublasLtHandle_t>(handle_));
}

int64_t MatrixMultiplier::version() const { return static_cast<int64_t>(library().version()); }

const MatrixMultiplier::Choice& MatrixMultiplier::choose(const Product& p) {
  std::unique_ptr<Choice>& slot = choices_[{p.element, p.m, p.n, p.k}];
  if (slot != nullptr) return *slot;
  auto choice = std::make_unique<Choice>();
  const Library& l = library();
  const bool f32 = p.element == cuda::Element::f32;
  const cudaDataType_t type = f32 ? CUDA_R_32F : CUDA_R_16BF;
  check(l.desc_create(&choice->desc, f32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F,
                      CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  const cublasOperation_t transpose = CUBLAS_OP_T;
  check(l.desc_set(choice->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose),
        "cublasLtMatmulDescSetAttribute");
  const auto layout = [&](cublasLtMatrixLayout_t* to, cudaDataType_t t, int64_t rows, int64_t columns) {
    check(l.layout_create(to, t, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows),
          "cublasLtMatrixLayoutCreate");
  };
  layout(&choice->w, type, p.k, p.n);
  layout(&choice->x, type, p.k, p.m);
  layout(&choice->y, CUDA_R_32F, p.n, p.m);
  cublasLtMatmulPreference_t preference = nullptr;
  check(l.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  const size_t workspace = static_cast<size_t>(kWorkspace);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  cublasStatus_t status = l.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &workspace, sizeof workspace);
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = l.heuristic(static_cast<cublasLtHandle_t>(handle_), choice->desc, choice->w, choice->x,
                         choice->y, choice->y, preference, 1, &result, &found);
  }
  l.preference_destroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
    throw Error(ErrorCode::unsupported,
                fmt::format("cuBLASLt has no way to multiply {} x {} by {} x {} in {} (status {}); use "
                            "--device cpu for this model",
                            p.m, p.k, p.k, p.n, f32 ? "FP32" : "BF16", static_cast<int>(status)));
  }
  choice->algorithm = result.algo;
  slot = std::move(choice);
  return *slot;
}

void MatrixMultiplier::prepare(const Product& product) { choose(product); }

void MatrixMultiplier::multiply(const Product& p, cuda::Stream stream) {
  const Choice& c = choose(p);
  const float one = 1.0f, zero = 0.0f;
  check(library().matmul(static_cast<cublasLtHandle_t>(handle_), c.desc, &one, p.w, c.w, p.x, c.x,
                         &zero, p.y, c.y, p.y, c.y, &c.algorithm, workspace_.data(),
                         static_cast<size_t>(kWorkspace), stream),
        "cublasLtMatmul");
}

}  // namespace thriftattn::device
#endif
