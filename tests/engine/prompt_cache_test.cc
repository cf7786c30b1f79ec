// Prompt caches: answers after loading are bit-identical, what does not fit is refused with the
// reason, damaged files are refused and change nothing.
#include "engine/prompt_cache.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/tiny_model.h"
#include "thriftattn/error.h"

namespace thriftattn {
namespace {

namespace fs = std::filesystem;
using test::make_tiny;
using test::random_tokens;
using test::tiny_spec;
using test::TinyModel;

class PromptCache : public ::testing::Test {
 protected:
  PromptCache() {
    std::string name = (fs::temp_directory_path() / "thriftattn-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    folder_ = name;
    path_ = (folder_ / "document.kv").string();
  }
  ~PromptCache() override { fs::remove_all(folder_); }

  Session session(const char* policy, const std::shared_ptr<const Model>& model,
                  SessionOptions options = {}) const {
    if (options.chunk == 512) options.chunk = 128;
    return Session(model, parse_policy(policy), std::move(options));
  }
  PromptCacheKey key(std::span<const int32_t> tokens, const char* policy = "balanced") const {
    return {.path = path_, .policy_name = policy, .tokens = tokens};
  }
  std::string bytes() const {
    std::ifstream file(path_, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }
  void write(const std::string& content) const {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << content;
  }
  // The message of the refusal; the session stays empty.
  std::string refusal(const PromptCacheKey& key, Session session) const {
    try {
      load_prompt_cache(key, session);
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      EXPECT_NE(message.find(path_), std::string::npos) << message;
      EXPECT_EQ(session.length(), 0);
      EXPECT_EQ(session.cache().usage().total(), 0);
      return message;
    }
    ADD_FAILURE() << "nothing was thrown";
    return "";
  }

  fs::path folder_;
  std::string path_;
  TinyModel tiny_ = make_tiny(tiny_spec("qwen2"));
  std::shared_ptr<const Model> model_ = tiny_.load();
  std::vector<int32_t> document_ = random_tokens(700, 61);
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST_F(PromptCache, AnswersAfterLoadingAreBitIdentical) {
  const TinyModel gemma_bytes = make_tiny(tiny_spec("gemma3"));
  const auto gemma = gemma_bytes.load();
  for (const auto& model : {model_, gemma}) {
    for (const char* policy :
         {"f32", "exact", "q8_0", "balanced", "thrifty", "thrifty,sinks=64,recent=100"}) {
      for (const size_t length : {size_t{700}, size_t{640}, size_t{5}}) {
        SCOPED_TRACE(std::string(policy) + ", " + std::to_string(length));
        const auto tokens = std::span<const int32_t>(document_).first(length);
        Session read = session(policy, model);
        read.prefill(tokens);
        const int64_t size = save_prompt_cache(key(tokens, policy), read);
        EXPECT_EQ(size, static_cast<int64_t>(fs::file_size(path_)));

        Session loaded = session(policy, model);
        ASSERT_TRUE(load_prompt_cache(key(tokens, policy), loaded));
        EXPECT_EQ(loaded.length(), static_cast<int64_t>(length));
        EXPECT_EQ(loaded.cache().usage().total(), read.cache().usage().total());
        EXPECT_EQ(loaded.prefill_stats().tokens, 0);
        EXPECT_TRUE(same_bits(loaded.next_logits(), read.next_logits()));
        const auto question = random_tokens(150, 61);
        for (Session* s : {&read, &loaded}) s->prefill(question);
        EXPECT_TRUE(same_bits(loaded.next_logits(), read.next_logits()));
        for (const int32_t token : random_tokens(80, 61)) {
          ASSERT_TRUE(same_bits(read.decode(token), loaded.decode(token)));
        }
      }
    }
  }
}

TEST_F(PromptCache, NoFileIsNoError) {
  Session s = session("balanced", model_);
  EXPECT_FALSE(load_prompt_cache(key(document_), s));
  EXPECT_EQ(s.length(), 0);
}

TEST_F(PromptCache, WhatDiffersIsNamed) {
  Session read = session("balanced", model_);
  read.prefill(document_);
  save_prompt_cache(key(document_), read);
  const auto says = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find("--prompt-cache"), std::string::npos) << message;
  };
  says(refusal(key(document_, "thrifty"), session("thrifty", model_)),
       "under policy balanced, this run has thrifty");
  says(refusal(key(document_), session("balanced,promote=0.05", model_)), "under policy");
  says(refusal(key(document_), session("balanced", model_, {.chunk = 64})),
       "with --chunk 128, this run has 64");
  std::vector<int32_t> other = document_;
  other[3] ^= 1;
  says(refusal(key(other), session("balanced", model_)), "another document of the same length");
  says(refusal(key(std::span(document_).first(699)), session("balanced", model_)),
       "tokens 700, this run has 699");
  test::TinySpec spec = tiny_spec("qwen2");
  spec.seed = 8;
  const TinyModel another = make_tiny(spec);
  says(refusal(key(document_), session("balanced", another.load())), "with model tiny qwen2");
  says(refusal(key(document_), session("balanced", tiny_.load(ComputeType::bf16))),
       "weights computed as f32, this run has bf16");
  const auto stretched =
      Model::load(tiny_.file(), {.rope = RopeOverride{RopeScaling::yarn, 4.0, 0}});
  says(refusal(key(document_), session("balanced", stretched)),
       "RoPE scaling none, this run has YaRN, 4 times");
  Equalizer equalizer;
  for (const LayerShape& shape : layer_shapes(model_->config())) {
    equalizer.layers.emplace_back(static_cast<size_t>(shape.kv_heads * shape.head_dim_k), 1.0f);
  }
  says(refusal(key(document_), session("balanced", model_, {.equalizer = equalizer})),
       "with equaliser none");
}

TEST_F(PromptCache, DamagedFilesAreRefused) {
  Session read = session("thrifty", model_);
  const auto tokens = std::span<const int32_t>(document_).first(200);
  read.prefill(tokens);
  const PromptCacheKey k = key(tokens, "thrifty");
  save_prompt_cache(k, read);
  const std::string good = bytes();

  for (size_t i = 0; i < 60; ++i) {
    write(good.substr(0, good.size() * i / 60));
    refusal(k, session("thrifty", model_));
  }
  write(good.substr(0, good.size() - 1));
  EXPECT_NE(refusal(k, session("thrifty", model_)).find("ends early"), std::string::npos);
  write(good + "x");
  EXPECT_NE(refusal(k, session("thrifty", model_)).find("follow its end"), std::string::npos);
  // Any byte: the prologue, the header, the pages, the checksum.
  for (size_t i = 0; i < good.size(); i += i < 1200 ? 7 : good.size() / 60) {
    std::string damaged = good;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x40);
    write(damaged);
    refusal(k, session("thrifty", model_));
  }
  std::string renamed = good;
  renamed[good.find("written_by") + 14] ^= 0x01;
  write(renamed);
  EXPECT_NE(refusal(k, session("thrifty", model_)).find("checksum"), std::string::npos);

  write(good);
  Session again = session("thrifty", model_);
  EXPECT_TRUE(load_prompt_cache(k, again));
  EXPECT_THROW(load_prompt_cache(k, again), Error);  // not empty
}

TEST_F(PromptCache, WhereItCannotBeWrittenNothingIsLeft) {
  Session read = session("balanced", model_);
  read.prefill(document_);
  PromptCacheKey nowhere = key(document_);
  nowhere.path = (folder_ / "no" / "such" / "file").string();
  EXPECT_THROW(save_prompt_cache(nowhere, read), Error);
  PromptCacheKey taken = key(document_);
  taken.path = (folder_ / "taken").string();
  fs::create_directories(folder_ / "taken" / "full");
  EXPECT_THROW(save_prompt_cache(taken, read), Error);
  EXPECT_THROW(load_prompt_cache(taken, read), Error);
  EXPECT_THROW(save_prompt_cache(key(std::span(document_).first(10)), read), Error);
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder_))
    files += entry.is_regular_file();
  EXPECT_EQ(files, 0);
}

}  // namespace
}  // namespace thriftattn
