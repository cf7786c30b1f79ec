// Measuring, storing and finding the equaliser of a model.
#include "engine/calibrate.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>

#include "engine/calibration_text.h"
#include "engine/session.h"
#include "engine/tokenizer.h"
#include "thriftattn/error.h"
#include "thriftattn/policy.h"

namespace thriftattn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kMaxTokens = 1024;
constexpr double kEnergyFloor = 1e-6;  // of a head's largest
constexpr const char* kFileKind = "thriftattn-equalizer";

// Sums of squares of one layer: [kv_heads][head_dim].
struct Energies {
  std::vector<double> q, k;
};

// The K of a page around the mean of the page; the queries around zero, because a constant in
// them is read from K like everything else.
void add_energies(TensorView<const float> q, TensorView<const float> k, Energies& sums) {
  const int64_t dim = k.head_dim;
  const int64_t group = q.heads / k.heads;
  sums.q.resize(static_cast<size_t>(k.heads * dim));
  sums.k.resize(static_cast<size_t>(k.heads * dim));
  for (int64_t page = 0; page + kPageTokens <= k.tokens; page += kPageTokens) {
    for (int64_t h = 0; h < k.heads; ++h) {
      std::vector<double> mean(static_cast<size_t>(dim));
      for (int64_t t = page; t < page + kPageTokens; ++t) {
        for (int64_t d = 0; d < dim; ++d) mean[d] += k.row(t, h)[d];
      }
      for (double& m : mean) m /= static_cast<double>(kPageTokens);
      for (int64_t t = page; t < page + kPageTokens; ++t) {
        for (int64_t d = 0; d < dim; ++d) {
          const double centred = k.row(t, h)[d] - mean[d];
          sums.k[h * dim + d] += centred * centred;
        }
        for (int64_t g = h * group; g < (h + 1) * group; ++g) {
          for (int64_t d = 0; d < dim; ++d) {
            sums.q[h * dim + d] += static_cast<double>(q.row(t, g)[d]) * q.row(t, g)[d];
          }
        }
      }
    }
  }
}

void clamp_to_largest(double* energies, int64_t dim) {
  const double largest = *std::max_element(energies, energies + dim);
  // A head that says nothing at all gets s = 1.
  const double floor = largest > 0.0 ? largest * kEnergyFloor : 1.0;
  for (int64_t d = 0; d < dim; ++d) energies[d] = std::max(energies[d], floor);
}

std::vector<float> solve(Energies sums, int64_t dim) {
  std::vector<float> s(sums.k.size());
  for (size_t head = 0; head < s.size(); head += static_cast<size_t>(dim)) {
    clamp_to_largest(&sums.q[head], dim);
    clamp_to_largest(&sums.k[head], dim);
    double log_mean = 0.0;
    std::vector<double> logs(static_cast<size_t>(dim));
    for (int64_t d = 0; d < dim; ++d) {
      logs[d] = 0.25 * (std::log(sums.q[head + d]) - std::log(sums.k[head + d]));
      log_mean += logs[d] / static_cast<double>(dim);
    }
    for (int64_t d = 0; d < dim; ++d) {
      s[head + d] = static_cast<float>(std::exp(logs[d] - log_mean));
    }
  }
  return s;
}

size_t values_of_layer(const LayerConfig& layer) {
  return static_cast<size_t>(layer.kv_heads * layer.head_dim_k);
}

// FNV-1a over the values' text: a file cut short or edited by hand is noticed.
std::string checksum(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001b3u;
  }
  return fmt::format("{:016x}", hash);
}

[[noreturn]] void refuse(ErrorCode code, const std::string& path, const std::string& why) {
  throw Error(code, fmt::format("equalizer file {}: {}; delete it, or measure again with "
                                "`thriftattn calibrate`",
                                path, why));
}

Equalizer parse(const std::string& text, const std::string& path, const Model& model) {
  const json file = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!file.is_object() || file.value("kind", json()) != kFileKind) {
    refuse(ErrorCode::corrupt, path, "it is not an equalizer");
  }
  if (file.value("version", json()) != kEqualizerFileVersion) {
    refuse(ErrorCode::invalid_argument, path,
           fmt::format("its version is {}, required: {}", file.value("version", json()).dump(),
                       kEqualizerFileVersion));
  }
  if (file.value("model", json()) != model.hash()) {
    refuse(ErrorCode::invalid_argument, path,
           fmt::format("it was measured for the model {}, this model is {}",
                       file.value("model", json()).dump(), model.hash()));
  }
  const json layers = file.value("layers", json());
  if (file.value("checksum", json()) != checksum(layers.dump())) {
    refuse(ErrorCode::corrupt, path, "its checksum does not fit its values");
  }
  if (!layers.is_array() || layers.size() != model.config().layers.size()) {
    refuse(ErrorCode::invalid_argument, path,
           fmt::format("it does not have the model's {} layers", model.config().layers.size()));
  }
  Equalizer equalizer;
  for (size_t i = 0; i < layers.size(); ++i) {
    const size_t wanted = values_of_layer(model.config().layers[i]);
    std::vector<float> values;
    if (layers[i].is_array()) {
      for (const json& value : layers[i]) {
        values.push_back(value.is_number() ? value.get<float>() : 0.0f);
      }
    }
    if (values.size() != wanted) {
      refuse(ErrorCode::invalid_argument, path,
             fmt::format("layer {} has {} values, required: {}", i, values.size(), wanted));
    }
    for (const float value : values) {
      if (!(value > 0.0f) || !std::isfinite(value)) {
        refuse(ErrorCode::corrupt, path,
               fmt::format("layer {} holds a value that is not a positive number", i));
      }
    }
    equalizer.layers.push_back(std::move(values));
  }
  return equalizer;
}

}  // namespace

