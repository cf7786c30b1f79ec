// The equaliser of a model (DESIGN section 2): measured once from about 1 K tokens of an
// embedded text, kept in the user's cache folder under the hash of the model.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "engine/transformer.h"
#include "thriftattn/kv_cache.h"

namespace thriftattn {

inline constexpr int kEqualizerFileVersion = 1;

// s_d = (E[q_d^2] / E[(k_d - page mean)^2])^(1/4), from a run with an FP32 cache.
// At least 64 tokens.
Equalizer measure_equalizer(const Model& model, std::span<const int32_t> tokens);
// The same on the embedded text, with the model's own tokenizer.
Equalizer measure_equalizer(const Model& model);

// Files. read_equalizer() throws Error when the file is not one (corrupt) or was made for
// another model, shape or version (invalid_argument); not_found when there is none.
// write_equalizer() writes beside and renames: a reader sees the old file or the new one.
std::string equalizer_path(const std::string& cache_folder, const Model& model);
Equalizer read_equalizer(const std::string& path, const Model& model);
void write_equalizer(const std::string& path, const Model& model, const Equalizer& equalizer);

// $XDG_CACHE_HOME/thriftattn or ~/.cache/thriftattn; empty if neither variable is set.
std::string default_cache_folder();

struct EqualizerResult {
  Equalizer equalizer;
  bool measured = false;  // false: read from `path`
  std::string path;       // where it is kept; empty if it could not be
  std::string note;       // for the user: why it was not stored; empty if all is well
};

struct EqualizerOptions {
  std::string cache_folder;  // empty = default_cache_folder()
  bool force = false;        // measure even if there is a file (`thriftattn calibrate`)
};

// Reads the stored equaliser, or measures and stores it. A file that does not fit the model
// is refused with an Error; a folder that cannot be written is only noted.
EqualizerResult load_or_measure_equalizer(const Model& model, const EqualizerOptions& options = {});

}  // namespace thriftattn