Equalizer measure_equalizer(const Model& model, std::span<const int32_t> tokens) {
  const auto limit = static_cast<size_t>(std::min<int64_t>(model.config().context, kMaxTokens));
  tokens = tokens.first(std::min(tokens.size(), limit));
  if (tokens.size() < static_cast<size_t>(kPageTokens)) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} tokens are too few to measure an equalizer, required: {}",
                            tokens.size(), kPageTokens));
  }
  std::vector<Energies> sums(model.config().layers.size());
  KvCache cache({.layers = layer_shapes(model.config()),
                 .policy = resolve(preset("f32"), policy_context(model.config())),
                 .equalizer = {}});
  ForwardOptions options;
  options.on_qk = [&](int64_t layer, TensorView<const float> q, TensorView<const float> k) {
    add_energies(q, k, sums[static_cast<size_t>(layer)]);
  };
  forward(model, cache, cache.create(), tokens, options, nullptr);

  Equalizer equalizer;
  for (size_t i = 0; i < sums.size(); ++i) {
    equalizer.layers.push_back(solve(std::move(sums[i]), model.config().layers[i].head_dim_k));
  }
  return equalizer;
}

Equalizer measure_equalizer(const Model& model) {
  const Tokenizer tokenizer = Tokenizer::from_gguf(model.file());
  return measure_equalizer(model, tokenizer.encode(kCalibrationText));
}

std::string equalizer_path(const std::string& cache_folder, const Model& model) {
  return (fs::path(cache_folder) / (model.hash() + ".equalizer.json")).string();
}

Equalizer read_equalizer(const std::string& path, const Model& model) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::error_code error;
    throw Error(fs::exists(path, error) ? ErrorCode::io : ErrorCode::not_found,
                fmt::format("equalizer file {} cannot be read; measure one with `thriftattn "
                            "calibrate`",
                            path));
  }
  std::ostringstream text;
  text << file.rdbuf();
  return parse(text.str(), path, model);
}

void write_equalizer(const std::string& path, const Model& model, const Equalizer& equalizer) {
  const json layers = equalizer.layers;
  const json file = {
      {"kind", kFileKind},           {"version", kEqualizerFileVersion},    {"model", model.hash()},
      {"name", model.config().name}, {"checksum", checksum(layers.dump())}, {"layers", layers}};
  std::error_code error;
  fs::create_directories(fs::path(path).parent_path(), error);  // opening reports what fails
  // Beside the target, so that the rename stays inside one file system.
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::string temporary = fmt::format("{}.{}-{}.tmp", path, getpid(), now);
  std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
  out << file.dump() << '\n';
  out.close();
  const bool written = out.good();
  if (written) fs::rename(temporary, path, error);
  if (!written || error) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    throw Error(ErrorCode::io,
                fmt::format("cannot write {}{}{}; set XDG_CACHE_HOME to a folder "
                            "that can be written",
                            path, error ? ": " : "", error ? error.message() : std::string()));
  }
}

std::string default_cache_folder() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  // The XDG rules: a relative path is ignored.
  const fs::path cache = variable("XDG_CACHE_HOME");
  if (cache.is_absolute()) return (cache / "thriftattn").string();
  const fs::path home = variable("HOME");
  return home.is_absolute() ? (home / ".cache" / "thriftattn").string() : std::string();
}

EqualizerResult load_or_measure_equalizer(const Model& model, const EqualizerOptions& options) {
  const std::string folder =
      options.cache_folder.empty() ? default_cache_folder() : options.cache_folder;
  const std::string path = folder.empty() ? std::string() : equalizer_path(folder, model);
  EqualizerResult result;
  std::error_code error;  // a folder that cannot be searched holds no file for us
  if (!options.force && !path.empty() && fs::exists(path, error)) {
    result.equalizer = read_equalizer(path, model);
    result.path = path;
    return result;
  }
  result.equalizer = measure_equalizer(model);
  result.measured = true;
  if (path.empty()) {
    result.note = "the equalizer is not stored: neither XDG_CACHE_HOME nor HOME is set";
    return result;
  }
  try {
    write_equalizer(path, model, result.equalizer);
    result.path = path;
  } catch (const Error& error) {
    result.note = fmt::format("the equalizer is not stored: {}", error.what());
  }
  return result;
}

}  // namespace thriftattn
